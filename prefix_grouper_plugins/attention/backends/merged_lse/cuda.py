"""The path of `merged_lse` on CUDA: one causal varlen call for all chains, and one for each inner level of the tree.

A chain is a segment and its first children (`rectangles.Chains`): a prompt and its first response are one causal triangle,
so the level's call has the other responses alone. Where segments are short, their keys are copied for the chains below them
instead, and need no call (`gathered`). Forward and backward choose apart which levels they copy, for all ways give and take
the merged log-sum-exp.

The calls get slices of the packed row, or of the keys with their copies. A level that has several inner segments has
tokens between them that it does not touch; *gap* entries in the cumulative lengths (queries without keys, keys without
queries) step over them. What a kernel writes into gaps is never used: FA2 and FA3 disagree about it. One group has no
such entry.

With one level to merge, which is every batch of groups, the level's partials are merged into what the causal call has
returned, in place and in its dtype: each value is rounded once, as if there were sums in float32. More levels round more
often, so they keep sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse.gathered import (
    NONE,
    Copies,
    Levels,
    copied_backward,
    copied_forward,
    copied_in_both,
    copies_of,
)
from prefix_grouper_plugins.attention.backends.merged_lse.merge import add, merge
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import (
    Rectangle,
    chains,
    copied_above,
    rectangles_and_copies,
)
from prefix_grouper_plugins.attention.device import accumulation_dtype, cast, stream_of, upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest

# The signature of the aten flash ops; tests pass emulated ones.
FlashOp = Callable[..., Any]


class Rows(NamedTuple):
    """Rows ``[start, end)`` of a tensor that a call gets, and among them ``gaps``, ``BoolTensor[end - start]`` or None."""

    start: int
    end: int
    gaps: Tensor | None


class VarlenCall(NamedTuple):
    """One varlen flash call on slices of the packed row.

    Attributes:
        cu_q, cu_k: ``IntTensor[B + 1]``, cumulative query and key lengths of the call's ``B`` entries, from the slices'
            beginnings.
        max_q, max_k: the longest entry, known to the host so that the call does not wait for the device; ``max_q`` is
            at least 2, for FA2 takes 1 to mean decoding and then counts on one query in every entry.
        causal: True for the call that joins all chains with themselves; the last query of an entry sees its last key.
        queries: rows of the query tensor; keys: rows of the key tensor.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    queries: Rows
    keys: Rows


def flash_ops() -> tuple[FlashOp, FlashOp]:
    """The flash forward and backward of torch."""
    return torch.ops.aten._flash_attention_forward.default, torch.ops.aten._flash_attention_backward.default


@lru_cache
def unread_states(device: torch.device) -> tuple[Tensor, Tensor]:
    """The random state and its companion: dropout is off, so the ops never read them and still want the tensors."""
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def copies_for_both(q: Tensor, k: Tensor, forest: Forest) -> Copies | None:
    """The copies that forward and backward both make of keys and values; None where they make none, or not the same."""
    copied = copied_in_both(forest, q.shape[1], k.shape[1])
    return copies_of(forest, copied, q.device, stream_of(q.device)) if copied else None


def forward(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D]`` and ``lse [H, Q]``, see `varlen_forward`; k and v as they are, or what `copies_for_both` makes of them."""
    copied, where = copied_forward(forest, q.shape[1], k.shape[1]), (q.device, stream_of(q.device))
    if copied and k.shape[0] == forest.num_tokens:  # else copies, see `copied_in_both`
        copies = copies_of(forest, copied, *where)
        k, v = copies.of(k, v)
    return varlen_forward(flash_ops()[0], q, k, v, varlen_calls(forest, *where, copied), scale)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, forest: Forest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, see `varlen_backward`; k and v as they are, or their copies, gradients of the former."""
    copied, where = copied_backward(forest, q.shape[1], k.shape[1]), (q.device, stream_of(q.device))
    calls, op = varlen_calls(forest, *where, copied), flash_ops()[1]
    if not copied:
        return varlen_backward(op, do, q, k, v, out, lse, calls, scale)
    copies = copies_of(forest, copied, *where)
    if k.shape[0] == forest.num_tokens:
        k, v = copies.of(k, v)
    dq, dk, dv = varlen_backward(op, do, q, k, v, out, lse, calls, scale)
    return dq, copies.sum(dk), copies.sum(dv)


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def varlen_calls(
    forest: Forest, device: torch.device, stream: int = 0, copied: Levels = NONE
) -> tuple[VarlenCall, ...]:
    """The varlen calls of a forest: one causal call for its chains, then one for each level of the tree that has rectangles.

    Args:
        forest: of the layout.
        device, stream: where the tables go.
        copied: levels whose segments are copied: the calls then take keys as `gathered.copies_of` puts them.
    """
    entries = chains(forest)
    q_lengths, k_lengths = entries.end - np.maximum(entries.start, forest.num_given), entries.end - entries.start
    keys = Rows(int(entries.start[0]), forest.num_tokens, None)
    if copied:
        lengths = forest.end - forest.start
        k_lengths = k_lengths + [lengths[list(above)].sum() for above in copied_above(forest, copied)]
        keys = Rows(0, int(k_lengths.sum()), None)
    cu_k, longest = _cumulative(k_lengths.tolist(), device)
    cu_q, longest_q = cu_k, longest
    if (q_lengths != k_lengths).any():  # queries see given keys of their own chain, or copies
        cu_q, longest_q = _cumulative(q_lengths.tolist(), device)
    queries = Rows(0, forest.num_queries, None)
    calls = [VarlenCall(cu_q, cu_k, max(longest_q, 2), longest, True, queries, keys)]
    levels: dict[int, list[Rectangle]] = {}
    for rectangle in rectangles_and_copies(forest, copied):
        levels.setdefault(rectangle.level, []).append(rectangle)
    calls += [_level_call(levels[level], forest.num_given, device) for level in sorted(levels)]
    return tuple(calls)


def _level_call(members: list[Rectangle], num_given: int, device: torch.device) -> VarlenCall:
    """Descendants on keys, for the rectangles of one level, in packed order."""
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    q_done, k_done = members[0].q0, members[0].k0
    for q0, q1, k0, k1, _ in members:
        for q, k in ((q0 - q_done, 0), (0, k0 - k_done)):  # gaps, apart: together they would attend
            if q or k:
                q_lengths.append(q)
                k_lengths.append(k)
        q_lengths.append(q1 - q0)
        k_lengths.append(k1 - k0)
        q_done, k_done = q1, k1
    cu_q, max_q = _cumulative(q_lengths, device)
    cu_k, max_k = _cumulative(k_lengths, device)
    queries = _rows([(r.q0 - num_given, r.q1 - num_given) for r in members], device)
    return VarlenCall(cu_q, cu_k, max(max_q, 2), max_k, False, queries, _rows([(r.k0, r.k1) for r in members], device))


def _cumulative(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    cu = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return upload(cu, device), max(lengths)


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Rows:
    start, end = ranges[0][0], ranges[-1][1]
    gaps = np.ones(end - start, dtype=bool)
    for first, last in ranges:
        gaps[first - start : last - start] = False
    return Rows(start, end, upload(gaps, device) if gaps.any() else None)


def _aligned(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors, each copied where a token or a head begins within 16 bytes: CUDA flash kernels read so many at once, unchecked.

    They also want a dense last dimension. All have one head dim and one dtype.
    """
    first = tensors[0]
    places = first.shape[2] * first.itemsize
    for x in tensors:
        if not x.is_contiguous():
            break
        places |= x.data_ptr()
    else:
        if not places & 15:
            return tensors
    return [_aligned_one(x) for x in tensors]


def _aligned_one(x: Tensor) -> Tensor:
    tokens, heads, last = x.stride()
    inside = (x.data_ptr() | tokens * x.itemsize | heads * x.itemsize) & 15
    return x.clone(memory_format=torch.contiguous_format) if inside or last != 1 else x


def _sum_dtype(calls: tuple[VarlenCall, ...], dtype: torch.dtype) -> torch.dtype:
    """What partials are merged and added in: the kernel's own dtype where each value is rounded once anyway."""
    return dtype if len(calls) <= 2 else accumulation_dtype(dtype)


def varlen_forward(
    op: FlashOp, q: Tensor, k: Tensor, v: Tensor, calls: tuple[VarlenCall, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Run ``calls`` with ``op`` (schema of ``aten::_flash_attention_forward``) and merge them.

    Args:
        op: the flash forward; arguments that differ between torch versions are left at their defaults.
        q, k, v: ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D]``.

    Returns:
        ``out [Q, H, D]``, in the query's dtype with up to two calls, else in float32 or float64, and ``lse [H, Q]``.
    """
    q, k, v = _aligned(q, k, v)
    causal, *levels = calls  # the causal one reaches every query
    start = causal.keys.start
    keys = (k[start:], v[start:]) if start else (k, v)
    out, lse = op(q, *keys, *causal[:4], 0.0, True, False, scale=scale)[:2]
    lse = cast(lse, accumulation_dtype(q.dtype))
    if len(levels) > 1:
        out = out.to(_sum_dtype(calls, q.dtype))
    for call in levels:
        (q0, q1, gaps), (k0, k1, _) = call.queries, call.keys
        partial = op(q[q0:q1], k[k0:k1], v[k0:k1], *call[:4], 0.0, False, False, scale=scale)
        merge(out[q0:q1], lse[:, q0:q1], partial[0], cast(partial[1], lse.dtype), gaps)
    return out, lse


def varlen_backward(
    op: FlashOp,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    calls: tuple[VarlenCall, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward of ``calls`` with ``op`` (schema of ``aten::_flash_attention_backward``) and add them up.

    Args:
        op: the flash backward.
        do, out: ``[Q, H, D]``, the gradient of the merged output, and that output; lse: ``[H, Q]``, merged.
        q, k, v: as in `varlen_forward`.

    Returns:
        Gradients of q, k and v, in the dtype of ``q`` with up to two calls, else in float32 or float64.
    """
    do, q, k, v, out = _aligned(do, q, k, v, out)
    causal, *levels = calls
    states = unread_states(q.device)
    start = causal.keys.start
    keys = (k[start:], v[start:]) if start else (k, v)
    grads = op(do, q, *keys, out, lse, *causal[:4], 0.0, True, *states, scale=scale)
    if start or len(levels) > 1:
        dtype = _sum_dtype(calls, q.dtype)
        grads = (grads[0].to(dtype), *(_whole(grad, k.size(0), dtype) for grad in grads[1:3]))
    dq, dk, dv = grads[:3]
    for call in levels:
        (q0, q1, q_gaps), (k0, k1, k_gaps) = call.queries, call.keys
        tensors = (do[q0:q1], q[q0:q1], k[k0:k1], v[k0:k1], out[q0:q1], lse.narrow_copy(1, q0, q1 - q0))
        partial = op(*tensors, *call[:4], 0.0, False, *states, scale=scale)
        gaps = None if q_gaps is None and k_gaps is None else [q_gaps, k_gaps, k_gaps]
        add([dq[q0:q1], dk[k0:k1], dv[k0:k1]], list(partial[:3]), gaps)
    return dq, dk, dv


def _whole(grad: Tensor, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """The gradient of all keys, from that of the keys from the first chain with queries on."""
    in_front = num_tokens - grad.size(0)
    if not in_front:
        return grad.to(dtype)
    whole = grad.new_zeros((num_tokens, *grad.shape[1:]), dtype=dtype)
    whole[in_front:] = grad
    return whole
