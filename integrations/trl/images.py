"""TRL's image arguments, row by row.

TRL passes the images of a micro-batch to ``_get_per_token_logps_and_entropies`` as the processor returned them, with the
numbers of images and tiles of each row, and splits them where it splits the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefix_grouper_plugins.batch import Blocks
from prefix_grouper_plugins.layout import on_device
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.modeling.images import (
    IMAGE_TENSORS,
    TOKEN_TENSORS,
    ImageRows,
    RowTensors,
    image_token_id,
    merge_images,
    same_images,
    sharing_keys,
    split_images,
    why_not_pack,
)

_COUNTS = ("num_images", "num_tiles")
_NAMES_OF_IMAGES = ("pixel", "image", "video", "spatial_shapes")  # parts of the names of what belongs to images


def why_not_share(model: Any, given: dict[str, Any]) -> str | None:
    """Why images cannot be packed, given the arguments that are not None; None if they can."""
    names = [name for name in given if name not in (*_COUNTS, "compute_aux_loss")]
    if not names:
        return None
    if "pixel_values" in names and "num_images" not in given:
        return "`pixel_values` came without `num_images`, so it is not known which row an image belongs to"
    return why_not_pack(model, names)


def given_of(micro_batch: dict[str, Any]) -> dict[str, Any]:
    """The arguments about images that TRL hands to the stock method from a micro-batch that it has buffered."""
    known = (*_COUNTS, *TOKEN_TENSORS)
    return {
        name: value
        for name, value in micro_batch.items()
        if value is not None and (name in known or any(part in name for part in _NAMES_OF_IMAGES))
    }


class RowsOfImages:
    """The image tensors and token kinds of each row. Slicing selects rows.

    Args:
        given: the arguments of the stock method that are not None.
        num_rows: rows of the batch.
    """

    def __init__(self, given: dict[str, Any], num_rows: int) -> None:
        self.counts: dict[str, Sequence[int]] = {name: given[name] for name in _COUNTS if name in given}
        self.token_tensors: dict[str, Tensor] = {name: given[name] for name in TOKEN_TENSORS if name in given}
        tensors = {name: given[name] for name in IMAGE_TENSORS if name in given}
        self.images: Sequence[RowTensors] = (
            split_images(tensors, given["num_images"], given.get("num_tiles")) if tensors else [{}] * num_rows
        )

    def __getitem__(self, rows: slice) -> RowsOfImages:
        part = object.__new__(RowsOfImages)
        part.counts = {name: counts[rows] for name, counts in self.counts.items()}
        part.token_tensors = {name: tensor[rows] for name, tensor in self.token_tensors.items()}
        part.images = self.images[rows]
        return part

    @classmethod
    def join(cls, parts: Sequence[RowsOfImages]) -> RowsOfImages:
        """The rows of ``parts``, which bring the same arguments and are equally wide, one part after the other."""
        joined = object.__new__(cls)
        first = parts[0]
        joined.counts = {name: [n for part in parts for n in part.counts[name]] for name in first.counts}
        joined.token_tensors = {
            name: torch.cat([part.token_tensors[name] for part in parts]) for name in first.token_tensors
        }
        joined.images = [row for part in parts for row in part.images]
        return joined

    def take(self, rows: Sequence[int]) -> RowsOfImages:
        """Rows by number."""
        part, places = object.__new__(RowsOfImages), torch.tensor(rows)
        part.counts = {name: [counts[row] for row in rows] for name, counts in self.counts.items()}
        part.token_tensors = {
            name: tensor[on_device(places, tensor.device)] for name, tensor in self.token_tensors.items()
        }
        part.images = [self.images[row] for row in rows]
        return part

    def equal(self, other: RowsOfImages) -> bool:
        """Whether these rows show the same."""
        return (
            self.counts == other.counts
            and same_images(self.token_tensors, other.token_tensors)
            and len(self) == len(other)
            and all(map(same_images, self.images, other.images))
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_images(self) -> list[int]:
        """Of each row."""
        return list(self.counts.get("num_images", [0] * len(self)))

    def keys(self, model: Any, on_host: Blocks) -> list[Hashable]:
        """One for each row, equal for rows with equal prompts only if their images and token kinds are equal too.

        Rows whose images keep them from sharing have keys of their own, see `sharing_keys`.

        Args:
            model: the vision-language model.
            on_host: ids and masks of the rows as `blocks_on_host` returns them.
        """
        if not self.token_tensors and not any(self.images):
            return [None] * len(self.images)
        prompts, mask, completions, completion_mask = on_host
        kinds = [tensor[:, : prompts.shape[1]].cpu() for tensor in self.token_tensors.values()]
        along = [
            tuple(of_all[row][mask[row]].numpy().tobytes() for of_all in kinds) if shown else ()
            for row, shown in enumerate(self.images)
        ]
        rows = [
            torch.cat([ids[own], more[scored]])
            for ids, own, more, scored in zip(prompts, mask, completions, completion_mask, strict=True)
        ]
        token = image_token_id(model)
        placeholders = () if token is None else (token,)
        return list(sharing_keys(along, rows, mask.sum(1).tolist(), self.images, placeholders))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the stock method."""
        return {**self.counts, **self.token_tensors, **merge_images(self.images)}

    def image_rows(self, model: Any, blocks: tuple[Tensor, Tensor, Tensor, Tensor]) -> ImageRows | None:
        """The inputs of the packed forward besides tokens; None if there are none.

        Args:
            model: the vision-language model.
            blocks: ids and mask of the prompts and of the completions.
        """
        if not self.token_tensors and not any(self.images):
            return None
        return ImageRows(model, *blocks, self.images, self.token_tensors)


class DummyImageRow:
    """A row with one image for micro-batches without any, where several processes train one model.

    DDP waits for the gradient of every parameter in the backward that synchronises them, and FSDP and DeepSpeed gather the
    vision tower's parameters on all processes together, so the tower has to run there on each process. The stock trainer's
    shuffle spreads rows with images over micro-batches; bringing groups together may leave some micro-batches without them.
    Those get one more row, made of the image of another row of this process. It is forwarded last and its results are
    dropped, so neither losses nor gradients change.

    Args:
        enabled: whether several processes train the model.
        warn: whether this process says so.
    """

    def __init__(self, enabled: bool, warn: bool) -> None:
        self._enabled, self._warn = enabled, warn
        self._given: dict[str, Any] | None = None

    def choose(self, model: Any, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Take the row with the fewest image tokens from the generation batch of this process, if it has images."""
        self._given = None
        token = image_token_id(model)
        if not self._enabled or token is None:
            return
        rows = [row for batch in micro_batches for row in _rows_with_images(batch, token)]
        if rows:
            self._given = min(rows, key=lambda row: len(row["prompt"]))

    @property
    def is_chosen(self) -> bool:
        """Whether a row of the generation batch has an image to lend."""
        return self._given is not None

    def alone(self, device: torch.device) -> tuple[Blocks, RowsOfImages]:
        """The row by itself, as blocks of one row, and its image. One has been chosen."""
        assert self._given is not None
        row = {name: self._given[name].to(device) for name in ("prompt", "following")}
        prompt, completion = row["prompt"][None], row["following"][None]
        given = {name: kinds[None].to(device) for name, kinds in self._given["kinds"].items()}
        given |= {name: [count] for name, count in self._given["counts"].items()}
        images = RowsOfImages({**given, **merge_images([self._given["images"]])}, 1)
        return (prompt, torch.ones_like(prompt), completion, torch.ones_like(completion)), images

    def tell(self) -> None:
        """Say once that a micro-batch without images gets it."""
        if self._warn:
            self._warn = False
            logger.warning(
                "prefix grouper: a micro-batch without images would leave out the vision tower on this process, so it gets a "
                "dummy image, which changes no result (said once)"
            )

    def add_to(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
        """The arguments of the stock method with the row after the others; None where it is not needed.

        Args:
            model: the vision-language model.
            input_ids, attention_mask: ``[B, P + C]``.
            logits_to_keep: ``C``.
            given: the other arguments of the stock method that are not None.
        """
        width = input_ids.shape[1] - logits_to_keep
        # With the router loss rows stay where the stock trainer puts them, and one more row would count in it.
        if self._given is None or given.get("compute_aux_loss") or len(self._given["prompt"]) > width:
            return None
        if why_not_share(model, given) is not None:
            return None
        images = RowsOfImages(given, len(input_ids))
        forwarded = attention_mask[:, -logits_to_keep:].any(1).tolist()
        if any(shown and scored for shown, scored in zip(images.images, forwarded, strict=True)):
            return None
        self.tell()
        return self._append(input_ids, attention_mask, logits_to_keep, images, given)

    def _append(
        self, ids: Tensor, mask: Tensor, logits_to_keep: int, images: RowsOfImages, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        row: dict[str, Any] = self._given or {}

        def placed(prompt: Tensor, following: Tensor) -> Tensor:
            """Left-padded prompt and right-padded completion of one token, ``[1, P + C]``."""
            left = ids.shape[1] - logits_to_keep - len(prompt)
            return pad(torch.cat([prompt, following]), (left, logits_to_keep - 1))[None].to(ids.device)

        one = torch.ones(1, dtype=torch.long)
        arguments = {k: v for k, v in given.items() if k not in (*_COUNTS, *TOKEN_TENSORS, *IMAGE_TENSORS)}
        for name, count in row["counts"].items():
            arguments[name] = [*images.counts.get(name, [0] * len(ids)), count]
        for name, kinds in row["kinds"].items():
            others = images.token_tensors.get(name, torch.zeros_like(ids))
            own = placed(kinds, 0 * one).to(others.dtype)
            arguments[name] = torch.cat([others, own[:, : others.shape[1]]])
        arguments |= merge_images([*images.images, row["images"]])
        return (
            torch.cat([ids, placed(row["prompt"], row["following"]).to(ids.dtype)]),
            torch.cat([mask, placed(torch.ones_like(row["prompt"]), one).to(mask.dtype)]),
            arguments,
        )


def _rows_with_images(batch: dict[str, Any], token: int) -> list[dict[str, Any]]:
    """For each row of a micro-batch that TRL buffered and that has its images in the prompt, what a dummy row needs."""
    prompts, mask = batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu() != 0
    given = {name: batch[name] for name in (*_COUNTS, *IMAGE_TENSORS, *TOKEN_TENSORS) if batch.get(name) is not None}
    if "pixel_values" not in given or "num_images" not in given:
        return []
    rows = RowsOfImages(given, len(prompts))
    found = []
    for i, images in enumerate(rows.images):
        places = ((prompts[i] == token) & mask[i]).nonzero()[:, 0].tolist()
        if not images or not places or bool((batch["completion_ids"][i] == token).any()):
            continue
        first = places[0] - int(places[0] > 0 and bool(mask[i, places[0] - 1]))  # the token that opens an image, too
        columns = slice(first, places[-1] + 1)
        following = batch["completion_ids"][i, :1].cpu()
        found.append(
            {
                "prompt": torch.cat([prompts[i, columns], following]),
                "following": following,
                "images": images,
                "counts": {name: counts[i] for name, counts in rows.counts.items()},
                "kinds": {name: pad(kinds[i, columns].cpu(), (0, 1)) for name, kinds in rows.token_tensors.items()},
            }
        )
    return found


def why_not_join(model: Any, given: Sequence[dict[str, Any]]) -> str | None:
    """Why rows of micro-batches, which bring ``given`` for their images, are not forwarded together; None if they may be."""
    reason = next(filter(None, (why_not_share(model, own) for own in given)), None)
    if reason is None and len({frozenset(own) for own in given}) > 1:
        return "some bring other tensors of images than others"
    return reason
