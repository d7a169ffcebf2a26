"""The rectangles of a forest: which queries see all of which keys of another segment."""

from __future__ import annotations

from typing import NamedTuple

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


def rectangles(forest: Forest) -> list[Rectangle]:
    """One for each inner segment, in packed order: its descendants on its keys.

    Given tokens have no queries, so neighbouring given segments of which the same queries see all keys, a prompt of
    several segments, make one rectangle.
    """
    found: list[Rectangle] = []
    columns = (forest.start, forest.end, forest.subtree_end, forest.level)
    for start, end, last, level in zip(*(x.tolist() for x in columns), strict=True):
        first = max(end, forest.num_given)
        if last <= first:
            continue
        before = found[-1] if found and start < forest.num_given else None
        if before is not None and (before.q0, before.q1, before.k1) == (first, last, start):
            found[-1] = Rectangle(first, last, before.k0, end, level)
        else:
            found.append(Rectangle(first, last, start, end, level))
    return found
