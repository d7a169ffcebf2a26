"""From a trainer's rows to a layout: which rows share what.

Trainers hold two padded blocks, prompts (padded on the left) and completions (padded on the right).
:class:`GroupedBatch` turns them into one packed row and brings per-token results back. Rows share by the token ids of
their prompts, wherever they are in the batch: a trainer may shuffle as it likes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy

import torch
from torch import Tensor

from prefix_grouper_plugins.layout import IGNORE_INDEX, PrefixLayout, on_device

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]  # ids and mask of the prompts [B, P], of the completions [B, C]


class NothingToScore(ValueError):
    """Every completion of a batch is empty."""


class GroupedBatch:
    """A padded batch and its packed row. Prompts are shared, and completions as far as ``min_level`` says.

    Rows whose completion is empty are left out: they have nothing to score.

    Args:
        prompt_ids: ``[B, P]``, left-padded, of any integer dtype.
        prompt_mask: ``[B, P]``, 1 on real tokens.
        completion_ids: ``LongTensor[B, C]``, right-padded.
        completion_mask: ``[B, C]``, 1 on real tokens.
        keys: one hashable for each row; rows with different keys never share.
        padded_positions: number positions by padded columns, as a padded forward without ``position_ids`` does,
            instead of from each row's first real token. Rows with different padding then share nothing.
        min_level: share what completions begin alike with too, in levels of at least this many tokens; 1 for all of it,
            None for none. See `PrefixLayout.from_rows`.
        forward_last: forward the last token of every row as well, and rows with an empty completion too, so that
            statistics over all tokens (the router loss of a mixture of experts) see what the ordinary forward sees.
        on_host: the four blocks as :func:`blocks_on_host` returns them, where the caller has read them already.

    Attributes:
        layout (`PrefixLayout`): on the device of ``prompt_ids``.
        input_ids, position_ids, labels (`LongTensor[T]`): of the packed row; labels are -100 outside of completions.
        positions (`LongTensor[N]`): packed position that predicts each completion token, row by row.
        rows, columns (`LongTensor[N]`): where each of them is in the completion block.
        kept (`list[int]`): the rows of the batch that the layout holds, by their index in the batch.
        num_groups (`int`): distinct prompts among the rows.
        num_row_tokens (`int`): real tokens of the whole batch, which an ordinary, unpadded forward would process.

    Raises:
        ValueError: masks of other shapes than the ids, another number of prompts than completions, an empty prompt,
            padding on the wrong side or in the middle, what is no integer id or has NaN in its mask, tensors on several
            devices or on the meta device, or (without ``forward_last``) only empty completions.
    """

    def __init__(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        *,
        keys: Sequence[Hashable] | None = None,
        padded_positions: bool = False,
        min_level: int | None = None,
        forward_last: bool = False,
        on_host: Blocks | None = None,
    ) -> None:
        check_tensors(prompt_ids, prompt_mask, completion_ids, completion_mask)
        device = prompt_ids.device
        if on_host is None:
            on_host = blocks_on_host(prompt_ids, prompt_mask, completion_ids, completion_mask)
        prompts, prompt_mask, completions, completion_mask = on_host
        _check_batch(prompts, prompt_mask, completions, completion_mask, keys)
        prompt_lengths, lengths = prompt_mask.sum(1).tolist(), completion_mask.sum(1).tolist()
        self.kept = kept = [i for i, length in enumerate(lengths) if length or forward_last]
        if not kept:
            raise NothingToScore("every completion is empty: there is nothing to score")
        self.shape = completions.shape
        self.num_row_tokens = sum(prompt_lengths) + sum(lengths)

        width = prompts.shape[1]
        own_prompts = [prompts[i, width - prompt_lengths[i] :] for i in kept]
        self._prompt_length = len(own_prompts[0])
        tail = torch.zeros(int(forward_last), dtype=torch.long)  # follows the last token, and is not forwarded
        tokens = [
            torch.cat([own, completions[i, : lengths[i]], tail]) for i, own in zip(kept, own_prompts, strict=True)
        ]
        pads = [width - len(own) if padded_positions else 0 for own in own_prompts]
        own_keys = [None if keys is None else keys[i] for i in kept]
        self.num_rows, self.num_groups = len(kept), len(set(map(prompt_group, own_keys, own_prompts)))
        layout = PrefixLayout.from_rows(
            tokens,
            list(zip(own_keys, pads, strict=True)),
            shareable=[len(own) for own in own_prompts],
            min_level=min_level,
        )
        columns = [torch.arange(pad, pad + len(row)) for pad, row in zip(pads, tokens, strict=True)]
        # The last prompt token predicts the first completion token, and so on, row by row as in the completion block.
        paths = zip(layout.unpack(torch.arange(layout.num_tokens)), own_prompts, kept, strict=True)
        positions = torch.cat([path[len(own) - 1 :][: lengths[i]] for path, own, i in paths])
        scored = completion_mask.nonzero(as_tuple=True)
        labels = torch.full((layout.num_tokens,), IGNORE_INDEX)
        labels[positions] = completions[scored]

        block = width + self.shape[1]
        places = [
            torch.arange(i * block + width - len(own), i * block + width - len(own) + len(row))
            for i, own, row in zip(kept, own_prompts, tokens, strict=True)
        ]
        self._places = on_device(layout.pack(places), device)
        self.layout = layout.to(device)
        self.input_ids = on_device(layout.pack(tokens), device)
        self.position_ids = on_device(layout.pack(columns), device)
        self.labels, self.positions = on_device(labels, device), on_device(positions, device)
        self.rows, self.columns = (on_device(index, device) for index in scored)

    def behind_prompt(self) -> GroupedBatch:
        """This batch, of one prompt, with all of the prompt that is shared (``P - 1`` tokens) given: see `PrefixLayout.given`.

        Raises:
            ValueError: the batch has several prompts.
        """
        if self.num_groups != 1:
            raise ValueError(f"the batch has {self.num_groups} prompts: one part of one group is needed")
        part, given = copy(self), self._prompt_length - 1
        part.layout = self.layout.given(given)
        for name in ("input_ids", "position_ids", "labels", "_places"):
            setattr(part, name, getattr(self, name)[given:])
        part.positions = self.positions - given
        return part

    def pack(self, values: Tensor) -> Tensor:
        """Values of prompts and completions side by side, ``[B, P + C, ...]``, to packed ``[T, ...]``. Differentiable."""
        return values.flatten(0, 1)[self._places]

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the completion tokens ``[N]`` to ``[B, C]``, zero where there is no token. Differentiable."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def check_tensors(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> None:
    """Refuse what is no block of integer ids and its mask, all on one device that holds numbers.

    Raises:
        ValueError: see :class:`GroupedBatch`.
    """
    blocks = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    blocks |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
    for name, block in blocks.items():
        if not isinstance(block, Tensor) or block.dim() != 2:
            found = f"shape {tuple(block.shape)}" if isinstance(block, Tensor) else f"type {type(block).__name__}"
            raise ValueError(f"{name} has {found}: a tensor with a row for each completion is needed, [B, length]")
        if block.is_meta:
            raise ValueError(
                f"{name} is on the meta device, which holds no numbers: move the batch to the model's device"
            )
        if name.endswith("_ids") and (block.is_floating_point() or block.is_complex() or block.dtype == torch.bool):
            raise ValueError(f"{name} is of {block.dtype}: token ids are integers, torch.int64 say")
        if name.endswith("_mask") and block.is_floating_point() and bool(block.isnan().any()):
            raise ValueError(f"{name} has NaN in it, which says neither token nor padding: use 1 and 0")
    devices = {name: block.device for name, block in blocks.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the batch lies on several devices ({where}): move all of it to the model's")


def blocks_on_host(prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> Blocks:
    """Ids as int64 and masks as bool on the CPU. From a device by one copy, since each waits until it has done all its work."""
    blocks = [prompt_ids.long(), prompt_mask != 0, completion_ids.long(), completion_mask != 0]
    if prompt_ids.device.type != "cpu":
        flat = torch.cat([block.flatten().long() for block in blocks]).cpu()
        parts = flat.split([block.numel() for block in blocks])
        blocks = [part.view(block.shape).to(block.dtype) for part, block in zip(parts, blocks, strict=True)]
    return blocks[0], blocks[1], blocks[2], blocks[3]


def _check_batch(
    prompts: Tensor, prompt_mask: Tensor, completions: Tensor, completion_mask: Tensor, keys: Sequence[Hashable] | None
) -> None:
    _check_block("prompt", prompts, prompt_mask)
    _check_block("completion", completions, completion_mask)
    if (found := _not_padded(prompt_mask, completion_mask)) is not None:
        name, row, side = found
        raise ValueError(f"{name}_mask of row {row} has padding other than on the {side}")
    for name, given in (("completion_ids", completions), ("keys", prompts if keys is None else keys)):
        if len(given) != len(prompts):
            raise ValueError(f"{name} has {len(given)} rows and prompt_ids {len(prompts)}: give one for each prompt")
    empty = (~prompt_mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(f"the prompt of row {int(empty[0])} is empty: it needs at least one token")


def why_not_padded(on_host: Blocks) -> str | None:
    """Why rows, see `blocks_on_host`, cannot be packed, as far as their masks say."""
    found = _not_padded(on_host[1], on_host[3])
    if found is None:
        return None
    name, _, side = found
    return f"{name}_mask has padding other than on the {side}"


def _not_padded(prompt_mask: Tensor, completion_mask: Tensor) -> tuple[str, int, str] | None:
    """The block and the row that are not padded on the side where they should be, and that side; None if all are."""
    for name, side, mask in (("prompt", "left", prompt_mask), ("completion", "right", completion_mask)):
        steps = mask.int().diff(dim=1)
        wrong = (steps < 0 if side == "left" else steps > 0).any(1)
        if wrong.any():
            return name, int(wrong.nonzero()[0]), side
    return None


def _check_block(name: str, ids: Tensor, mask: Tensor) -> None:
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"{name}_ids has shape {tuple(ids.shape)} and {name}_mask {tuple(mask.shape)}: both must be [rows, tokens]"
        )


def prompt_group(key: Hashable, prompt: Tensor) -> Hashable:
    """What rows with equal keys and equal prompts (token ids on the CPU) have in common, and no others."""
    return key, prompt.numpy().tobytes()
