"""Blocks of tokens that see each other in both directions, inside a causal forest (the images of Gemma 3).

The causal core runs first, on every token. Then the few queries that lie in blocks are done again, with all that they
see: of each tree, its block queries against the keys up to its last block. Exact with every backend, since a block token
never sees past the end of its block, which lies in the same segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from prefix_grouper_plugins.layout import PrefixLayout


class Blocks:
    """Which packed tokens form blocks. A plain class: FSDP2 copies dataclass arguments.

    Args:
        ids: ``LongTensor[T]``, the same number for the tokens of a block, -1 outside of blocks. A block lies in one
            segment.
        layout: of the packed row.
        cut_by_window: whether a sliding window also hides tokens of the own block.
    """

    def __init__(self, ids: Tensor, layout: PrefixLayout, *, cut_by_window: bool) -> None:
        self.ids, self.cut_by_window = ids, cut_by_window
        self.trees: list[tuple[Tensor, slice]] = []  # block queries, and the keys that they may see
        inside = ids.cpu() >= 0
        for start, _, parent, end in layout.segments.tolist():
            if parent < 0 and bool(inside[start:end].any()):
                queries = inside[start:end].nonzero()[:, 0] + start
                self.trees.append((queries.to(ids.device), slice(start, int(queries[-1]) + 1)))


def attend_within_blocks(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    blocks: Blocks,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """``out [T, H, D_v]`` of the causal core, with the rows of block queries replaced.

    Args:
        query, key, value, scale, window: as in `shared_prefix_attention`.
        layout, blocks: of the packed row.
    """
    group = query.shape[1] // key.shape[1]
    for queries, keys in blocks.trees:
        q_HQD = query[queries].transpose(0, 1)
        k_HND, v_HND = (x[keys].transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        mask_QN = _visible(layout, blocks, queries, keys, window)
        seen_HQD = scaled_dot_product_attention(q_HQD[None], k_HND[None], v_HND[None], attn_mask=mask_QN, scale=scale)[
            0
        ]
        out = out.index_copy(0, queries, seen_HQD.transpose(0, 1).to(out.dtype))
    return out


def _visible(layout: PrefixLayout, blocks: Blocks, queries: Tensor, keys: slice, window: int | None) -> Tensor:
    """``BoolTensor[Q, N]``."""
    k_N = torch.arange(keys.start, keys.stop, device=queries.device)
    same_QN = blocks.ids[queries, None] == blocks.ids[k_N]
    causal_QN = (k_N <= queries[:, None]) & (layout.subtree_end[k_N] > queries[:, None])
    if window is None:
        return causal_QN | same_QN
    near_QN = layout.position_ids[queries, None] - layout.position_ids[k_N] < window
    return (causal_QN | same_QN) & near_QN if blocks.cut_by_window else (causal_QN & near_QN) | same_QN
