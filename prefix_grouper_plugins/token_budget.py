"""How many micro-batches run as one forward, and which prompts outlive it: the plan of an optimizer step's forwards.

Trainers choose the rows of a micro-batch by the memory they have, and a stock micro-batch of ``b`` rows holds ``b`` padded
rows. Where rows share their prompts, several micro-batches fit into as many tokens, and one forward for all of them keeps
the device busier than one for each. A prompt whose rows do not fit into one forward is forwarded once, and stays open for
the forwards that follow. Its graph is kept until the last of them, or its layers run again in the backward, which costs one
more forward of the prompt and leaves its rows more room: the plan takes what costs less. It is pure: it depends on numbers of
tokens alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Packing pays where it saves this share of the tokens of padded rows, or as many tokens for each row.
LEAST_SHARE_SAVED = 0.05
LEAST_SAVED_PER_ROW = 16

# What a forward and its backward cost whatever they hold, in tokens, by the type of the device. On a CPU, in a model of 4 layers with a
# hidden size of 512 (benchmarks/models.py), 19: more in narrower models and less in wider ones.
_COST_OF_FORWARD = {"cpu": 20}
# On a GPU, not measured: a forward and its backward read and write 8 bytes for each weight in half precision, which takes an H100
# (3.35 TB/s, some 400 TFLOP/s) as long as the matrix products of 159 tokens, an A100 (2.0, some 250) as those of 167.
_COST_ELSEWHERE = 160
# Of the graph of a prompt, what is left where its layers run again: their inputs, keys and values twice, and gradients of those.
# With a key head for each query head these are 7 of the some 34 hidden states that a layer keeps, with fewer key heads less.
HELD_OF_RECOMPUTED = 0.25


def cost_of_forward(device: str) -> int:
    """Tokens that take as long as what a forward and its backward cost whatever they hold, on a type of device: ``"cpu"``, ``"cuda"``."""
    return _COST_OF_FORWARD.get(device, _COST_ELSEWHERE)


def held_tokens(prompt_tokens: int, is_recomputed: bool) -> int:
    """What a prompt that stays open counts for in a budget, of its tokens."""
    return math.ceil(HELD_OF_RECOMPUTED * prompt_tokens) if is_recomputed else prompt_tokens


def pays_to_pack(packed: int, padded: int, rows: int) -> bool:
    """Whether a packed row is worth its own costs: laying it out, checks, and attention in pieces.

    On a CPU, in a model of 4 layers, these are what 8 to 20 tokens of each row cost, and less than that in larger models.

    Args:
        packed: tokens of the packed row.
        padded: tokens of the same rows as the trainer pads them.
        rows: how many rows these are.
    """
    return padded - packed >= min(LEAST_SHARE_SAVED * padded, LEAST_SAVED_PER_ROW * rows)


def remark_on_ordinary(ordinary: int, forwards: int) -> str | None:
    """What to say of a first update with ``ordinary`` forwards that did not pay to pack, of all its ``forwards``; None without any."""
    if not ordinary:
        return None
    return (
        f"{ordinary} of {forwards} forwards of the first update took the ordinary path, which is no fallback: packing their "
        f"rows would have saved less than {LEAST_SHARE_SAVED:.0%} of the tokens, and less than {LEAST_SAVED_PER_ROW} of each row"
    )


class RowTokens(NamedTuple):
    """What a row adds to a packed forward.

    Attributes:
        prompt: what it has in common with the rows of its prompt; None where the row is not forwarded.
        prompt_tokens: tokens of the prompt that are forwarded once for all rows, ``P - 1``.
        completion_tokens: tokens of the completion.
        levels: name and tokens of what its completion has in common with others of its prompt, where that is shared.
        images: of the prompt, which a vision tower encodes once for all rows.
    """

    prompt: Hashable
    prompt_tokens: int
    completion_tokens: int
    levels: tuple[tuple[Hashable, int], ...] = ()
    images: int = 0

    @classmethod
    def of(cls, prompt: Hashable, prompt_length: int, completion_length: int) -> RowTokens:
        """A row by its lengths.

        A prompt of one token has nothing to share: its last token is forwarded with each completion.

        Args:
            prompt: equal for rows of one prompt.
            prompt_length, completion_length: in tokens; without a completion the row is not forwarded.
        """
        name = (prompt if prompt_length > 1 else object()) if completion_length else None
        return cls(name, prompt_length - 1, completion_length)


class Most(NamedTuple):
    """What a forward may hold.

    Attributes:
        tokens: open prompts included.
        scored: completion tokens whose logits are kept; None where they are not.
        images: in memory, those of open prompts included; None for no limit.
    """

    tokens: int
    scored: int | None = None
    images: int | None = None


class Forward(NamedTuple):
    """One forward of the plan.

    Attributes:
        micro_batches: those whose rows it takes, by number.
        shared: for each prompt of its rows that other forwards hold too, whether this one is the first of them, which
            forwards it. The rows of each run against its keys; the other rows run together as one packed row.
        held: what the prompts count for that have been forwarded before and are still in memory.
        recomputed: of the prompts that it forwards, those whose layers run again in the backward.
    """

    micro_batches: range
    shared: dict[Hashable, bool]
    held: int
    recomputed: frozenset[Hashable] = frozenset()


def num_that_fit(
    micro_batches: Sequence[Sequence[RowTokens]], budget: int, *, held: int = 0, opened: Collection[Hashable] = ()
) -> int:
    """How many of ``micro_batches``, from the first on, one forward takes: those that fit, and the first in any case.

    Args:
        micro_batches: at least one, in the order in which they run.
        budget: tokens.
        held: tokens that are in memory already, those of open prompts.
        opened: prompts that have been forwarded, and count in ``held``.
    """
    prompts, tokens = set(opened), held
    levels: set[Hashable] = set()
    for number, rows in enumerate(micro_batches):
        for row in rows:
            if row.prompt is None:
                continue
            tokens += row.completion_tokens + (0 if row.prompt in prompts else row.prompt_tokens)
            prompts.add(row.prompt)
            tokens -= sum(shared for name, shared in row.levels if name in levels)
            levels.update(name for name, _ in row.levels)
        if tokens > budget:
            return max(number, 1)
    return len(micro_batches)


class NextForward(NamedTuple):
    """What a forward takes.

    Attributes:
        num_micro_batches: how many of those that come.
        shared: those prompts of their rows that go through a cache, since other forwards hold them too, or since their layers
            run again in the backward; and whether they do.
    """

    num_micro_batches: int
    shared: dict[Hashable, bool]


def next_forward(
    coming: Sequence[Sequence[RowTokens]],
    most: Most,
    group: int,
    *,
    opened: Mapping[Hashable, int] | None = None,
    stays_open: bool = True,
    cost_of_forward: int | None = None,
) -> NextForward:
    """What the forward of the first of ``coming`` takes: micro-batches until it has as many rows as a group, if they fit.

    Args:
        coming: micro-batches that certainly lie in one optimizer step, at least one, in the order in which they run.
        most: what a forward may hold.
        group: rows of a group.
        opened: of each prompt that an earlier forward has left open, what it counts for, see :func:`held_tokens`.
        stays_open: whether prompts may stay open for later forwards.
        cost_of_forward: see :func:`cost_of_forward`; None where layers of prompts may not run again in the backward.
    """
    opened = opened or {}
    count = _num_to_take(coming, most, group, opened)
    shared = dict.fromkeys(prompts_to_share(coming, count, opened, stays_open), False)
    begun = {row.prompt: row for rows in coming[:count] for row in rows if row.prompt in shared.keys() - opened.keys()}
    if cost_of_forward is None or not begun or any(row.images for row in begun.values()):
        return NextForward(count, shared)
    end = 1 + max(number for number, rows in enumerate(coming) if any(row.prompt in begun for row in rows))
    held = [
        {**opened, **{name: held_tokens(row.prompt_tokens, again) for name, row in begun.items()}}
        for again in (False, True)
    ]
    kept, recomputed = (_num_forwards(coming[:end], most, group, of_one) for of_one in held)
    # Of the FLOPs of a forward and its backward, the forward is a third.
    if cost_of_forward * (kept - recomputed) <= sum(row.prompt_tokens for row in begun.values()) / 3:
        return NextForward(count, shared)
    count = _num_to_take(coming, most, group, held[True])
    shared = dict.fromkeys([*begun, *prompts_to_share(coming, count, opened, stays_open)], False)
    return NextForward(count, shared | dict.fromkeys(begun, True))


def _num_to_take(coming: Sequence[Sequence[RowTokens]], most: Most, group: int, opened: Mapping[Hashable, int]) -> int:
    """How many of ``coming`` the next forward takes. Arguments of :func:`next_forward`."""
    may_join = coming[: max(1, math.ceil(group / len(coming[0])))]
    count = num_that_fit(may_join, most.tokens, held=sum(opened.values()), opened=opened)
    if most.scored is not None:
        scored = [[row._replace(prompt_tokens=0, levels=()) for row in rows] for rows in may_join]
        count = min(count, num_that_fit(scored, most.scored))
    if most.images is not None:
        shown = [[RowTokens(row.prompt, row.images, 0) for row in rows] for rows in may_join]
        held = {row.prompt: row.images for rows in coming for row in rows if row.prompt in opened}
        count = min(count, num_that_fit(shown, most.images, held=sum(held.values()), opened=opened))
    return count


def _num_forwards(coming: Sequence[Sequence[RowTokens]], most: Most, group: int, opened: Mapping[Hashable, int]) -> int:
    """How many forwards take all of ``coming`` while ``opened`` stay open."""
    start = number = 0
    while start < len(coming):
        start += _num_to_take(coming[start:], most, group, opened)
        number += 1
    return number


def prompts_to_share(
    coming: Sequence[Sequence[RowTokens]], count: int, opened: Collection[Hashable] = (), stays_open: bool = True
) -> list[Hashable]:
    """Prompts of the first ``count`` of ``coming`` that other forwards hold too, each once. Arguments of :func:`next_forward`."""
    later = {row.prompt for rows in coming[count:] for row in rows} if stays_open else set()
    own = dict.fromkeys(row.prompt for rows in coming[:count] for row in rows)
    return [prompt for prompt in own if prompt is not None and (prompt in opened or prompt in later)]


def forwarded_tokens(
    micro_batches: Sequence[Sequence[RowTokens]], most: Most, group: int, *, cost_of_forward: int | None = None
) -> tuple[int, int]:
    """Tokens that the forwards of :func:`plan_forwards` process, and those that one forward of all rows would.

    They differ where completions have something in common: only prompts stay open from one forward to the next. A second forward
    of a prompt's layers in the backward does not count.
    """
    apart = together = 0
    prompts: set[Hashable] = set()
    levels: set[Hashable] = set()
    for forward in plan_forwards(micro_batches, most, group, cost_of_forward=cost_of_forward):
        own: set[Hashable] = set()
        for row in (row for number in forward.micro_batches for row in micro_batches[number] if row.prompt is not None):
            added = row.completion_tokens + (0 if row.prompt in prompts else row.prompt_tokens)
            apart += added - sum(tokens for name, tokens in row.levels if name in own)
            together += added - sum(tokens for name, tokens in row.levels if name in levels)
            prompts.add(row.prompt)
            own.update(name for name, _ in row.levels)
            levels.update(own)
    return apart, together


def plan_forwards(
    micro_batches: Sequence[Sequence[RowTokens]], most: Most, group: int, *, cost_of_forward: int | None = None
) -> Iterator[Forward]:
    """The forwards of micro-batches that lie in one optimizer step. Arguments of :func:`next_forward`."""
    opened: dict[Hashable, int] = {}
    last = {row.prompt: number for number, rows in enumerate(micro_batches) for row in rows}
    start = 0
    while start < len(micro_batches):
        coming = micro_batches[start:]
        count, shared = next_forward(coming, most, group, opened=opened, cost_of_forward=cost_of_forward)
        taken = range(start, start + count)
        recomputed = frozenset(prompt for prompt, again in shared.items() if again)
        yield Forward(taken, {prompt: prompt not in opened for prompt in shared}, sum(opened.values()), recomputed)
        for row in (row for i in taken for row in micro_batches[i] if row.prompt in shared):
            opened.setdefault(row.prompt, held_tokens(row.prompt_tokens, row.prompt in recomputed))
        start += count
        opened = {prompt: tokens for prompt, tokens in opened.items() if last[prompt] >= start}


class RowsOfProcess(NamedTuple):
    """What one of several processes forwards.

    Attributes:
        micro_batches: its rows.
        most: what a forward of it may hold.
    """

    micro_batches: Sequence[Sequence[RowTokens]]
    most: Most


class MatchedForward(NamedTuple):
    """One forward of the plan of several processes. They run equally many prompts, and then equally many parts of rows.

    Attributes:
        micro_batches: those whose rows it takes, by number; the same on all processes.
        prompts: of each prompt that is forwarded before the rows, the number of the forward in which it closes, in order.
        shared: for each process, the prompts of its rows that other forwards hold too, and when they close.
        num_parts: on the process that has most, the prompts in ``shared``, each with its rows, and the other rows together.
    """

    micro_batches: range
    prompts: Sequence[int]
    shared: Sequence[Mapping[Hashable, int]]
    num_parts: int


def matched_forwards(
    processes: Sequence[RowsOfProcess], group: int, *, stays_open: bool = True
) -> list[MatchedForward]:
    """The forwards of an optimizer step on processes that have to make equally many, as where parameters are sharded.

    A forward takes as many micro-batches as fit on each of them. Every process can work out the plan of all.

    Args:
        processes: with equally many micro-batches, all of them in one optimizer step.
        group, stays_open: as in :func:`next_forward`.
    """
    found: list[tuple[range, list[list[Hashable]]]] = []
    opened: list[dict[Hashable, int]] = [{} for _ in processes]
    last = [{row.prompt: i for i, rows in enumerate(own.micro_batches) for row in rows} for own in processes]
    start = 0
    while start < len(processes[0].micro_batches):
        coming = [own.micro_batches[start:] for own in processes]
        count = min(
            next_forward(rows, own.most, group, opened=held, stays_open=stays_open).num_micro_batches
            for rows, own, held in zip(coming, processes, opened, strict=True)
        )
        shared = [prompts_to_share(rows, count, held, stays_open) for rows, held in zip(coming, opened, strict=True)]
        found.append((range(start, start + count), shared))
        start += count
        for number, (rows, prompts) in enumerate(zip(coming, shared, strict=True)):
            taken = (row for of_one in rows[:count] for row in of_one if row.prompt in prompts)
            opened[number] |= {row.prompt: row.prompt_tokens for row in taken}
            opened[number] = {key: size for key, size in opened[number].items() if last[number][key] >= start}
    return _matched(processes, found)


def _matched(
    processes: Sequence[RowsOfProcess], found: Sequence[tuple[range, list[list[Hashable]]]]
) -> list[MatchedForward]:
    """The forwards of :func:`matched_forwards`, by their micro-batches and the prompts that each process shares in them."""
    ends = [
        {key: number for number, (_, shared) in enumerate(found) for key in shared[process]}
        for process in range(len(processes))
    ]
    begun: list[set[Hashable]] = [set() for _ in processes]
    plan = []
    for taken, shared in found:
        prompts: Counter[int] = Counter()
        num_parts = 1
        for process, keys in enumerate(shared):
            prompts |= Counter(ends[process][key] for key in keys if key not in begun[process])
            begun[process].update(keys)
            own = {row.prompt for i in taken for row in processes[process].micro_batches[i]}
            num_parts = max(num_parts, len(keys) + bool(own - {None, *keys}))
        of_all = [{key: ends[process][key] for key in keys} for process, keys in enumerate(shared)]
        plan.append(MatchedForward(taken, sorted(prompts.elements()), of_all, num_parts))
    return plan
