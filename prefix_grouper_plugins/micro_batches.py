"""Planning: which rows go together in a micro-batch.

For frameworks that cut a batch into micro-batches by a budget of tokens or rows: the rows of a prompt stay together, and
each prompt counts once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowSize:
    """What planning needs to know of a row.

    Attributes:
        group: rows with equal groups share their prompt.
        prompt, response: tokens of each part.
    """

    group: Hashable
    prompt: int
    response: int


def packed_tokens(rows: Iterable[RowSize]) -> int:
    """Tokens that a packed forward of ``rows`` processes: each group's prompt once, without its last token."""
    prompts: dict[Hashable, int] = {}
    responses = 0
    for row in rows:
        prompts[row.group] = row.prompt
        responses += row.response
    return sum(prompt - 1 for prompt in prompts.values()) + responses


def rows_by_group(sizes: Sequence[RowSize], rows: Iterable[int]) -> list[list[int]]:
    """``rows``, indices into ``sizes``, group by group, in the order of each group's first row."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(sizes[row].group, []).append(row)
    return list(groups.values())


def plan_micro_batches(
    sizes: Sequence[RowSize], *, max_tokens: int | None = None, max_rows: int | None = None
) -> list[list[int]]:
    """Few micro-batches in which groups stay whole wherever a micro-batch can hold one.

    A group beyond the limits is filled into several parts, each of which repeats the prompt. The parts are then put
    into micro-batches by first-fit decreasing (Johnson 1973).

    Args:
        sizes: the rows.
        max_tokens: limit of the packed tokens of a micro-batch, None for none.
        max_rows: limit of its rows, None for none.

    Returns:
        row indices of each micro-batch, the fullest first; every row is in exactly one.

    Raises:
        ValueError: a single row is longer than ``max_tokens``.
    """
    limits = _Limits(max_tokens, max_rows)
    groups = rows_by_group(sizes, range(len(sizes)))
    parts = [part for rows in groups for part in _parts(rows, sizes, limits)]
    loads = {part[0]: packed_tokens(sizes[i] for i in part) for part in parts}
    parts.sort(key=lambda part: loads[part[0]], reverse=True)
    plan: list[list[int]] = []
    filled: list[int] = []
    for part in parts:
        load = loads[part[0]]
        fits = (b for b, rows in enumerate(plan) if limits.allow(filled[b] + load, len(rows) + len(part)))
        home = next(fits, None)
        if home is None:
            plan.append([])
            filled.append(0)
            home = len(plan) - 1
        plan[home] += part
        filled[home] += load
    return [rows for _, rows in sorted(zip(filled, plan, strict=True), key=lambda pair: -pair[0])]


def spread_micro_batches(plan: Sequence[Sequence[int]], sizes: Sequence[RowSize], count: int) -> list[list[int]]:
    """The plan with ``count`` micro-batches, for processes that must all make the same number of forwards.

    The fullest micro-batch is halved until there are enough, between groups where it holds several.

    Raises:
        ValueError: there are fewer rows than ``count``, or more micro-batches already.
    """
    spread = [list(rows) for rows in plan]
    if not len(spread) <= count <= len(sizes):
        raise ValueError(f"{len(sizes)} rows in {len(spread)} micro-batches cannot be spread over {count}")
    while len(spread) < count:
        # Whole groups first: splitting one repeats its prompt.
        fullest = max(
            (rows for rows in spread if len(rows) > 1),
            key=lambda rows: (len(_boundaries(rows, sizes)) > 0, packed_tokens(sizes[i] for i in rows)),
        )
        spread.remove(fullest)
        cuts = _boundaries(fullest, sizes) or range(1, len(fullest))
        cut = min(cuts, key=lambda cut: abs(2 * cut - len(fullest)))
        spread += [fullest[:cut], fullest[cut:]]
    return sorted(spread, key=lambda rows: -packed_tokens(sizes[i] for i in rows))


@dataclass(frozen=True)
class _Limits:
    max_tokens: int | None
    max_rows: int | None

    def allow(self, tokens: int, rows: int) -> bool:
        return (self.max_tokens is None or tokens <= self.max_tokens) and (
            self.max_rows is None or rows <= self.max_rows
        )


def _parts(rows: Sequence[int], sizes: Sequence[RowSize], limits: _Limits) -> list[list[int]]:
    """One group cut into parts within the limits, each row into the first that has room for it.

    So no two parts have room for each other: a group meets itself in no micro-batch, and loads can be added up.
    """
    parts: list[list[int]] = []
    for row in rows:
        size = sizes[row]
        if limits.max_tokens is not None and packed_tokens([size]) > limits.max_tokens:
            raise ValueError(
                f"row {row} has {size.prompt} + {size.response} tokens, a micro-batch may hold {limits.max_tokens}: "
                "raise the token budget"
            )
        longer = ([*part, row] for part in parts)
        fits = (b for b, ids in enumerate(longer) if limits.allow(packed_tokens(sizes[i] for i in ids), len(ids)))
        home = next(fits, None)
        if home is None:
            parts.append([row])
        else:
            parts[home].append(row)
    return parts


def _boundaries(rows: Sequence[int], sizes: Sequence[RowSize]) -> list[int]:
    """Where one group ends and the next begins."""
    return [cut for cut in range(1, len(rows)) if sizes[rows[cut - 1]].group != sizes[rows[cut]].group]
