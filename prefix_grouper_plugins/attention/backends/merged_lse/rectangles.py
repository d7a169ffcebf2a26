"""The rectangles of a forest: which queries see all of which keys of another segment. And its chains, which need none."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import numpy as np

from prefix_grouper_plugins.forest import Forest


class Rectangle(NamedTuple):
    """Queries ``[q0, q1)`` on keys ``[k0, k1)``, by packed position and never empty.

    Rectangles of one ``level`` of the tree have disjoint queries and disjoint keys.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    level: int


class Chains(NamedTuple):
    """Segments that continue each other: a segment, its first child, that one's first child, and so on, as far as they go.

    In packed order they lie one behind the other, so they are one causal triangle: a prompt and its first response need
    no rectangle between them. Each token is in one chain.

    Attributes:
        start, end (`int64 [C]`): tokens of each chain.
        depth (`int64 [C]`): of its first token, the number of keys above the chain.
        top (`int64 [C]`): its first segment.
    """

    start: np.ndarray
    end: np.ndarray
    depth: np.ndarray
    top: np.ndarray


def chains(forest: Forest) -> Chains:
    """The chains of a forest that have queries, in packed order. Those before them are given as a whole."""
    top = np.flatnonzero(_is_top(forest))
    end = np.append(forest.start[top[1:]], forest.num_tokens)
    top, end = top[end > forest.num_given], end[end > forest.num_given]
    return Chains(forest.start[top], end, forest.depth[top], top)


def chain_ends(forest: Forest) -> np.ndarray:
    """``int64 [S]``: where the chain of each segment ends."""
    is_top = _is_top(forest)
    return np.append(forest.start[is_top][1:], forest.num_tokens)[np.cumsum(is_top) - 1]


def _is_top(forest: Forest) -> np.ndarray:
    """Whether a segment is not the first child of another, which in pre-order is the one in front of it."""
    return (forest.parent < 0) | (forest.parent != np.arange(len(forest.parent)) - 1)


def copied_above(forest: Forest, copied: Set[int]) -> list[tuple[int, ...]]:
    """For each chain the segments above it whose keys are copied for it, from the root down.

    They end at a segment that is not copied: its rectangle has the copied keys above it too, see `rectangles_and_copies`.

    Args:
        forest: of the layout.
        copied: levels of the tree whose segments are copied, for all that is not in their own chain. All or none of them
            where tokens are given.
    """
    below: list[tuple[int, ...]] = [()] * (
        len(forest.parent) + 1
    )  # for what hangs on each segment; the last one for roots
    for s, (parent, level) in enumerate(zip(forest.parent.tolist(), forest.level.tolist(), strict=True)):
        if level in copied:
            below[s] = (*below[parent], s)
    return [below[parent] for parent in forest.parent[chains(forest).top].tolist()]


def rectangles_and_copies(forest: Forest, copied: Set[int]) -> list[Rectangle]:
    """The rectangles of all segments that are not copied; each has the copied keys above its segment too.

    Keys count as they lie with copies: one chain behind the other, and each chain behind what `copied_above` says.
    """
    found = [r for r in rectangles(forest, chain_ends(forest)) if r.level not in copied]
    if not copied or not found:
        return found
    entries = chains(forest)
    lengths = forest.end - forest.start
    extra = np.array([int(lengths[list(above)].sum()) for above in copied_above(forest, copied)])
    own = np.cumsum(extra + entries.end - entries.start) - (
        entries.end - entries.start
    )  # the first of a chain's own keys
    moved = []
    for rectangle in found:
        chain = int(np.searchsorted(entries.start, rectangle.k0, side="right")) - 1
        segment, top = int(np.searchsorted(forest.start, rectangle.k0)), int(entries.top[chain])
        while segment > top and int(forest.level[segment - 1]) in copied:  # its parent, in the same chain
            segment -= 1
        by = int(own[chain] - entries.start[chain])
        in_front = int(extra[chain]) if segment == top else 0
        moved.append(rectangle._replace(k0=int(forest.start[segment]) + by - in_front, k1=rectangle.k1 + by))
    return moved


def rectangles(forest: Forest, behind: np.ndarray | None = None) -> list[Rectangle]:
    """One for each inner segment, in packed order: its descendants on its keys.

    Given tokens have no queries, so neighbouring given segments of which the same queries see all keys, a prompt of
    several segments, make one rectangle.

    Args:
        forest: of the layout.
        behind: ``[S]``, where the triangle of each segment ends, and its rectangle begins: by default where it ends itself,
            `chain_ends` where chains are triangles.
    """
    found: list[Rectangle] = []
    columns = (forest.start, forest.end, forest.end if behind is None else behind, forest.subtree_end, forest.level)
    for start, end, first, last, level in zip(*(x.tolist() for x in columns), strict=True):
        first = max(first, forest.num_given)
        if last <= first:
            continue
        before = found[-1] if found and start < forest.num_given else None
        if before is not None and (before.q0, before.q1, before.k1) == (first, last, start):
            found[-1] = Rectangle(first, last, before.k0, end, level)
        else:
            found.append(Rectangle(first, last, start, end, level))
    return found
