"""Bringing the rows of a prompt together again, without changing the optimization.

TRL samples the completions of a prompt side by side, then shuffles the rows of a generation batch and cuts it into
micro-batches (``shuffle_sequence_dict`` and ``split_tensor_dict`` in ``trl.trainer.utils``), so that groups lie
scattered. Rows may move among micro-batches that accumulate into one optimizer step: its gradient is a sum over rows,
for every loss whose normaliser does not depend on which rows share a micro-batch: those of one of the :mod:`.windows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from prefix_grouper_plugins.batch import Blocks, prompt_group
from prefix_grouper_plugins.integrations.trl.windows import window_size
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.images import IMAGE_TENSORS, first_alike

MicroBatch = dict[str, Any]


def blocks_of(micro_batch: MicroBatch) -> Blocks:
    """Ids and masks of its prompts and completions."""
    return tuple(micro_batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))  # type: ignore[return-value]


def regrouped_window(args: Any, mode: str, mix_freely: bool) -> int:
    """How many consecutive micro-batches of a generation batch may exchange rows; 1 means none.

    Args:
        args: the trainer's arguments.
        mode: ``prefix_grouper_regroup``.
        mix_freely: whether the loss allows rows to change their micro-batch within an optimizer step.
    """
    if mode == "group":
        return args.steps_per_generation
    if mode == "none" or not mix_freely:
        return 1
    return window_size(args)


class Regrouped(list[MicroBatch]):
    """Micro-batches that have exchanged rows.

    Args:
        micro_batches: as they are now.
        orders: for each window, the numbers of its rows before, in the order in which they lie now.
    """

    def __init__(self, micro_batches: Iterable[MicroBatch], orders: dict[range, list[int]]) -> None:
        super().__init__(micro_batches)
        self.orders = orders

    def undone(self) -> list[MicroBatch]:
        """The micro-batches as they were before."""
        found: list[MicroBatch] = []
        for window, order in self.orders.items():
            own = [self[number] for number in window]
            found += _cut(_merged(own), sorted(range(len(order)), key=order.__getitem__), len(own))
        return found


def regroup(micro_batches: list[MicroBatch], over: Sequence[range], share: str = "prompt") -> list[MicroBatch]:
    """Exchange rows within each window of micro-batches so that rows that share most are side by side.

    Args:
        micro_batches: what TRL buffered: dicts of tensors ``[rows, ...]``, lists of ``rows`` entries, 0-d tensors that
            belong to the whole generation batch, and None.
        over: the windows, by numbers of micro-batches: all of them in their order.
        share: ``prefix_grouper_share``.

    Returns:
        as many micro-batches of as many rows; those that were given where no window has two.
    """
    if all(len(window) == 1 for window in over):
        return micro_batches
    found: list[MicroBatch] = []
    orders = {}
    for window in over:
        merged = _merged([micro_batches[number] for number in window])
        orders[window] = _tree_order(merged, share)
        found += _cut(merged, orders[window], len(window))
    return Regrouped(found, orders)


def _merged(window: list[MicroBatch]) -> MicroBatch:
    """The rows of all micro-batches, each with one entry of everything, images included."""
    split = [split_pixel_values_by_grid(batch) for batch in window]
    return {key: _join([batch[key] for batch in split]) for key in split[0]}


def _cut(merged: MicroBatch, order: list[int], count: int) -> list[MicroBatch]:
    """Rows of :func:`_merged` in another order, in ``count`` micro-batches."""
    chunks = torch.tensor(order, device=merged["prompt_ids"].device).chunk(count)
    return [unsplit_pixel_values_by_grid({key: _take(value, rows) for key, value in merged.items()}) for rows in chunks]


def _tree_order(merged: MicroBatch, share: str) -> list[int]:
    """Rows in the order of their tree: those that share most side by side, and else in the order of first rows.

    With ``share="prompt"`` rows share what their prompts have in common, else whatever they begin with. Rows with different
    padding share nothing, since TRL numbers padded columns.
    """
    ids, mask = merged["prompt_ids"].cpu(), merged["prompt_mask"].cpu() != 0
    rows = [row[own] for row, own in zip(ids, mask, strict=True)]
    groups = [prompt_group(len(row), row) for row in rows]
    keys = list(zip(map(len, rows), first_alike(_images(merged), groups), strict=True))
    lengths, mark = [len(row) + 1 for row in rows], ids.new_tensor([-1])
    if share != "prompt":
        completions, scored = merged["completion_ids"].cpu(), merged["completion_mask"].cpu() != 0
        rows = [torch.cat([row, more[own]]) for row, more, own in zip(rows, completions, scored, strict=True)]
    rows = [torch.cat([mark, row, mark]) for row in rows]  # so that rows of one token are in the tree, too
    layout = PrefixLayout.from_rows(rows, keys, shareable=lengths, min_level=None if share == "prompt" else 1)
    leaves = torch.tensor([path[-1] for path in layout.row_segments])
    return leaves.argsort(stable=True).tolist()  # type: ignore[no-any-return]


def _images(merged: MicroBatch) -> list[dict[str, Tensor]]:
    """Those of each row, whose image tensors are an entry of a list (or, in Idefics, a row of one tensor)."""
    tensors = {name: merged[name] for name in IMAGE_TENSORS if not _is_whole(merged.get(name))}
    return [{name: rows[i] for name, rows in tensors.items()} for i in range(len(merged["prompt_ids"]))]


def _is_whole(value: Any) -> bool:
    """Whether ``value`` belongs to the generation batch rather than to its rows."""
    return value is None or (isinstance(value, Tensor) and value.ndim == 0)


def _join(values: list[Any]) -> Any:
    if _is_whole(values[0]):
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [entry for value in values for entry in value]


def _take(value: Any, rows: Tensor) -> Any:
    if _is_whole(value):
        return value
    if isinstance(value, Tensor):
        return value[rows]
    return [value[row] for row in rows.tolist()]
