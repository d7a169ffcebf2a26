"""Rows with images: what makes their groups, and what a packed forward of a vision-language model is called with.

Images are shared as prompts are: the vision tower sees those of one row of each group, in the order in which the prompts
stand in the packed row, since models put image features at the placeholder tokens one after the other. Two rules make
that exact. Rows share only if their prompts *and* their images are equal: equal placeholder tokens may stand for
different pictures. And they share only if all of their placeholders lie in the part that is shared: a branch repeats
the prompt's last token, and a placeholder that stands twice would need its feature twice.

Positions are those that the model's own rope index gives to the rows (multimodal RoPE, Qwen2-VL, arXiv 2409.12191,
section 2.1), laid out as the tokens are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3

from prefix_grouper_plugins.attention.bidirectional import blocks_of
from prefix_grouper_plugins.batch import GroupedBatch, prompt_group
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.inputs import packed_inputs
from prefix_grouper_plugins.modeling.support.report import transformers_model

# What processors return for images, and what they return for each token.
IMAGE_TENSORS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "image_sizes",
    "spatial_shapes",
    "image_position_ids",
)
TOKEN_TENSORS = ("token_type_ids", "mm_token_type_ids")

# Image tokens see all others of their image.
BIDIRECTIONAL_IMAGES = {"gemma3"}

ALONE = object()  # leads the key of a row whose images keep it from sharing

RowTensors = Mapping[str, Tensor]  # image tensors of one row; empty for a row without images


def reason_not_to_pack(model: nn.Module, names: Sequence[str]) -> str | None:
    """Why rows that bring the tensors ``names`` cannot be packed; None where they can."""
    if videos := [name for name in names if "video" in name]:
        return f"`{videos[0]}` belongs to rows with videos, which are not packed"
    if unknown := [name for name in names if name not in IMAGE_TENSORS + TOKEN_TENSORS]:
        return f"`{unknown[0]}` is an input that packed rows of images do not know"
    if "image_grid_thw" in names and "mm_token_type_ids" not in names and _rope_index(model) is not None:
        return "`mm_token_type_ids` is missing, without which the positions of images cannot be told"
    return None


def split_images(
    tensors: Mapping[str, Tensor], num_images: Sequence[int], num_tiles: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Each row's share of the image tensors of a batch.

    Args:
        tensors: what the processor returned, by the names in :data:`IMAGE_TENSORS`. The leading axis of each counts
            patches (``pixel_values`` beside ``image_grid_thw``), tiles, images or rows.
        num_images: images of each row.
        num_tiles: tiles of each row, for models that cut images into tiles (InternVL, LFM2-VL).

    Raises:
        ValueError: the leading axis of a tensor counts none of these.
    """
    rows: list[dict[str, Tensor]] = [{} for _ in num_images]
    for name, tensor in tensors.items():
        sizes = _sizes(name, tensors, list(num_images), None if num_tiles is None else list(num_tiles))
        for row, images, (start, end) in zip(rows, num_images, pairwise(accumulate(sizes, initial=0)), strict=True):
            if images:
                row[name] = tensor[start:end]
    return rows


def _sizes(name: str, tensors: Mapping[str, Tensor], images: list[int], tiles: list[int] | None) -> list[int]:
    """Entries of each row along the leading axis of ``tensors[name]``."""
    length, rows = len(tensors[name]), [1] * len(images)
    if name == "pixel_values" and "image_grid_thw" in tensors:
        patches = tensors["image_grid_thw"].prod(-1).tolist()
        candidates = [[sum(patches[start:end]) for start, end in pairwise(accumulate(images, initial=0))]]
    elif "pixel_attention_mask" in tensors and "spatial_shapes" not in tensors:
        candidates = [rows]  # Idefics pads to the most images of a row
    else:
        candidates = [images, rows] if tiles is None else [tiles, images]
    for sizes in candidates:
        if sum(sizes) == length:
            return sizes
    raise ValueError(
        f"{name} has {length} entries for {len(images)} rows of {images} images"
        + (f" and {tiles} tiles" if tiles else "")
        + ": they cannot be told apart by row"
    )


def merge_images(rows: Sequence[RowTensors]) -> dict[str, Tensor]:
    """The image tensors of ``rows``, one row after the other: the opposite of :func:`split_images`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def first_alike(images: Sequence[RowTensors], among: Sequence[Hashable]) -> list[int | None]:
    """For each row with images the first row that shows the same; None for a row without.

    Args:
        images: the image tensors of each row: pixels, grids, sizes, masks. All of them must be equal.
        among: of each row, what must be equal as well. Only rows in which it is are compared, so let it tell prompts.
    """
    distinct: dict[Hashable, list[int]] = {}
    found: list[int | None] = []
    for i, (row, key) in enumerate(zip(images, among, strict=True)):
        if not row:
            found.append(None)
            continue
        others = distinct.setdefault(key, [])
        first = next((j for j in others if _equal(row, images[j])), i)
        if first == i:
            others.append(i)
        found.append(first)
    return found


def _equal(one: RowTensors, other: RowTensors) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x, other[name]) for name, x in one.items()
    )


def sharing_keys(
    keys: Sequence[Hashable],
    rows: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    images: Sequence[RowTensors],
    placeholders: Collection[int],
) -> list[tuple[Hashable, int | None]]:
    """Keys that two rows have in common only if all that they would share is the same, images included.

    Rows with images share if their keys, prompts (the whole of them) and images are equal: equal placeholders may stand
    for different images. A row with placeholders behind the part of its prompt that is laid out once (an image in the
    response, or at the very end of the prompt) shares with nobody: what is laid out twice would need features twice.

    Args:
        keys: of each row, what must be equal as well.
        rows: token ids, on the CPU.
        prompt_lengths: how many of each row's tokens are its prompt.
        images: the image tensors of each row.
        placeholders: token ids that stand for images. Without any, rows with images share nothing.
    """
    tokens = torch.tensor(sorted(placeholders), dtype=torch.long)
    prompts = [prompt_group(key, row[:length]) for key, row, length in zip(keys, rows, prompt_lengths, strict=True)]
    found: list[tuple[Hashable, int | None]] = []
    for i, first in enumerate(first_alike(images, prompts)):
        branch = rows[i][prompt_lengths[i] - 1 :]
        alone = first is not None and (not len(tokens) or bool(torch.isin(branch, tokens).any()))
        found.append((ALONE, i) if alone else (keys[i], first))
    return found


def image_token_id(model: nn.Module) -> int | None:
    """The placeholder token of an image; None for a model that knows none."""
    config: Any = transformers_model(model).config
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def multimodal_positions(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    images: RowTensors,
    mm_token_type_ids: Tensor | None,
) -> Tensor | None:
    """The positions that the model gives to padded rows with images, ``LongTensor[3, B, L]``.

    None where it numbers tokens as for text: models without a rope index, and batches without images.

    Args:
        model: the vision-language model.
        input_ids, attention_mask, mm_token_type_ids: ``[B, L]``.
        images: the image tensors of all rows.

    Raises:
        ValueError: there are images, but no ``mm_token_type_ids``.
    """
    rope_index, grid = _rope_index(model), images.get("image_grid_thw")
    if rope_index is None or grid is None:
        return None
    if mm_token_type_ids is None:
        raise ValueError("rows with images need `mm_token_type_ids`, which the processor returns beside `input_ids`")
    positions: Tensor = rope_index(
        input_ids, image_grid_thw=grid, attention_mask=attention_mask, mm_token_type_ids=mm_token_type_ids
    )[0]
    return positions


def _rope_index(model: nn.Module) -> Any:
    base = transformers_model(model)
    return getattr(getattr(base, "model", base), "get_rope_index", None)


def first_rows(layout: PrefixLayout) -> list[int]:
    """For each tree of the layout, in packed order, the row that its images are taken from."""
    real = layout.segments[layout.segments[:, 0] < layout.num_tokens - layout.num_padding]
    starts = real[real[:, 2] < 0, 0].long()
    ends = torch.tensor(list(accumulate(layout.row_lengths)))
    return torch.searchsorted(ends, layout.source_index.cpu()[starts], right=True).tolist()  # type: ignore[no-any-return]


class ImageRows:
    """Padded rows with images, and what their packed forward takes.

    Args:
        model: the vision-language model.
        prompt_ids, prompt_mask: ``[B, P]``, left-padded.
        completion_ids, completion_mask: ``[B, C]``, right-padded.
        images: the image tensors of each row, see :func:`split_images`.
        token_tensors: by the names in :data:`TOKEN_TENSORS`, ``[B, P]`` or ``[B, P + C]``; zero in completions where
            not given.

    Attributes:
        keys: one for each row, for :class:`~prefix_grouper_plugins.grouping.GroupedBatch`.
        positions (`LongTensor[3, B, P + C]`): the model's own, or None, see :func:`multimodal_positions`.
        block_ids (`LongTensor[B, P + C]`): images that see themselves in both directions, or None.

    Raises:
        UnsupportedModelError: a row ends within such an image.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        images: Sequence[RowTensors],
        token_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        mask = torch.cat([prompt_mask, completion_mask], dim=1)
        self.images = list(images)
        self.token_tensors = {name: _fill(x, input_ids.shape[1]) for name, x in (token_tensors or {}).items()}
        self.positions = multimodal_positions(
            model, input_ids, mask, merge_images(self.images), self.token_tensors.get("mm_token_type_ids")
        )
        columns = torch.arange(input_ids.shape[1], device=mask.device)
        self.block_ids = image_blocks(
            transformers_model(model).config.model_type,
            self.token_tensors.get("token_type_ids"),
            torch.where(mask != 0, columns, 0).amax(1),
        )
        self.keys = self._keys(image_token_id(model), input_ids.cpu(), mask.cpu() != 0, prompt_ids.shape[1])

    @classmethod
    def from_processor(
        cls,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        tensors: Mapping[str, Tensor],
        num_images: Sequence[int],
        num_tiles: Sequence[int] | None = None,
    ) -> ImageRows:
        """Of rows whose tensors, those of images and those of tokens, are still in one batch."""
        images = split_images({k: v for k, v in tensors.items() if k in IMAGE_TENSORS}, num_images, num_tiles)
        per_token = {k: v for k, v in tensors.items() if k in TOKEN_TENSORS}
        return cls(model, prompt_ids, prompt_mask, completion_ids, completion_mask, images, per_token)

    def _keys(self, token: int | None, ids: Tensor, mask: Tensor, width: int) -> list[Hashable]:
        per_token = [x.cpu() for x in self.token_tensors.values()]
        per_token += [] if self.positions is None else list(self.positions.cpu())
        # Equal by construction in rows with equal prompts and images; where they were not, rows would not share.
        along = [
            tuple(x[i, :width][mask[i, :width]].numpy().tobytes() for x in per_token) if row else ()
            for i, row in enumerate(self.images)
        ]
        rows = [row[own] for row, own in zip(ids, mask, strict=True)]
        return [
            *sharing_keys(along, rows, mask[:, :width].sum(1).tolist(), self.images, [] if token is None else [token])
        ]

    def packed_inputs(self, batch: GroupedBatch) -> dict[str, Any]:
        """Keyword arguments of the packed forward of ``batch``, which was made of these rows with :attr:`keys`."""
        positions = batch.position_ids if self.positions is None else batch.pack(self.positions.movedim(0, -1)).T
        if self.block_ids is not None:
            set_blocks(batch.layout, batch.pack(self.block_ids))
        return {
            **packed_inputs(batch.layout, batch.input_ids, positions),
            **{name: batch.pack(x)[None] for name, x in self.token_tensors.items()},
            **merge_images([self.images[batch.kept[row]] for row in first_rows(batch.layout)]),
        }


def image_blocks(model_type: str, token_type_ids: Tensor | None, last_tokens: Tensor) -> Tensor | None:
    """``LongTensor[B, L]``: a number for each image that the model lets see itself in both directions, -1 elsewhere.

    Args:
        model_type: of the vision-language model.
        token_type_ids: ``[B, L]``, 1 on images. Without them such a model is causal.
        last_tokens: the column of each row's last token.

    Raises:
        UnsupportedModelError: a row ends within such an image.
    """
    if token_type_ids is None or model_type not in BIDIRECTIONAL_IMAGES:
        return None
    image = token_type_ids == 1
    if bool(image.gather(1, last_tokens[:, None]).any()):
        raise UnsupportedModelError("a row ends within an image, whose last token is not forwarded but would be seen")
    first = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return (first.flatten().cumsum(0).view_as(image) - 1).where(image, -1)


def set_blocks(layout: PrefixLayout, block_ids: Tensor) -> None:
    """Tell ``layout`` which tokens see each other in both directions.

    Args:
        layout: of the packed row.
        block_ids: ``LongTensor[T]``, those of :func:`image_blocks` at the tokens of the packed row.
    """
    layout.blocks = blocks_of(block_ids, layout)
    layout.blocks_cut_by_window = _window_cuts_blocks()


def _window_cuts_blocks() -> bool:
    """Whether the installed transformers hides what lies behind the sliding window in blocks too."""
    return hasattr(modeling_gemma3, "create_masks_for_vision_model")


def _fill(values: Tensor, length: int) -> Tensor:
    return nn.functional.pad(values, (0, length - values.shape[1]))
