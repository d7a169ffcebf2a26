"""Planning: which rows go together in a micro-batch.

For frameworks that cut a batch into micro-batches by a budget of tokens. What rows have in common is a tree, and a
set of rows costs the size of its tree: rows that share most stay together, and what they share counts once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from prefix_grouper_plugins.layout import PrefixLayout


@dataclass(frozen=True)
class RowSize:
    """What planning needs to know of a row.

    Attributes:
        group: rows with equal groups are kept in one place where there is room: those of one prompt, usually.
        prompt, response: tokens of each part.
        levels: what the row shares, from the first token on: name and tokens of each level, of which names are equal for the
            rows that share it. By default the prompt without its last token, under the name of the group.
    """

    group: Hashable
    prompt: int
    response: int
    levels: tuple[tuple[Hashable, int], ...] | None = None

    @property
    def path(self) -> tuple[tuple[Hashable, int], ...]:
        """:attr:`levels`, or the default."""
        return ((self.group, self.prompt - 1),) if self.levels is None else self.levels

    @property
    def tokens(self) -> int:
        """That a packed forward of the row alone processes."""
        return self.prompt + self.response - 1

    @property
    def own(self) -> int:
        """Tokens that the row shares with no other."""
        return self.tokens - sum(tokens for _, tokens in self.path)


def sizes_in(layout: PrefixLayout, groups: Sequence[Hashable], prompt_lengths: Sequence[int]) -> list[RowSize]:
    """The sizes of the rows of ``layout``, which share what they share there.

    Args:
        layout: of all rows that are planned.
        groups: one for each row.
        prompt_lengths: tokens of each prompt.
    """
    paths = layout.row_segments
    lengths = (layout.segments[:, 1] - layout.segments[:, 0]).tolist()
    rows = Counter(segment for path in paths for segment in path)
    sizes = zip(groups, prompt_lengths, layout.row_lengths, paths, strict=True)
    return [
        RowSize(group, prompt, length - prompt, tuple((s, lengths[s]) for s in path if rows[s] > 1))
        for group, prompt, length, path in sizes
    ]


def packed_tokens(rows: Iterable[RowSize]) -> int:
    """Tokens that a packed forward of ``rows`` processes: the size of their tree."""
    levels: dict[Hashable, int] = {}
    own = 0
    for row in rows:
        levels.update(row.path)
        own += row.own
    return sum(levels.values()) + own


def rows_by_group(sizes: Sequence[RowSize], rows: Iterable[int]) -> list[list[int]]:
    """``rows``, indices into ``sizes``, group by group, in the order of each group's first row.

    Within a group those that share most lie side by side.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(sizes[row].group, []).append(row)
    return [_in_tree_order(sizes, members) for members in groups.values()]


def plan_micro_batches(sizes: Sequence[RowSize], max_tokens: int) -> list[list[int]]:
    """Few micro-batches, in which rows that share stay together wherever a micro-batch can hold them.

    From the leaves of the tree to its root, the parts below each level are put together by first-fit decreasing (Johnson
    1973), where a part costs what it adds to the level. So a level beyond the limit is filled into several parts, each of
    which repeats it.

    Args:
        sizes: the rows.
        max_tokens: limit of the packed tokens of a micro-batch.

    Returns:
        row indices of each micro-batch, the fullest first; every row is in exactly one.

    Raises:
        ValueError: a single row is longer than ``max_tokens``.
    """
    _check_rows(sizes, max_tokens)
    top, *levels = _tree(sizes)
    for level in reversed(levels):  # branches before what they branch from
        assert level.above is not None
        level.above.parts += [part.in_tree_order() for part in _put_together(level, max_tokens)]
    plan = _put_together(top, max_tokens)
    return [part.rows for part in sorted(plan, key=lambda part: -part.tokens)]


def cut_groups(sizes: Sequence[RowSize], max_tokens: int, at_least: Sequence[int] = ()) -> list[list[list[int]]]:
    """Each group in as few parts as the limit allows.

    Args:
        sizes, max_tokens: as in :func:`plan_micro_batches`.
        at_least: how many parts the first groups of the result have to have, where they have as many rows. Processes that
            agree on it cut their groups alike.

    Returns:
        the groups, those of most parts and then of most tokens first; row indices of each part.

    Raises:
        ValueError: a single row is longer than ``max_tokens``.
    """
    _check_rows(sizes, max_tokens)
    groups = [_plan_some(rows, sizes, max_tokens) for rows in rows_by_group(sizes, range(len(sizes)))]
    groups.sort(key=lambda parts: (-len(parts), -packed_tokens(sizes[i] for part in parts for i in part)))
    for number, (parts, count) in enumerate(zip(groups, at_least, strict=False)):
        most = sum(map(len, parts))
        groups[number] = spread_micro_batches(parts, sizes, max(min(count, most), len(parts)))
    return groups


def plan_parts(
    groups: Sequence[Sequence[Sequence[int]]], sizes: Sequence[RowSize], max_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Micro-batches for parts that reuse one forward of their prompt.

    Args:
        groups: from :func:`cut_groups`, with the same limit.

    Returns:
        row indices of each micro-batch: one for each part of a group that was cut; and those of whole groups, several
        together where they fit.
    """
    whole = [row for parts in groups if len(parts) == 1 for row in parts[0]]
    cut = [list(part) for parts in groups if len(parts) > 1 for part in parts]
    return cut, _plan_some(whole, sizes, max_tokens)


def runs_of_parts(
    plan: Sequence[Sequence[int]], sizes: Sequence[RowSize]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The plan with the parts of a group side by side, and where they are.

    Args:
        plan: row indices of each micro-batch.
        sizes: the rows.

    Returns:
        the micro-batches, groups in several of them first, those in most of them at the front; and ``(first, end)`` of
        each run of micro-batches that hold nothing but one group, which lies in no other micro-batch and has a prompt to
        reuse: the last token of a prompt is forwarded with each response.
    """
    homes: dict[Hashable, list[int]] = {}
    for number, rows in enumerate(plan):
        for group in dict.fromkeys(sizes[row].group for row in rows):
            homes.setdefault(group, []).append(number)
    mixed = {number for number, rows in enumerate(plan) if _holds_several_groups(rows, sizes)}
    cut = [numbers for numbers in homes.values() if len(numbers) > 1 and not mixed.intersection(numbers)]
    cut.sort(key=len, reverse=True)
    order = [number for numbers in cut for number in numbers]
    order += sorted(set(range(len(plan))) - set(order))
    ends = list(itertools.accumulate(map(len, cut)))
    runs = [
        (end - len(numbers), end)
        for end, numbers in zip(ends, cut, strict=True)
        if sizes[plan[numbers[0]][0]].prompt > 1
    ]
    return [list(plan[number]) for number in order], runs


# A plan of one rank that yields what ranks have to agree on: numbers, of each of which it is sent the largest of all ranks.
RankPlan = Generator[list[int], list[int], tuple[list[list[int]], list[tuple[int, int]]]]


def plan_of_rank(sizes: Sequence[RowSize], max_tokens: int) -> RankPlan:
    """The plan of a rank whose parts of a group may reuse its prompt. All ranks get as many micro-batches.

    Ranks cut their groups alike, so that they forward prompts at the same time and none has to wait.

    Args:
        sizes, max_tokens: as in :func:`plan_micro_batches`.

    Yields:
        first how many micro-batches there are without reuse, how many groups are cut, and how many groups there are, times -1;
        where no rank cuts one, and none has fewer groups than there are micro-batches, nothing more. Then the parts of each
        group, then how many micro-batches there are.

    Returns:
        row indices of each micro-batch, and the runs of those that reuse a prompt, see :func:`runs_of_parts`.

    Raises:
        ValueError: a single row is longer than ``max_tokens``.
    """
    plan = plan_micro_batches(sizes, max_tokens)
    parts = cut_groups(sizes, max_tokens)
    count, cut, fewest = yield [len(plan), sum(len(of_group) > 1 for of_group in parts), -len(parts)]
    if not cut and not must_split(count, fewest):
        return spread_micro_batches(plan, sizes, count), []
    at_least = yield [*map(len, parts[:cut]), *[1] * (cut - len(parts))] or [0]
    groups = cut_groups(sizes, max_tokens, at_least)
    in_parts, whole = plan_parts(groups, sizes, max_tokens)
    (count,) = yield [len(in_parts) + len(whole)]
    missing = count - len(in_parts)
    if missing <= sum(map(len, whole)):  # parts stay as they are, alike on all ranks
        plan = in_parts + (spread_micro_batches(whole, sizes, missing) if whole else [])
    else:
        plan = spread_micro_batches(in_parts + whole, sizes, count)
    return runs_of_parts(plan, sizes)


def must_split(count: int, fewest: int) -> bool:
    """Whether ``count`` micro-batches are more than the groups of some rank, -``fewest`` of them, so that one has to be split."""
    return count > -fewest


def finish_plan(
    rank: RankPlan, agreed: list[int], largest: Callable[[list[int]], list[int]]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """What ``rank`` returns.

    Args:
        rank: a :func:`plan_of_rank` that has yielded once.
        agreed: the answer to that.
        largest: gives the largest of each number over all ranks; a collective.
    """
    while True:
        try:
            told = rank.send(agreed)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        agreed = largest(told)


def plan_all_ranks(
    sizes: Sequence[Sequence[RowSize]], max_tokens: Sequence[int]
) -> list[tuple[list[list[int]], list[tuple[int, int]]]]:
    """:func:`plan_of_rank` of every rank with its own limit, by one process that knows the rows of all."""
    ranks = [plan_of_rank(*of_rank) for of_rank in zip(sizes, max_tokens, strict=True)]
    told = [next(rank) for rank in ranks]
    plans: list[tuple[list[list[int]], list[tuple[int, int]]]] = []
    while not plans:
        agreed = [max(values) for values in zip(*told, strict=True)]
        told = []
        for rank in ranks:  # all of them return at the same point
            try:
                told.append(rank.send(agreed))
            except StopIteration as done:
                plans.append(done.value)
    return plans


def _check_rows(sizes: Sequence[RowSize], max_tokens: int) -> None:
    for row, size in enumerate(sizes):
        if size.tokens > max_tokens:
            raise ValueError(
                f"row {row} has {size.prompt} + {size.response} tokens, a micro-batch may hold {max_tokens}: "
                "raise the token budget"
            )


def _plan_some(rows: Sequence[int], sizes: Sequence[RowSize], max_tokens: int) -> list[list[int]]:
    """:func:`plan_micro_batches` of ``rows``, indices into ``sizes``."""
    plan = plan_micro_batches([sizes[row] for row in rows], max_tokens)
    return [[rows[i] for i in micro_batch] for micro_batch in plan]


def spread_micro_batches(plan: Sequence[Sequence[int]], sizes: Sequence[RowSize], count: int) -> list[list[int]]:
    """The plan with ``count`` micro-batches, for processes that must all make the same number of forwards.

    The fullest micro-batch is halved until there are enough, between groups where it holds several, and where rows have
    least in common.

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
            key=lambda rows: (_holds_several_groups(rows, sizes), packed_tokens(sizes[i] for i in rows)),
        )
        spread.remove(fullest)
        cut = min(range(1, len(fullest)), key=lambda cut: _cost_of_cut(fullest, cut, sizes))
        spread += [fullest[:cut], fullest[cut:]]
    return sorted(spread, key=lambda rows: -packed_tokens(sizes[i] for i in rows))


@dataclass
class _Part:
    """Rows that stay together. ``tokens`` are those of their tree, from the root down."""

    rows: list[int]
    tokens: int
    pieces: list[list[int]] = field(default_factory=list)

    def in_tree_order(self) -> _Part:
        """Its pieces in the order of their first rows, instead of that in which they were put together."""
        return _Part([row for piece in sorted(self.pieces, key=lambda piece: piece[0]) for row in piece], self.tokens)


@dataclass
class _Level:
    """A level of the tree: the one above, its tokens and those above, and what is below, bit by bit put together."""

    above: _Level | None
    tokens: int
    parts: list[_Part] = field(default_factory=list)


def _tree(sizes: Sequence[RowSize]) -> list[_Level]:
    """A level of no tokens, and below it those of ``sizes``, each before its branches."""
    top = _Level(None, 0)
    found: dict[Hashable, _Level] = {}
    for row, size in enumerate(sizes):
        level = top
        for name, tokens in size.path:
            level = found.setdefault(name, _Level(level, level.tokens + tokens))
        level.parts.append(_Part([row], level.tokens + size.own))
    return [top, *found.values()]


def _put_together(level: _Level, max_tokens: int) -> list[_Part]:
    """The parts below ``level`` in as few as the limit allows."""
    together: list[_Part] = []
    for part in sorted(level.parts, key=lambda part: (-part.tokens, part.rows[0])):
        added = part.tokens - level.tokens
        fits = (p for p in together if p.tokens + added <= max_tokens)
        home = next(fits, None)
        if home is None:
            together.append(_Part(list(part.rows), part.tokens, [part.rows]))
        else:
            home.rows += part.rows
            home.pieces.append(part.rows)
            home.tokens += added
    return together


def _in_tree_order(sizes: Sequence[RowSize], rows: Sequence[int]) -> list[int]:
    """``rows`` so that those that share most lie side by side, and else in the order of first rows."""
    first: dict[Hashable, int] = {}
    for place, row in enumerate(rows):
        for name, _ in sizes[row].path:
            first.setdefault(name, place)
    places = [[*(first[name] for name, _ in sizes[row].path), place] for place, row in enumerate(rows)]
    return [row for _, row in sorted(zip(places, rows, strict=True))]


def _holds_several_groups(rows: Sequence[int], sizes: Sequence[RowSize]) -> bool:
    return len({sizes[row].group for row in rows}) > 1


def _cost_of_cut(rows: Sequence[int], cut: int, sizes: Sequence[RowSize]) -> tuple[bool, int, int]:
    """Sorts the places to cut ``rows`` at: between groups, where the least is shared, near the middle."""
    before, behind = sizes[rows[cut - 1]], sizes[rows[cut]]
    shared = sum(tokens for (name, tokens), (other, _) in zip(before.path, behind.path, strict=False) if name == other)
    return before.group == behind.group, shared, abs(2 * cut - len(rows))
