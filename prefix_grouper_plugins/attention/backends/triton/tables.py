"""Tables of the Triton kernels: for each block of queries the spans of keys that it sees, and the reverse for dK and dV.

Visible(q, k) iff ``k <= q < subtree_end[k]``, so what a block sees is a few contiguous *spans*: the segments above it,
of which all of its queries see all keys (*full*: no mask needed), and its own diagonal (*masked*). Spans are in tokens,
so one table serves kernels of every tile size. They follow from the segments by interval arithmetic on the host, in
``O(T / TABLE_BLOCK * depth + S)`` without a window; with one, the key side adds the segments below each block.

dK and dV of a short prefix with many responses are sums over thousands of queries for a handful of key blocks. So the
queries of a key block are shared out over several *items*, which write partial sums into *slots* in float32; a second
pass adds the slots of a block in their order. Split-K is the usual name; nothing here depends on the device, hence the
same sums on each GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.device import upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest

# Tables begin at multiples of so many numbers. Triton compiles a kernel anew for each set of pointers that are multiples of
# 16 bytes and others that are not, so tables laid end to end would compile it up to eight times, one layout or another.
ALIGNMENT = 16 // 4
# Tokens of a block in the tables. Tiles of the kernels divide it; full spans are multiples of it.
TABLE_BLOCK = 128
# An item has at least this many queries: below, writing and adding partial sums costs more than it spreads.
SHORTEST_ITEM = 1024
# Queries of all items and key heads together, divided by this, make the longest item: about two for each
# multiprocessor of a large GPU, and a bound on the memory of partial sums.
PROGRAMS = 256


class Blocks(NamedTuple):
    """Spans by block, as numpy ``int32``. Blocks and spans of queries are counted from the first query, past given tokens.

    Attributes:
        rows: ``[N, 5]``: block, first full span, first masked span, end of its spans, slot (-1: no partial sums). The
            rows with most work come first, so that the last programs of a launch are short ones.
        spans: ``[M, 2]``: first token and end.
    """

    rows: np.ndarray
    spans: np.ndarray


class Tables(NamedTuple):
    """What the kernels read, ``int32`` on the device.

    Attributes:
        subtree_end, depth: ``[T]``, of each token.
        query_rows, key_spans: `Blocks` of queries, with spans of keys.
        key_rows, query_spans: `Blocks` of keys, with spans of queries; a row is an item.
        split_rows: ``[N, 3]``: block of keys, its first slot, number of slots.
        num_slots: slots of all blocks together.
    """

    subtree_end: Tensor
    depth: Tensor
    query_rows: Tensor
    key_spans: Tensor
    key_rows: Tensor
    query_spans: Tensor
    split_rows: Tensor
    num_slots: int


@lru_cache(maxsize=CACHED_LAYOUTS)
def tables(forest: Forest, window: int | None, kv_heads: int, device: torch.device, stream: int) -> Tables:
    """The tables of a forest, made and uploaded once for all layers, without waiting for the device.

    ``stream``: the one they are uploaded on, see `stream_of`.
    """
    queries = query_blocks(forest, window)
    keys, split_rows = key_items(forest, window, kv_heads)
    per_token = (forest.token_subtree_end, forest.token_depth)
    parts = [*per_token, queries.rows, queries.spans, keys.rows, keys.spans, split_rows]
    padded = [np.pad(part.ravel(), (0, -part.size % ALIGNMENT)) for part in parts]
    flat = upload(np.concatenate(padded).astype(np.int32), device)
    views = flat.split([part.size for part in padded])
    ends, depth, *blocks = (view[: part.size].view(part.shape) for view, part in zip(views, parts, strict=True))
    query_rows, key_spans, key_rows, query_spans, split = blocks
    num_slots = int(split_rows[:, 2].sum())
    return Tables(ends, depth, query_rows, key_spans, key_rows, query_spans, split, num_slots)


def query_blocks(forest: Forest, window: int | None) -> Blocks:
    """For each block of queries the spans of keys that any of them sees."""
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    for q0, q1, shallowest, deepest, _, _ in _edges(forest, forest.num_given):
        pieces: list[tuple[int, int, bool]] = [(q0, q1, False)]
        segment = int(np.searchsorted(forest.start, q0, side="right")) - 1
        while segment >= 0:  # up the tree: everything before q0 that a query of this block sees is on this path
            start, last = int(forest.start[segment]), int(forest.subtree_end[segment])
            end = min(int(forest.end[segment]), q0)
            seen = inside = start
            if window is not None:
                offset = int(forest.depth[segment]) - start  # depth of a key = its packed position + offset
                seen = min(max(start, shallowest - window + 1 - offset), end)
                inside = min(max(start, deepest - window + 1 - offset), end)
            if last < q1:  # the subtree ends within the block
                inside = end
            pieces += [(inside, end, True), (seen, inside, False)]
            segment = int(forest.parent[segment])
        blocks.append(_joined(np.array(pieces[::-1], dtype=np.int64)))
    return _packed([(block, full, masked, -1) for block, (full, masked) in enumerate(blocks)])


def key_items(forest: Forest, window: int | None, kv_heads: int) -> tuple[Blocks, np.ndarray]:
    """For each block of keys the spans of queries that see any of them, shared out over items; and ``split_rows``."""
    blocks = [_joined(_from_first_query(forest, _queries_of(forest, window, edges))) for edges in _edges(forest, 0)]
    work = np.array([sum(_length(spans) for spans in block) for block in blocks])
    longest = max(SHORTEST_ITEM, int(work.sum()) * kv_heads // PROGRAMS)
    items: list[tuple[int, np.ndarray, np.ndarray, int]] = []
    split_rows: list[tuple[int, int, int]] = []
    slots = 0
    for block, (full, masked) in enumerate(blocks):
        count = -(-int(work[block]) // longest)
        if count <= 1:
            items.append((block, full, masked, -1))
            continue
        shares = _shares(full, masked, -(-int(work[block]) // count))
        items += [(block, *share, slots + i) for i, share in enumerate(shares)]
        split_rows.append((block, slots, len(shares)))
        slots += len(shares)
    return _packed(items), np.array(split_rows, dtype=np.int64).reshape(-1, 3)


def _edges(forest: Forest, first: int) -> list[tuple[int, int, int, int, int, int]]:
    """For each block from token ``first`` on: first token, end, least and greatest depth, least and greatest subtree end of its tokens."""
    starts = np.arange(first, forest.num_tokens, TABLE_BLOCK)
    columns = [starts, np.minimum(starts + TABLE_BLOCK, forest.num_tokens)]
    for values in (forest.token_depth, forest.token_subtree_end):
        columns += [np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _queries_of(forest: Forest, window: int | None, edges: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """Pieces ``[N, 3]`` (first query, end, full) for one block of keys: diagonal, then what lies below it."""
    k0, k1, shallowest, deepest, nearest_end, last = edges
    if window is None:
        inside = max(nearest_end, k1)
        return np.array([(k0, k1, False), (k1, inside, True), (inside, last, False)])
    segments = slice(
        int(np.searchsorted(forest.start, k0, side="right")) - 1, int(np.searchsorted(forest.start, last, side="left"))
    )
    start, end, depth = forest.start[segments], forest.end[segments], forest.depth[segments]
    first = np.maximum(start, k0)
    behind = np.maximum(first, k1)
    # Depth of a query = its packed position - start + depth of its segment; it sees a key less than `window` above it.
    seen = np.minimum(np.minimum(end, last), start - depth + deepest + window)
    inside = np.maximum(np.minimum(np.minimum(end, nearest_end), start - depth + shallowest + window), behind)
    no, yes = np.zeros_like(start), np.ones_like(start)
    pieces = [(first, np.minimum(behind, seen), no), (behind, inside, yes), (inside, seen, no)]
    return np.stack([np.stack(piece, axis=1) for piece in pieces], axis=1).reshape(-1, 3)


def _from_first_query(forest: Forest, pieces: np.ndarray) -> np.ndarray:
    """``pieces`` of packed positions counted from the first query, less given tokens; some become empty."""
    return np.concatenate([np.maximum(pieces[:, :2] - forest.num_given, 0), pieces[:, 2:]], axis=1)


def _joined(pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Full and masked spans, ``[N, 2]`` each, that cover ``pieces`` ``[N, 3]`` (ordered, disjoint; some empty).

    Neighbours become one span, full spans are cut to whole blocks, and the rest of them counts as masked. Masked spans
    may take in tokens between them that nobody sees: their mask is exact.
    """
    pieces = pieces[pieces[:, 1] > pieces[:, 0]]
    pieces = _merged(pieces, True, 0)
    cut = np.where(pieces[:, 2] == 1, pieces[:, 0] + (pieces[:, 1] - pieces[:, 0]) // TABLE_BLOCK * TABLE_BLOCK, 0)
    cut = np.maximum(cut, pieces[:, 0])
    whole = np.stack([pieces[:, 0], cut, np.ones_like(cut)], axis=1)
    rest = np.stack([cut, pieces[:, 1], np.zeros_like(cut)], axis=1)
    pieces = np.stack([whole, rest], axis=1).reshape(-1, 3)
    pieces = _merged(pieces[pieces[:, 1] > pieces[:, 0]], False, TABLE_BLOCK // 2)
    full = pieces[:, 2] == 1
    return pieces[full, :2], pieces[~full, :2]


def _merged(pieces: np.ndarray, full: bool, gap: int) -> np.ndarray:
    """``pieces`` with neighbours of kind ``full`` made one where at most ``gap`` tokens lie between them."""
    if len(pieces) < 2:
        return pieces
    alike = (pieces[1:, 2] == full) & (pieces[:-1, 2] == full) & (pieces[1:, 0] - pieces[:-1, 1] <= gap)
    firsts = np.flatnonzero(np.concatenate(([True], ~alike)))
    lasts = np.concatenate((firsts[1:], [len(pieces)])) - 1
    return np.stack([pieces[firsts, 0], pieces[lasts, 1], pieces[firsts, 2]], axis=1)


def _length(spans: np.ndarray) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _shares(full: np.ndarray, masked: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Full and masked spans cut into shares of about ``size`` queries each; full spans are cut at whole blocks."""
    size = -(-size // TABLE_BLOCK) * TABLE_BLOCK
    shares: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = [([], [])]
    left = size
    for kind, spans in enumerate((full, masked)):
        for first, end in spans.tolist():
            while first < end:
                if left <= 0:
                    shares.append(([], []))
                    left = size
                step = min(end - first, -(-left // TABLE_BLOCK) * TABLE_BLOCK)
                shares[-1][kind].append((first, first + step))
                first, left = first + step, left - step
    return [(np.array(full).reshape(-1, 2), np.array(masked).reshape(-1, 2)) for full, masked in shares]


def _packed(items: list[tuple[int, np.ndarray, np.ndarray, int]]) -> Blocks:
    """``(block, full spans, masked spans, slot)`` as `Blocks`, most work first."""
    items = sorted(items, key=lambda item: -_length(item[1]) - _length(item[2]))
    rows: list[tuple[int, int, int, int, int]] = []
    done = 0
    for block, full, masked, slot in items:
        middle = done + len(full)
        rows.append((block, done, middle, middle + len(masked), slot))
        done = middle + len(masked)
    spans = np.concatenate([spans for _, full, masked, _ in items for spans in (full, masked)])
    return Blocks(np.array(rows, dtype=np.int32), spans.astype(np.int32))
