"""Blockwise backend: pure torch, every feature, any device and dtype, no ``T x T`` tensor and no copy of K or V.

FlashAttention-2's algorithm (arXiv 2307.08691, section 3.1) written with batched matrix products: an online softmax
(arXiv 1805.02867) over the visible tiles only, and a backward that recomputes each tile from the saved log-sum-exp.
Which tiles are visible is interval arithmetic on the segments, done once on the host. Off the diagonal a tile of keys
is seen by every query of its subtree, so only diagonal tiles, and tiles on the edge of a sliding window, need a mask.

Shape suffixes: ``K`` key/value heads, ``R`` rows (``T * H / H_kv``: a token's query heads that share one key head lie
side by side, so that grouped queries are rows of one matrix), ``Q`` rows of a tile, ``N`` keys of a tile, ``D`` dims.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.device import accumulation_dtype, stream_of, upload
from prefix_grouper_plugins.attention.request import Options, Request
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest

# Edge of a tile in tokens. On a CPU the scores of a tile should stay in cache (128 to 256 measured alike); elsewhere
# launches dominate.
CPU_TILE = 128
DEVICE_TILE = 512
# Consecutive short segments share one diagonal tile up to this many tokens: fewer, larger products.
GROUP_TILE = 128


class Tile(NamedTuple):
    """Queries ``[q0, q1)``, by packed position, against keys ``[k0, k1)``; ``masked`` where not all of these pairs are visible."""

    q0: int
    q1: int
    k0: int
    k1: int
    masked: bool

    @property
    def is_diagonal(self) -> bool:
        """A query's diagonal tile holds the query's own key."""
        return self.q0 == self.k0


def why_not(request: Request) -> str | None:
    """None: this backend serves every request."""
    return None


@lru_cache(maxsize=CACHED_LAYOUTS)
def visible_tiles(forest: Forest, window: int | None, tile: int) -> tuple[Tile, ...]:
    """The tiles that cover every visible pair exactly once, in an order in which each query meets its diagonal first.

    Blocks of keys go from last to first: the queries that see a block lie at or after it, so their own diagonal tiles
    are done. The forward relies on it: after the diagonal every row's running maximum is finite.
    """
    tiles: list[Tile] = []
    for block in reversed(_key_blocks(forest, tile)):
        q0, q1 = block[0][0], block[-1][1]
        if q0 >= forest.num_given:
            tiles.append(Tile(q0, q1, q0, q1, True))
        q1 = max(q1, forest.num_given)  # given keys have no queries of their own
        for k0, k1, segment in block:
            tiles += _tiles_below(forest, (k0, k1), segment, q1, window, tile)
    return tuple(tiles)


def _key_blocks(forest: Forest, tile: int) -> list[list[tuple[int, int, int]]]:
    """Runs of pieces ``(start, end, segment)``: a piece of a long segment, or several short segments together."""
    blocks: list[list[tuple[int, int, int]]] = []
    limit = min(tile, GROUP_TILE)
    for segment, (start, end) in enumerate(zip(forest.start.tolist(), forest.end.tolist(), strict=True)):
        for k0 in range(start, end, tile):
            piece = (k0, min(k0 + tile, end), segment)
            if blocks and piece[1] - blocks[-1][0][0] <= limit and k0 != forest.num_given:
                blocks[-1].append(piece)
            else:
                blocks.append([piece])
    return blocks


def _tiles_below(
    forest: Forest, keys: tuple[int, int], segment: int, first_query: int, window: int | None, tile: int
) -> list[Tile]:
    """Tiles of the keys of one piece with the queries from ``first_query`` to the end of the segment's subtree."""
    k0, k1 = keys
    last = int(forest.subtree_end[segment])
    starts = np.arange(first_query, last, tile)
    if not len(starts):
        return []
    ends = np.minimum(starts + tile, last)
    if window is None:
        return [Tile(q0, q1, k0, k1, False) for q0, q1 in zip(starts.tolist(), ends.tolist(), strict=True)]
    depth = forest.token_depth[first_query:last]
    shallowest = np.minimum.reduceat(depth, starts - first_query)
    deepest = np.maximum.reduceat(depth, starts - first_query)
    offset = int(forest.depth[segment] - forest.start[segment])  # depth of a key = its packed position + offset
    first_key = np.maximum(k0, shallowest - window + 1 - offset)
    masked = deepest - (first_key + offset) >= window
    seen = first_key < k1
    columns = (starts[seen].tolist(), ends[seen].tolist(), first_key[seen].tolist(), masked[seen].tolist())
    return [Tile(q0, q1, n0, k1, edge) for q0, q1, n0, edge in zip(*columns, strict=True)]


@lru_cache(maxsize=CACHED_LAYOUTS)
def _token_tables(forest: Forest, device: torch.device, stream: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed position, subtree end and depth of each token, ``LongTensor[T]`` each, uploaded once for all layers."""
    tables = (np.arange(forest.num_tokens), forest.token_subtree_end, forest.token_depth)
    position, subtree_end, depth = (upload(table, device) for table in tables)
    return position, subtree_end, depth


class _Scores:
    """Scores of one tile at a time, from head-major queries and views of the keys."""

    def __init__(self, query: Tensor, key: Tensor, forest: Forest, options: Options) -> None:
        self.acc = accumulation_dtype(query.dtype)
        self.kv_heads, self.group = key.shape[1], query.shape[1] // key.shape[1]
        self.q_KRD = to_rows(query, self.kv_heads, self.acc)
        self.k_KTD = key.transpose(0, 1)
        self.scale, self.window, self.softcap = options.scale, options.window, options.softcap
        self.num_given = forest.num_given
        self.position_T, self.subtree_end_T, self.depth_T = _token_tables(forest, query.device, stream_of(query.device))

    def rows(self, tile: Tile) -> slice:
        """The rows of the tile's queries."""
        return slice((tile.q0 - self.num_given) * self.group, (tile.q1 - self.num_given) * self.group)

    def keys(self, tile: Tile) -> Tensor:
        """``[K, N, D]``: a view, unless the keys are in half precision."""
        return self.k_KTD[:, tile.k0 : tile.k1].to(self.acc)

    def of(self, tile: Tile) -> Tensor:
        """Capped, unmasked scores ``[K, Q, N]``."""
        q_KQD, k_KND = self.q_KRD[:, self.rows(tile)], self.keys(tile)
        s_KQN = q_KQD.new_empty((self.kv_heads, q_KQD.shape[1], k_KND.shape[1]))
        torch.baddbmm(s_KQN, q_KQD, k_KND.transpose(1, 2), beta=0, alpha=self.scale, out=s_KQN)
        if self.softcap is not None:
            s_KQN.div_(self.softcap).tanh_().mul_(self.softcap)
        return s_KQN

    def hide(self, x_KQN: Tensor, tile: Tile, fill: float) -> None:
        """Write ``fill`` where a query does not see a key, in place."""
        keys, queries = slice(tile.k0, tile.k1), slice(tile.q0, tile.q1)
        q_Q1 = self.position_T[queries, None]
        hidden_QN = (self.position_T[keys] > q_Q1) | (self.subtree_end_T[keys] <= q_Q1)
        if self.window is not None:
            hidden_QN |= self.depth_T[queries, None] - self.depth_T[keys] >= self.window
        x_KQN.unflatten(1, (-1, self.group)).masked_fill_(hidden_QN[:, None], fill)


def to_rows(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """``[T, H, ...]`` to ``[H_kv, T * H / H_kv, ...]``: the query heads that share a key head become rows."""
    return x.to(dtype).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _from_rows(x_KRD: Tensor, num_tokens: int) -> Tensor:
    """Inverse of `to_rows` for ``[K, R, D]``."""
    return x_KRD.unflatten(1, (num_tokens, -1)).transpose(0, 1).flatten(1, 2)


def _tile_size(tile: int | None, device: torch.device) -> int:
    return tile or (CPU_TILE if device.type == "cpu" else DEVICE_TILE)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    options: Options,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        query, key, value: ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D_v]``, ``Q = forest.num_queries``.
        forest: of the layout.
        options: of the layer.
        tile: edge of a tile in tokens, by default chosen for the device.

    Returns:
        ``out [Q, H, D_v]`` and ``lse [H, Q]`` (of scaled, capped scores, natural log), in float32 or float64.
    """
    scores = _Scores(query, key, forest, options)
    v_KTD = value.transpose(0, 1)
    rows_shape = scores.q_KRD.shape[:2]
    out_KRD = scores.q_KRD.new_empty((*rows_shape, value.shape[2]))
    top_KR1, sum_KR1 = (scores.q_KRD.new_empty((*rows_shape, 1)) for _ in range(2))
    for step in visible_tiles(forest, options.window, _tile_size(tile, query.device)):
        rows = scores.rows(step)
        s_KQN = scores.of(step)
        if step.masked:
            scores.hide(s_KQN, step, -torch.inf)
        v_KND = v_KTD[:, step.k0 : step.k1].to(scores.acc)
        out_KQD, top_KQ1, sum_KQ1 = out_KRD[:, rows], top_KR1[:, rows], sum_KR1[:, rows]
        new_top_KQ1 = s_KQN.amax(dim=-1, keepdim=True)
        if step.is_diagonal:
            p_KQN = s_KQN.sub_(new_top_KQ1).exp_()
            sum_KQ1.copy_(p_KQN.sum(dim=-1, keepdim=True))
            out_KQD.copy_(torch.bmm(p_KQN, v_KND))
        else:
            new_top_KQ1 = torch.maximum(new_top_KQ1, top_KQ1)
            p_KQN = s_KQN.sub_(new_top_KQ1).exp_()
            shrink_KQ1 = (top_KQ1 - new_top_KQ1).exp_()
            sum_KQ1.mul_(shrink_KQ1).add_(p_KQN.sum(dim=-1, keepdim=True))
            out_KQD.mul_(shrink_KQ1).baddbmm_(p_KQN, v_KND)
        top_KQ1.copy_(new_top_KQ1)
    out = _from_rows(out_KRD.div_(sum_KR1), query.shape[0])
    lse = _from_rows(sum_KR1.log_().add_(top_KR1), query.shape[0])[..., 0]
    return out, lse.t()


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    options: Options,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in float32 or float64.

    Args:
        grad_out, out: ``[Q, H, D_v]``.
        lse: ``[H, Q]``; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, options, tile: as in `forward`.
    """
    scores = _Scores(query, key, forest, options)
    kv_heads, acc = scores.kv_heads, scores.acc
    v_KTD = value.transpose(0, 1)
    do_KRD = to_rows(grad_out, kv_heads, acc)
    delta_KR1 = to_rows((grad_out.to(acc) * out.to(acc)).sum(-1, keepdim=True), kv_heads, acc)
    lse_KR1 = to_rows(lse.t()[..., None], kv_heads, acc)
    dq_KRD = torch.zeros_like(scores.q_KRD)
    dk_KTD, dv_KTD = (torch.zeros_like(x.transpose(0, 1), dtype=acc) for x in (key, value))
    for step in visible_tiles(forest, options.window, _tile_size(tile, query.device)):
        rows, keys = scores.rows(step), slice(step.k0, step.k1)
        s_KQN = scores.of(step)
        p_KQN = (s_KQN - lse_KR1[:, rows]).exp_()
        if step.masked:  # on the probabilities: -inf among the scores would make NaN with a softcap
            scores.hide(p_KQN, step, 0.0)
        do_KQD = do_KRD[:, rows]
        dv_KTD[:, keys].baddbmm_(p_KQN.transpose(1, 2), do_KQD)
        ds_KQN = torch.bmm(do_KQD, v_KTD[:, keys].to(acc).transpose(1, 2))
        ds_KQN.sub_(delta_KR1[:, rows]).mul_(p_KQN)
        if options.softcap is not None:
            ds_KQN.mul_(s_KQN.div_(options.softcap).square_().neg_().add_(1.0))
        dq_KRD[:, rows].baddbmm_(ds_KQN, scores.keys(step), alpha=options.scale)
        dk_KTD[:, keys].baddbmm_(ds_KQN.transpose(1, 2), scores.q_KRD[:, rows], alpha=options.scale)
    return _from_rows(dq_KRD, query.shape[0]), dk_KTD.transpose(0, 1), dv_KTD.transpose(0, 1)
