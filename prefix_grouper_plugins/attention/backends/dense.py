"""The oracle: shared-prefix attention with a ``T x T`` mask, in plain differentiable torch. For tests and small T."""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.device import accumulation_dtype
from prefix_grouper_plugins.attention.request import Options
from prefix_grouper_plugins.forest import Forest, forest_of


def visibility_mask(segments: Tensor, window: int | None = None, num_given: int = 0) -> Tensor:
    """``BoolTensor[Q, T]`` on the CPU: query (row) sees key (column) iff the forest and the window let it.

    Args:
        segments: ``IntTensor[S, 4]``, as in `PrefixLayout`.
        window: keys further than ``window - 1`` positions up the row are hidden.
        num_given: leading tokens without queries; ``Q = T - num_given``.
    """
    return _visibility(forest_of(segments, num_given), window)


def _visibility(forest: Forest, window: int | None) -> Tensor:
    position_T = torch.arange(forest.num_tokens)
    mask_QK = position_T <= position_T[forest.num_given :, None]
    mask_QK &= position_T[forest.num_given :, None] < torch.from_numpy(forest.token_subtree_end)
    if window is not None:
        depth_T = torch.from_numpy(forest.token_depth)
        mask_QK &= depth_T[forest.num_given :, None] - depth_T < window
    return mask_QK


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options, sinks: Tensor | None = None
) -> Tensor:
    """``softmax(scale * q k^T) v`` under the forest's mask; every other backend is tested against this one.

    Args:
        query: ``[Q, H, D]``, ``Q = forest.num_queries``.
        key: ``[T, H_kv, D]``.
        value: ``[T, H_kv, D_v]``.
        forest: of the layout.
        options: of the layer.
        sinks: as in `shared_prefix_attention`.

    Returns:
        ``[Q, H, D_v]`` in the query's dtype; computed in float32, or in float64 if the query is.
    """
    acc = accumulation_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    q_HQD = query.to(acc).transpose(0, 1)
    k_HKD = key.to(acc).transpose(0, 1).repeat_interleave(group, dim=0)
    v_HKD = value.to(acc).transpose(0, 1).repeat_interleave(group, dim=0)
    s_HQK = q_HQD @ k_HKD.transpose(1, 2) * options.scale
    if options.softcap is not None:
        s_HQK = options.softcap * torch.tanh(s_HQK / options.softcap)
    s_HQK = s_HQK.masked_fill(~_visibility(forest, options.window).to(query.device), -torch.inf)
    if sinks is not None:  # one more logit in the denominator, with no value (gpt-oss)
        sinks_HQ1 = sinks.to(acc)[:, None, None].expand(-1, query.shape[0], 1)
        s_HQK = torch.cat([s_HQK, sinks_HQ1], dim=-1)
    p_HQK = torch.softmax(s_HQK, dim=-1)[..., : key.shape[0]]
    return (p_HQK @ v_HKD).transpose(0, 1).to(query.dtype)
