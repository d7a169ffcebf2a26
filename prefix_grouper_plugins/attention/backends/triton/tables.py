"""Tables of the Triton kernels: for each block of queries the spans of keys that it sees, and the reverse for dK and dV.

Visible(q, k) iff ``k <= q < subtree_end[k]``, so what a block sees is a few contiguous *spans*: the segments above it,
of which all of its queries see all keys (*full*: no mask needed), and its own diagonal (*masked*). Spans are in tokens,
so one table serves kernels of every tile size. They follow from the segments by interval arithmetic on the host, in
``O(T / TABLE_BLOCK * depth + S)`` without a window; with one, the key side adds the segments below each block. All blocks
are computed together, a level of the tree at a time: loops over blocks took longer than the kernels of a short call.

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


class _Edges(NamedTuple):
    """For each block of tokens, ``int64 [N]``: first token and end, least and greatest depth, least and greatest subtree end."""

    first: np.ndarray
    end: np.ndarray
    shallowest: np.ndarray
    deepest: np.ndarray
    nearest_end: np.ndarray
    last: np.ndarray


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
    edges = _edges(forest, forest.num_given)
    block = np.arange(len(edges.first))
    pieces = [_pieces(block, edges.first, edges.end, False)]
    segment = np.searchsorted(forest.start, edges.first, side="right") - 1
    while len(block):  # up the tree: everything before a block that its queries see is on this path
        start = forest.start[segment]
        end = np.minimum(forest.end[segment], edges.first[block])
        seen = inside = start
        if window is not None:
            offset = forest.depth[segment] - start  # depth of a key = its packed position + offset
            seen = np.clip(edges.shallowest[block] - window + 1 - offset, start, end)
            inside = np.clip(edges.deepest[block] - window + 1 - offset, start, end)
        inside = np.where(forest.subtree_end[segment] < edges.end[block], end, inside)  # it ends within the block
        pieces += [_pieces(block, inside, end, True), _pieces(block, seen, inside, False)]
        above = forest.parent[segment]
        block, segment = block[above >= 0], above[above >= 0]
    spans = _joined(np.concatenate(pieces))
    blocks = np.arange(len(edges.first))
    return _packed(blocks, np.full_like(blocks, -1), spans)


def key_items(forest: Forest, window: int | None, kv_heads: int) -> tuple[Blocks, np.ndarray]:
    """For each block of keys the spans of queries that see any of them, shared out over items; and ``split_rows``."""
    edges = _edges(forest, 0)
    pieces = _queries_of(forest, window, edges)
    pieces[:, 1:3] = np.maximum(pieces[:, 1:3] - forest.num_given, 0)  # counted from the first query; some become empty
    spans = _joined(pieces)
    work = _work(spans, len(edges.first))
    longest = max(SHORTEST_ITEM, int(work.sum()) * kv_heads // PROGRAMS)
    count = -(-work // longest)
    split = np.flatnonzero(count > 1)  # blocks that are shared out
    items = np.ones_like(count)  # of each block
    shares = []
    for block in split.tolist():
        shares.append(_shares(spans[spans[:, 0] == block], -(-int(work[block]) // int(count[block]))))
        items[block] = shares[-1][-1, 0] + 1
    first_item = np.cumsum(items) - items
    block_of = np.repeat(np.arange(len(items)), items)
    in_slots = (count > 1)[block_of]
    slots = np.where(in_slots, np.cumsum(in_slots) - 1, -1)
    # From blocks to items, by the first column.
    whole = spans[(count <= 1)[spans[:, 0]]]
    whole[:, 0] = first_item[whole[:, 0]]
    for first, share in zip(first_item[split], shares, strict=True):
        share[:, 0] += first
    split_rows = np.stack([split, slots[first_item[split]], items[split]], axis=1)
    return _packed(block_of, slots, np.concatenate([whole, *shares])), split_rows


def _edges(forest: Forest, first: int) -> _Edges:
    """Of the blocks from token ``first`` on."""
    starts = np.arange(first, forest.num_tokens, TABLE_BLOCK)
    columns = [starts, np.minimum(starts + TABLE_BLOCK, forest.num_tokens)]
    for values in (forest.token_depth, forest.token_subtree_end):
        columns += [np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)]
    return _Edges(*columns)


def _pieces(block: np.ndarray, first: np.ndarray, end: np.ndarray, full: bool) -> np.ndarray:
    """``[N, 4]``: block, first token, end, and whether no mask is needed; some may be empty."""
    return np.stack([block, first, end, np.full_like(first, full)], axis=1)


def _queries_of(forest: Forest, window: int | None, edges: _Edges) -> np.ndarray:
    """`_pieces` of queries for each block of keys: its diagonal, then what lies below it."""
    block = np.arange(len(edges.first))
    if window is None:
        inside = np.maximum(edges.nearest_end, edges.end)
        diagonal, below = _pieces(block, edges.first, edges.end, False), _pieces(block, edges.end, inside, True)
        return np.concatenate([diagonal, below, _pieces(block, inside, edges.last, False)])
    begin = np.searchsorted(forest.start, edges.first, side="right") - 1
    count = np.searchsorted(forest.start, edges.last, side="left") - begin
    block = np.repeat(block, count)  # from here on for each block and each segment at or below it
    segment = np.arange(len(block)) - (np.cumsum(count) - count - begin)[block]
    k0, k1, shallowest, deepest, nearest_end, last = (column[block] for column in edges)
    start, end, depth = forest.start[segment], forest.end[segment], forest.depth[segment]
    first = np.maximum(start, k0)
    behind = np.maximum(first, k1)
    # Depth of a query = its packed position - start + depth of its segment; it sees a key less than `window` above it.
    seen = np.minimum(np.minimum(end, last), start - depth + deepest + window)
    inside = np.maximum(np.minimum(np.minimum(end, nearest_end), start - depth + shallowest + window), behind)
    diagonal, below = _pieces(block, first, np.minimum(behind, seen), False), _pieces(block, behind, inside, True)
    return np.concatenate([diagonal, below, _pieces(block, inside, seen, False)])


def _joined(pieces: np.ndarray) -> np.ndarray:
    """`_pieces` (disjoint within a block, in any order; some empty) as spans in the same form, by block and in order.

    Neighbours become one span, full spans are cut to whole blocks, and the rest of them counts as masked. Masked spans
    may take in tokens between them that nobody sees: their mask is exact.
    """
    pieces = pieces[pieces[:, 2] > pieces[:, 1]]
    pieces = _merged(pieces[np.lexsort((pieces[:, 1], pieces[:, 0]))], True, 0)
    block, first, end, full = pieces.T
    cut = np.where(full == 1, first + (end - first) // TABLE_BLOCK * TABLE_BLOCK, first)
    both = np.stack([_pieces(block, first, cut, True), _pieces(block, cut, end, False)], axis=1).reshape(-1, 4)
    return _merged(both[both[:, 2] > both[:, 1]], False, TABLE_BLOCK // 2)


def _merged(pieces: np.ndarray, full: bool, gap: int) -> np.ndarray:
    """``pieces`` with neighbours of kind ``full`` in one block made one where at most ``gap`` tokens lie between them."""
    block, first, end, kind = pieces.T
    near = (block[1:] == block[:-1]) & (first[1:] - end[:-1] <= gap)
    alike = near & (kind[1:] == full) & (kind[:-1] == full)
    firsts = np.flatnonzero(np.concatenate(([True], ~alike)))
    lasts = np.concatenate((firsts[1:], [len(pieces)])) - 1
    return np.stack([block[firsts], first[firsts], end[lasts], kind[firsts]], axis=1)


def _work(spans: np.ndarray, groups: int) -> np.ndarray:
    """Tokens in the spans of each group, by the first column."""
    return np.bincount(spans[:, 0], weights=spans[:, 2] - spans[:, 1], minlength=groups).astype(np.int64)


def _shares(spans: np.ndarray, size: int) -> np.ndarray:
    """The spans of one block in shares of about ``size`` queries each: their number in place of the block's.

    Full spans come first, and are cut at whole blocks.
    """
    size = -(-size // TABLE_BLOCK) * TABLE_BLOCK
    shares: list[tuple[int, int, int, int]] = []
    share, left = 0, size
    for _, first, end, full in sorted(spans.tolist(), key=lambda span: -span[3]):
        while first < end:
            if left <= 0:
                share, left = share + 1, size
            step = min(end - first, -(-left // TABLE_BLOCK) * TABLE_BLOCK)
            shares.append((share, first, first + step, full))
            first, left = first + step, left - step
    return np.array(shares)


def _packed(block_of: np.ndarray, slots: np.ndarray, spans: np.ndarray) -> Blocks:
    """`Blocks` of items, most work first.

    Args:
        block_of, slots: ``[N]``, block and slot of each item.
        spans: ``[M, 4]`` as from `_joined`, with an item in place of the block.
    """
    order = np.argsort(-_work(spans, len(block_of)), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    item, full = place[spans[:, 0]], spans[:, 3] == 1
    number, number_full = (np.bincount(which, minlength=len(order)) for which in (item, item[full]))
    end = np.cumsum(number)
    rows = np.stack([block_of[order], end - number, end - number + number_full, end, slots[order]], axis=1)
    return Blocks(rows.astype(np.int32), spans[np.lexsort((~full, item)), 1:3].astype(np.int32))
