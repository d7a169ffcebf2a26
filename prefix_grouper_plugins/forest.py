"""The segments of a layout on the host, in numpy: depth, level and subtree of each, and how many pairs are visible.

Every plan (tiles, varlen calls, scans) is a pure function of the segments, which always live on the CPU, so planning
never waits for a device. All layers of a model ask for the same plans, hence the caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Layouts kept in each cache: the micro-batches of a step and their recomputation, not a whole epoch.
CACHED_LAYOUTS = 64


class Forest:
    """The segments of a layout as numpy arrays, with the depth that sliding windows are measured in.

    A token's depth is the position it has in its row, derived from the tree: a root starts at 0, a child where its
    parent ends. ``position_ids`` are not used, for integrations put offsets into them.

    The first ``num_given`` tokens may be *given*: their keys and values are known from an earlier forward, so they have
    no queries. Query tensors then begin at packed position ``num_given``.

    Attributes:
        num_tokens (`int`): ``T``, tokens with keys.
        num_given, num_queries (`int`): tokens without queries, which all come first, and tokens with queries.
        start, end, parent, subtree_end (`int64 [S]`): the columns of ``layout.segments``.
        depth (`int64 [S]`): depth of the first token of each segment.
        level (`int64 [S]`): number of ancestors of each segment.
        token_depth, token_subtree_end (`int64 [T]`): depth and subtree end of each token.
        deepest_row (`int`): tokens on the longest path from a root; a window that wide hides nothing.
        is_one_row (`bool`): nothing branches, so every token sees all tokens before it.
    """

    def __init__(self, segments: np.ndarray, num_given: int = 0) -> None:
        """
        Args:
            segments: ``[S, 4]`` integers, ``start, end, parent, subtree_end`` in depth-first pre-order.
            num_given: leading tokens without queries: whole segments, and not all of them.

        Raises:
            ValueError: ``num_given`` does not end a segment, or leaves no query.
        """
        self.start, self.end, self.parent, self.subtree_end = segments.astype(np.int64).T
        self.depth = np.zeros_like(self.start)
        self.level = np.zeros_like(self.start)
        lengths = self.end - self.start
        for s, parent in enumerate(self.parent.tolist()):
            if parent >= 0:  # pre-order: the parent is done
                self.depth[s] = self.depth[parent] + lengths[parent]
                self.level[s] = self.level[parent] + 1
        segment_of = np.repeat(np.arange(len(self.start)), lengths)
        self.num_tokens = int(self.end[-1])
        self.token_depth = np.arange(self.num_tokens) - self.start[segment_of] + self.depth[segment_of]
        self.token_subtree_end = self.subtree_end[segment_of]
        self.deepest_row = int((self.depth + lengths).max())
        self.is_one_row = bool((self.subtree_end == self.num_tokens).all())
        if num_given and num_given not in self.end[:-1]:
            raise ValueError(
                f"num_given={num_given} is not where one of the segments but the last ends ({self.end[:-1].tolist()}): "
                "give whole segments, and leave at least one that has queries"
            )
        self.num_given, self.num_queries = num_given, self.num_tokens - num_given

    def effective_window(self, window: int | None) -> int | None:
        """``window``, or None where it is wide enough to hide nothing in this forest."""
        return None if window is None or window >= self.deepest_row else window


def forest_of(segments: Tensor, num_given: int = 0) -> Forest:
    """The `Forest` of ``segments`` (``IntTensor[S, 4]`` on the CPU), cached by content.

    Args:
        segments: as in `PrefixLayout`.
        num_given: leading tokens that have no queries, see `Forest`.

    Raises:
        ValueError: ``segments`` is not on the CPU, where reading it would wait for the device, or ``num_given`` does
            not fit the segments.
    """
    if not segments.is_cpu:
        raise ValueError(f"segments are on {segments.device}: keep layout.segments on the CPU, where plans are made")
    if segments.dtype != torch.int32:
        segments = segments.detach().to(torch.int32)
    return _forest(segments.numpy().tobytes(), num_given)


@lru_cache(maxsize=CACHED_LAYOUTS)
def _forest(table: bytes, num_given: int) -> Forest:
    return Forest(np.frombuffer(table, dtype=np.int32).reshape(-1, 4), num_given)


def visible_pairs(segments: Tensor, sliding_window: int | None = None, num_given: int = 0) -> int:
    """Pairs of a query and a key that it sees, for one head: what attention over a forest has to compute.

    Args:
        segments: ``IntTensor[S, 4]`` on the CPU, as in `PrefixLayout`.
        sliding_window: tokens that a query sees, itself included; None for all.
        num_given: leading tokens that have no queries.
    """
    forest = forest_of(segments, num_given)
    first = forest.depth[forest.start >= num_given]
    length = (forest.end - forest.start)[forest.start >= num_given]
    both = zip(first.tolist(), length.tolist(), strict=True)
    return sum(_pairs(depth + tokens, sliding_window) - _pairs(depth, sliding_window) for depth, tokens in both)


def visible_pairs_of_rows(row_lengths: Iterable[int], sliding_window: int | None = None) -> int:
    """The same for causal attention over each row alone."""
    return sum(_pairs(length, sliding_window) for length in row_lengths)


def _pairs(length: int, sliding_window: int | None) -> int:
    """Of one row: the query at position ``d`` sees ``min(d + 1, sliding_window)`` keys."""
    near = length if sliding_window is None else min(length, sliding_window)
    return near * (near + 1) // 2 + (length - near) * near
