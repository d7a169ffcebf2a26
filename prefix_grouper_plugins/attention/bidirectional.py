"""Blocks of tokens that see each other in both directions, inside a causal forest (the images of Gemma 3).

The causal core runs first, on every token. Then the few queries that lie in blocks are done again, with all that they
see: of each tree, its block queries against the keys up to its last block. Exact with every backend, since a block token
never sees past the end of its block, which lies in the same segment.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import IntTensor, Tensor
from torch.nn.functional import scaled_dot_product_attention

from prefix_grouper_plugins.attention.device import stream_of, upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest, forest_of

if TYPE_CHECKING:
    from prefix_grouper_plugins.layout import PrefixLayout


def blocks_of(ids: Tensor, layout: PrefixLayout) -> IntTensor:
    """What to set as ``layout.blocks``: first token and end of each run of equal ids.

    Args:
        ids: ``LongTensor[T]``, the same number for the tokens of a block, -1 outside of blocks.
        layout: of the packed row.

    Returns:
        ``IntTensor[N, 2]`` on the CPU, in packed order.

    Raises:
        ValueError: a block goes past the end of its segment, so that rows would share a part of it.
    """
    numbers = ids.cpu().numpy()
    edges = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
    blocks = np.stack([edges[:-1], edges[1:]], axis=1)
    blocks = blocks[numbers[blocks[:, 0]] >= 0]
    segment_ends = layout.segments[:, 1].numpy()
    ends = segment_ends[np.searchsorted(segment_ends, blocks[:, 0], side="right")]
    if len(crossing := blocks[blocks[:, 1] > ends]):
        first, end = crossing[0].tolist()
        raise ValueError(
            f"the block of tokens {first} to {end - 1} goes past the end of its segment: rows cannot share a part of a "
            "block, so give rows with such blocks keys of their own"
        )
    return torch.from_numpy(blocks.astype(np.int32))  # type: ignore[return-value]


class _Tree(NamedTuple):
    """``queries``: ``LongTensor[Q]``, packed positions in blocks of one tree; ``keys``: all that they may see."""

    queries: Tensor
    keys: slice


class _Plan(NamedTuple):
    """The trees that have blocks; of each token, ``LongTensor[T]``, the block (-1: none), subtree end and depth."""

    trees: tuple[_Tree, ...]
    block: Tensor
    subtree_end: Tensor
    depth: Tensor


@torch.compiler.disable
def _plan_of(segments: Tensor, num_given: int, blocks: Tensor, device: torch.device) -> _Plan:
    with torch.inference_mode(False):  # it is cached, and a later training step may use it as well
        return _plan(forest_of(segments, num_given), blocks.numpy().tobytes(), device, stream_of(device))


@lru_cache(maxsize=CACHED_LAYOUTS)
def _plan(forest: Forest, blocks: bytes, device: torch.device, stream: int) -> _Plan:
    """``blocks``: the bytes of ``layout.blocks``."""
    block = np.full(forest.num_tokens, -1)
    for number, (first, end) in enumerate(np.frombuffer(blocks, dtype=np.int32).reshape(-1, 2).tolist()):
        block[first:end] = number
    inside = np.flatnonzero(block >= 0)
    trees = []
    roots = forest.parent < 0
    for start, end in zip(forest.start[roots].tolist(), forest.subtree_end[roots].tolist(), strict=True):
        queries = inside[(inside >= max(start, forest.num_given)) & (inside < end)]
        if len(queries):
            trees.append(_Tree(upload(queries, device), slice(start, int(queries[-1]) + 1)))
    tables = (upload(x, device) for x in (block, forest.token_subtree_end, forest.token_depth))
    return _Plan(tuple(trees), *tables)


def attend_within_blocks(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, *, scale: float, window: int | None
) -> Tensor:
    """``out [Q, H, D_v]`` of the causal core, with the rows of queries in ``layout.blocks`` replaced.

    Args:
        query, key, value, scale, window: as in `shared_prefix_attention`.
        layout: of the packed row.
    """
    assert layout.blocks is not None
    num_given = key.shape[0] - query.shape[0]
    plan = _plan_of(layout.segments, num_given, layout.blocks, query.device)
    group = query.shape[1] // key.shape[1]
    for queries, keys in plan.trees:
        q_HQD = query[queries - num_given].transpose(0, 1)
        k_HND, v_HND = (x[keys].transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        mask_QN = _visible(plan, queries, keys, window, layout.blocks_cut_by_window)
        seen_HQD = scaled_dot_product_attention(q_HQD[None], k_HND[None], v_HND[None], attn_mask=mask_QN, scale=scale)[
            0
        ]
        out = out.index_copy(0, queries - num_given, seen_HQD.transpose(0, 1).to(out.dtype))
    return out


def _visible(plan: _Plan, queries: Tensor, keys: slice, window: int | None, cut_by_window: bool) -> Tensor:
    """``BoolTensor[Q, N]``."""
    k_N = torch.arange(keys.start, keys.stop, device=queries.device)
    same_QN = plan.block[queries, None] == plan.block[keys]
    causal_QN = (k_N <= queries[:, None]) & (plan.subtree_end[keys] > queries[:, None])
    if window is None:
        return causal_QN | same_QN
    near_QN = plan.depth[queries, None] - plan.depth[keys] < window
    return (causal_QN | same_QN) & near_QN if cut_by_window else (causal_QN & near_QN) | same_QN
