"""An order of a training batch in which each group lies on one rank, and in one optimizer step where it may."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens, rows_by_group


def regrouped_order(sizes: Sequence[RowSize], ranks: int, steps: int, *, across_steps: bool = False) -> list[int]:
    """An order of the rows in which each group lies on one rank, if the ranks' equal shares allow it.

    Row ``i`` is on rank ``i // (len(sizes) / ranks)``, and rank by rank the rows are cut into one share for each
    optimizer step. A step sees the same rows before and after; only with ``across_steps`` do groups that were scattered
    over several steps come together in one.

    Args:
        sizes: the rows in the present order.
        ranks: data-parallel ranks.
        steps: optimizer steps that the batch is cut into.
        across_steps: see above.

    Returns:
        indices into ``sizes``: a permutation, which balances packed tokens over the ranks of each step.

    Raises:
        ValueError: the rows cannot be shared out evenly.
    """
    share, rest = divmod(len(sizes), ranks * steps)
    if rest:
        raise ValueError(f"{len(sizes)} rows cannot be shared out to {ranks} ranks in {steps} steps evenly")
    rows = torch.arange(len(sizes)).view(ranks, steps, share).transpose(0, 1).flatten(1)  # [steps, rows of a step]
    if across_steps:
        # In the order of their first rows, step by step, so that rows which stood last (verl's padding) stay last.
        whole = [row for group in rows_by_group(sizes, rows.flatten().tolist()) for row in group]
        rows = torch.tensor(whole).view(steps, -1)
    dealt = [_deal(step, sizes, ranks) for step in rows.tolist()]
    return [row for rank in range(ranks) for step in dealt for row in step[rank]]


def _deal(rows: Sequence[int], sizes: Sequence[RowSize], ranks: int) -> list[list[int]]:
    """Share ``rows`` out to ``ranks`` in equal numbers: heavy groups first, each to the rank with the least load that
    has room for all of it, and piecemeal where none has. Each rank's groups lie in the order of ``rows``."""
    room = [len(rows) // ranks] * ranks
    loads = [0] * ranks
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]

    def load_of(group: Sequence[int]) -> int:
        return packed_tokens(sizes[i] for i in group)

    waiting = sorted(rows_by_group(sizes, rows), key=load_of)
    while waiting:
        group = waiting.pop()
        able = [rank for rank in range(ranks) if room[rank] >= len(group)]
        rank = min(able, key=lambda r: loads[r]) if able else max(range(ranks), key=lambda r: room[r])
        kept, rest = group[: room[rank]], group[room[rank] :]
        dealt[rank].append(kept)
        loads[rank] += load_of(kept)
        room[rank] -= len(kept)
        if rest:
            waiting.append(rest)
    place = {row: i for i, row in enumerate(rows)}
    return [[row for group in sorted(groups, key=lambda g: place[g[0]]) for row in group] for groups in dealt]


def forwarded_share(order: Sequence[int], sizes: Sequence[RowSize], ranks: int, steps: int) -> float:
    """Tokens that an update in this order forwards, divided by those of the rows, where micro-batches hold whole groups.

    Args:
        order: indices into ``sizes``, see :func:`regrouped_order`.
        sizes, ranks, steps: likewise.
    """
    shares = torch.tensor(order).view(ranks * steps, -1).tolist()
    forwarded = sum(packed_tokens(sizes[row] for row in share) for share in shares)
    return forwarded / sum(size.prompt + size.response for size in sizes)
