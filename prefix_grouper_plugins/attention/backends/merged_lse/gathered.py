"""Which keys are copied for the chains below them, so that fewer partial outputs have to be merged.

A chain of segments (`rectangles.Chains`) is an entry of the causal call: its queries, on its own keys. The keys of the segments
above it are either a rectangle, a call of its own whose outputs are merged, or they are copied in front of the chain's own, as
rows would hold them: the call is causal to the bottom right, so its queries see all of them. Copies move fewer bytes where
a segment is short beside what lies below it, such as the prompt before long responses, or the beginning that all prompts of a
chat template share. `copied_forward` and `copied_backward` count the bytes (docs/cuda.md derives the counts), and choose the
levels of the tree whose segments are copied. With all of them copied nothing is merged. Gradients of the copies of a key
are added up in float32, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse.merge import sum_copies
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import (
    chains,
    copied_above,
    rectangles_and_copies,
)
from prefix_grouper_plugins.attention.device import upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest

Levels = frozenset[int]
NONE: Levels = frozenset()


class Copies(NamedTuple):
    """Keys of all chains, one chain behind the other, each behind the copies that are made for it.

    Attributes:
        key_of: ``IntTensor[C]``, the key behind each of them.
        places: ``IntTensor[C]``, places among them, ordered by the key behind them.
        first: ``IntTensor[T + 1]``, where the places of each key begin in ``places``.
    """

    key_of: Tensor
    places: Tensor
    first: Tensor

    def of(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``[C, ...]`` each, the copies of keys and values, ``[T, ...]``."""
        return key.index_select(0, self.key_of), value.index_select(0, self.key_of)

    def undo(self, copies: Tensor) -> Tensor:
        """``[T, ...]``, the keys or values that ``copies [C, ...]`` were made of; zero for those without any, which no query sees."""
        return copies.new_zeros((len(self.first) - 1, *copies.shape[1:])).index_copy_(0, self.key_of.long(), copies)

    def sum(self, grad: Tensor) -> Tensor:
        """``[T, ...]``, the gradient of keys or values from that of their copies, ``grad [C, ...]``, in its dtype."""
        return sum_copies(grad, self.key_of, self.places, self.first)


class Traffic(NamedTuple):
    """What the ways differ by, in rows: how many of them the passes other than the flash kernels go over.

    Attributes:
        queries, tokens: queries and keys of the forest.
        reached: queries of all rectangles.
        shared: keys of all rectangles.
        gathered: keys and copies of keys that are put one behind the other; 0 where the keys are taken as they lie.
        levels: levels of the tree that have rectangles, each of which is a call.
    """

    queries: int
    tokens: int
    reached: int
    shared: int
    gathered: int
    levels: int

    @property
    def copied(self) -> int:
        """How many more keys there are with copies than without."""
        return self.gathered - self.tokens if self.gathered else 0

    def forward(self, heads: int, kv_heads: int) -> int:
        """Bytes of a forward, for one element of a head in half precision.

        Per reached query and head: the level's call reads q and writes a partial output (4), the merge reads two and writes
        one (6). With more than one level, outputs are widened to float32 and narrowed again (12 per query), and a merge moves
        10. Where keys are copied: K and V are read and written (8 per key of the copies and key head), and the flash
        kernel reads the copies too (4).
        """
        merged = heads * (10 * self.reached if self.levels < 2 else 14 * self.reached + 12 * self.queries)
        return merged + self._gathering(kv_heads)

    def backward(self, heads: int, kv_heads: int, saved: bool = False) -> int:
        """The same, of a backward; ``saved`` where the forward has saved the copies that it takes.

        Per reached query and head: the level's call reads dO and O for delta (4), clears and converts the float32 dq (10), and dq
        is added (6). Per shared key: dk and dv of each query head, where heads are grouped, are written and read again
        (8), their sums written (4) and added (12). With more than one level, dq, dk and dv are widened and narrowed again (12
        per query and head, 24 per key and key head), and additions move 10 and 20. Where keys are copied, their gradients
        are summed over query heads (8 and 4 per copied key), then read (4 per key of the copies) and their sums
        written (4 per key).
        """
        per_head = 8 * heads if heads != kv_heads else 0
        if self.levels < 2:
            merged = 20 * heads * self.reached + (per_head + 16 * kv_heads) * self.shared
        else:
            merged = heads * (24 * self.reached + 12 * self.queries)
            merged += (per_head + 24 * kv_heads) * self.shared + 24 * kv_heads * self.tokens
        if not self.gathered:
            return merged
        sums = kv_heads * (4 * self.copied + 4 * self.gathered + 4 * self.tokens)
        return merged + self._gathering(kv_heads, saved) + per_head * self.copied + sums

    def _gathering(self, kv_heads: int, saved: bool = False) -> int:
        return kv_heads * (4 * self.copied if saved else 8 * self.gathered + 4 * self.copied)


def traffic(forest: Forest, copied: Levels = NONE) -> Traffic:
    """The counts of a forest where the segments of these levels are copied."""
    found = rectangles_and_copies(forest, copied)
    lengths = forest.end - forest.start
    extra = sum(int(lengths[list(above)].sum()) for above in copied_above(forest, copied)) if copied else 0
    entries = chains(forest)
    return Traffic(
        forest.num_queries,
        forest.num_tokens,
        sum(r.q1 - r.q0 for r in found),
        sum(r.k1 - r.k0 for r in found),
        int((entries.end - entries.start).sum()) + extra if copied else 0,
        len({r.level for r in found}),
    )


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def copied_forward(forest: Forest, heads: int, kv_heads: int) -> Levels:
    """The levels whose segments a forward copies, so that it moves the fewest bytes; none where nothing is shared.

    The copies of keys and values take at most two and a half times the memory of the output.
    """
    most = 5 * heads * forest.num_queries // (4 * kv_heads)
    return _cheapest(forest, lambda counts: counts.forward(heads, kv_heads), most - forest.num_tokens)


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def copied_backward(forest: Forest, heads: int, kv_heads: int) -> Levels:
    """The same of a backward. Gradients of copies are made for each query head, so there are at most as many copies as keys."""
    return _cheapest(forest, lambda counts: counts.backward(heads, kv_heads), forest.num_tokens)


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def copied_in_both(forest: Forest, heads: int, kv_heads: int) -> Levels:
    """The levels that forward and backward copy; none where they do not copy the same ones.

    None, too, where the keys with their copies are not more than the keys, as where no query sees some of them: by their
    number the two are told apart.
    """
    copied = copied_forward(forest, heads, kv_heads)
    if copied != copied_backward(forest, heads, kv_heads) or traffic(forest, copied).copied <= 0:
        return NONE
    return copied


def _cheapest(forest: Forest, cost: Callable[[Traffic], int], most: int) -> Levels:
    """The levels to copy, of all ways that make at most ``most`` copies: none, or some from the top, or from the bottom."""
    levels = sorted({r.level for r in rectangles_and_copies(forest, NONE)})
    best, least = NONE, cost(traffic(forest))
    if not levels:
        return best
    parts = range(1, len(levels)) if not forest.num_given else ()  # given keys are copied as a whole
    every = range(int(forest.level.max()) + 1)
    for way in map(frozenset, [*(levels[:n] for n in parts), *(levels[n:] for n in parts), every]):
        counts = traffic(forest, way)
        if counts.copied <= most and cost(counts) < least:
            best, least = way, cost(counts)
    return best


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def copies_of(forest: Forest, copied: Levels, device: torch.device, stream: int = 0) -> Copies:
    """The copies of a forest, made and uploaded once for all layers."""
    entries = chains(forest)
    index: list[np.ndarray] = []
    for first, end, above in zip(
        entries.start.tolist(), entries.end.tolist(), copied_above(forest, copied), strict=True
    ):
        index += [np.arange(forest.start[segment], forest.end[segment]) for segment in above]
        index.append(np.arange(first, end))
    key_of = np.concatenate(index)
    first_place = np.concatenate(([0], np.cumsum(np.bincount(key_of, minlength=forest.num_tokens))))
    tables = [key_of, np.argsort(key_of, kind="stable"), first_place]
    padded = [np.pad(table, (0, -len(table) % 4)) for table in tables]  # each begins at 16 bytes
    parts = upload(np.concatenate(padded).astype(np.int32), device).split([len(table) for table in padded])
    return Copies(*(part[: len(table)] for part, table in zip(parts, tables, strict=True)))
