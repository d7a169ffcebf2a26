"""Merged-LSE backend: the flash kernels that torch ships, called on rectangles of the forest, merged by log-sum-exp.

A forest's visible pairs are one causal triangle for each segment (its tokens among themselves) and one full rectangle
for each inner segment (all its descendants on its keys). Hydragen (arXiv 2402.05099) merges such partial attentions by
their log-sum-exp at decoding. Here training is exact too: a flash backward recomputes ``p = exp(s - lse)`` and
``delta = sum(dO * O)``, so calling it once for each partial with the MERGED ``O`` and ``lse`` yields that partial's
share of the true gradients, and the shares add up (the argument of Ring Attention, arXiv 2310.01889). Merging and sums
are in float32, or float64 for float64.

On the CPU each triangle and each rectangle is a call of its own. Its flash kernel is about half as fast on short triangles
as on rectangles, so long triangles are halved, again and again, into two triangles and the rectangle between them. On
CUDA there is one causal varlen call for all segments and one non-causal varlen call for each inner level of the tree;
*gap* entries in the cumulative lengths (queries without keys, keys without queries) step over what the level does not
touch, so nothing is gathered or copied. What a kernel writes into gaps is never used: FA2 and FA3 disagree about it.
With Triton, each merge and each sum is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_grouper_plugins.attention.backends.triton import launches as triton_kernels
from prefix_grouper_plugins.attention.device import accumulation_dtype, stream_of, upload, why_not_capability
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest

MAX_CUDA_HEAD_DIM = 256
# Kernels that torch.nn.attention.activate_flash_attention_impl puts in the place of FA2, and the GPUs that they refuse
# all others of, by the major number of the compute capability.
_ACTIVATED = {"FA3": (9,), "FA4": (9, 10)}
# FA4 is made for head dims up to 128 (flash_attn/cute/interface.py); its kernel for 256 on Blackwell hung, or read behind its
# tensors, with entries of length 0, of which a forest has many (Dao-AILab/flash-attention, issue 2562 and pull request 2568).
_ACTIVATED_HEAD_DIM = {"FA4": 128}
# On the CPU longer triangles are halved, by bytes of an element. Measured: 64 to 256 tokens do about equally well in float32
# and float64; in half precision a merge costs more, and less than 192 queries at once cost most.
LONGEST_TRIANGLE = {2: 256, 4: 128, 8: 128}
# The signature of the aten flash ops; tests pass emulated ones.
FlashOp = Callable[..., Any]


def why_not(request: Request) -> str | None:
    """Why this backend cannot serve ``request``, in words; None if it can."""
    if request.window is not None:
        return f"sliding_window={request.window} hides keys of the rows, and flash partials cannot restart a window"
    if request.softcap is not None:
        return f"softcap={request.softcap} is not a feature of the flash ops of torch"
    if request.device.type == "cpu":
        return None
    if request.device.type != "cuda" or torch.version.hip is not None:
        return f"the flash ops of torch are used on cpu and NVIDIA cuda only, not on {request.device.type}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA flash ops take float16 and bfloat16, not {request.dtype}"
    head_dim = _kernel_head_dim(request.head_dim, request.value_dim, request.device)
    if head_dim > MAX_CUDA_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_CUDA_HEAD_DIM}, the most that the CUDA flash ops take"
    return _why_not_gpu(request.device, head_dim)


def _why_not_gpu(device: torch.device, head_dim: int) -> str | None:
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no CUDA flash attention"
    capability = torch.cuda.get_device_capability(device)
    if (reason := why_not_capability(capability, "the CUDA flash ops")) is not None:
        return reason
    activated = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()  # torch >= 2.10
    majors = _ACTIVATED.get(activated or "", (capability[0],))
    if capability[0] not in majors:
        needed = " or ".join(f"{major}.x" for major in majors)
        return f"{activated} is activated and needs compute capability {needed}, this GPU has {capability[0]}.{capability[1]}"
    widest = _ACTIVATED_HEAD_DIM.get(activated or "", MAX_CUDA_HEAD_DIM)
    if head_dim > widest:
        return f"{activated} is activated and is used for head dims up to {widest}, not for {head_dim}"
    if head_dim > 192 and (capability in ((8, 6), (8, 9)) or capability[0] == 12):
        return (
            f"flash backward with head dim {head_dim} does not fit compute capability {capability[0]}.{capability[1]}"
        )
    return None


def _kernel_head_dim(head_dim: int, value_dim: int, device: torch.device) -> int:
    """The one head dim that the kernels see; on CUDA it is a multiple of 8."""
    widest = max(head_dim, value_dim)
    return widest if device.type == "cpu" else -(-widest // 8) * 8


def _padded(x: Tensor, head_dim: int) -> Tensor:
    """Zeros up to ``head_dim``, which change neither scores nor the used part of the output; dense last dimension."""
    if x.shape[-1] != head_dim:
        return F.pad(x, (0, head_dim - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        query, key, value: ``[T, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D_v]``.
        forest: the layout's segments.
        scale: as in `shared_prefix_attention`.
        window, softcap: None; see `why_not`.

    Returns:
        ``out [T, H, D_v]`` and ``lse [H, T]`` in float32 or float64 (``out`` in the query's dtype if nothing merged).
    """
    assert window is None and softcap is None, "why_not() turns these requests down"
    head_dim = _kernel_head_dim(query.shape[2], value.shape[2], query.device)
    q, k, v = (_padded(x, head_dim) for x in (query, key, value))
    if query.device.type == "cpu":
        out, lse = _cpu_forward(q, k, v, forest, scale)
    else:
        op = torch.ops.aten._flash_attention_forward.default
        out, lse = varlen_forward(op, q, k, v, _calls_of(forest, query.device), scale)
    return out[..., : value.shape[2]], lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in float32 or float64.

    Args:
        grad_out, out: ``[T, H, D_v]``; ``out`` merged, in the query's dtype.
        lse: ``[H, T]`` merged; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, scale, window, softcap: as in `forward`.
    """
    assert window is None and softcap is None, "why_not() turns these requests down"
    head_dim = _kernel_head_dim(query.shape[2], value.shape[2], query.device)
    do, q, k, v, out = (_padded(x, head_dim) for x in (grad_out.contiguous(), query, key, value, out))
    if query.device.type == "cpu":
        dq, dk, dv = _cpu_backward(do, q, k, v, out, lse, forest, scale)
    else:
        op = torch.ops.aten._flash_attention_backward.default
        calls = _calls_of(forest, query.device)
        dq, dk, dv = varlen_backward(op, do, q, k, v, out, lse.contiguous(), calls, scale)
    return dq[..., : query.shape[2]], dk[..., : key.shape[2]], dv[..., : value.shape[2]]


def _merge(out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor) -> None:
    """Merge one partial, ``[N, H, D]`` and ``[H, N]``, into ``out`` and ``lse`` (finite), in place."""
    merged = torch.logaddexp(lse, partial_lse)
    partial = partial_out.to(out.dtype) * (partial_lse - merged).exp_().t()[..., None]
    out.mul_((lse - merged).exp_().t()[..., None]).add_(partial)
    lse.copy_(merged)


class _Triangle(NamedTuple):
    """Tokens ``[start, end)`` among themselves, causally."""

    start: int
    end: int


class _Rectangle(NamedTuple):
    """Queries ``[q0, q1)`` on keys ``[k0, k1)``, never empty: the CPU op dies of empty ones."""

    q0: int
    q1: int
    k0: int
    k1: int


class _CpuPlan(NamedTuple):
    """The triangles set each row, in packed order; then the rectangles merge into it."""

    triangles: tuple[_Triangle, ...]
    rectangles: tuple[_Rectangle, ...]


@lru_cache(maxsize=CACHED_LAYOUTS)
def _cpu_plan(forest: Forest, longest: int) -> _CpuPlan:
    """Triangles of at most ``longest`` tokens (at least 2), and the rectangles beside and below them."""
    triangles, rectangles = [], []
    for start, end, last in zip(*(x.tolist() for x in (forest.start, forest.end, forest.subtree_end)), strict=True):
        if last > end:
            rectangles.append(_Rectangle(end, last, start, end))
        waiting = [(start, end)]
        while waiting:
            first, behind = waiting.pop()
            if behind - first <= longest:
                triangles.append(_Triangle(first, behind))
                continue
            step = longest // 2  # the kernel works in blocks of a power of two
            middle = first + ((behind - first) // 2 + step // 2) // step * step
            rectangles.append(_Rectangle(middle, behind, first, middle))
            waiting += [(middle, behind), (first, middle)]
    return _CpuPlan(tuple(triangles), tuple(rectangles))


def _heads(x: Tensor, start: int, end: int) -> Tensor:
    """``[T, H, D]`` to a view ``[1, H, end - start, D]``."""
    return x[start:end].transpose(0, 1).unsqueeze(0)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> tuple[Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    acc = accumulation_dtype(q.dtype)
    out = torch.empty(q.shape, dtype=acc)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=acc)
    plan = _cpu_plan(forest, LONGEST_TRIANGLE[q.itemsize])
    for start, end in plan.triangles:
        partial_out, partial_lse = op(*(_heads(x, start, end) for x in (q, k, v)), 0.0, True, scale=scale)
        out[start:end] = partial_out[0].transpose(0, 1)
        lse[:, start:end] = partial_lse[0]
    for q0, q1, k0, k1 in plan.rectangles:
        partial_out, partial_lse = op(_heads(q, q0, q1), _heads(k, k0, k1), _heads(v, k0, k1), 0.0, False, scale=scale)
        _merge(out[q0:q1], lse[:, q0:q1], partial_out[0].transpose(0, 1), partial_lse[0].to(acc))
    return out, lse


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, forest: Forest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype) for x in (q, k, v))
    plan = _cpu_plan(forest, LONGEST_TRIANGLE[q.itemsize])
    for start, end in plan.triangles:
        do_, q_, k_, v_, out_ = (_heads(x, start, end) for x in (do, q, k, v, out))
        grads = op(do_, q_, k_, v_, out_, lse[None, :, start:end], 0.0, True, scale=scale)
        for total, grad in zip((dq, dk, dv), grads, strict=True):
            total[start:end] = grad[0].transpose(0, 1)
    for q0, q1, k0, k1 in plan.rectangles:
        do_, q_, out_ = (_heads(x, q0, q1) for x in (do, q, out))
        grads = op(do_, q_, _heads(k, k0, k1), _heads(v, k0, k1), out_, lse[None, :, q0:q1], 0.0, False, scale=scale)
        for total, grad, (start, end) in zip((dq, dk, dv), grads, ((q0, q1), (k0, k1), (k0, k1)), strict=True):
            total[start:end] += grad[0].transpose(0, 1)
    return dq, dk, dv


class Rows(NamedTuple):
    """Rows ``[start, end)`` that a varlen call reaches, less those where ``gaps`` (``[end - start]``) is True."""

    start: int
    end: int
    gaps: Tensor | None

    def used(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """These rows of ``x [T, ...]``, with ``fill`` in the gaps."""
        x = x[self.start : self.end]
        if self.gaps is None:
            return x
        return x.masked_fill(self.gaps.view(-1, *[1] * (x.dim() - 1)), fill)


def _fused(total: Tensor) -> Any:
    """The module of fused kernels where they can run on ``total``, else None."""
    if total.dtype != torch.float32 or not triton_kernels.is_usable(total.device):
        return None
    from prefix_grouper_plugins.attention.backends.merged_lse import fused as triton_merge

    return triton_merge


def _merge_used(rows: Rows, out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor) -> None:
    """Merge the rows that a call reached, of ``[T, H, D]`` and ``[H, T]``, into ``out`` and ``lse``, in place."""
    inside = slice(rows.start, rows.end)
    fused = _fused(out)
    if fused is not None:
        fused.merge(out[inside], lse[:, inside], partial_out[inside], partial_lse[:, inside], rows.gaps)
        return
    partial_lse_NH = rows.used(partial_lse.t(), -torch.inf)  # exp(-inf) is 0: gaps keep their row
    _merge(out[inside], lse[:, inside], rows.used(partial_out), partial_lse_NH.t().to(lse.dtype))


def _add_used(rows: Rows, total: Tensor, partial: Tensor) -> None:
    """Add the rows that a call reached, of ``[T, H, D]``, to ``total``, in place."""
    inside = slice(rows.start, rows.end)
    fused = _fused(total)
    if fused is not None:
        fused.accumulate(total[inside], partial[inside], rows.gaps)
    else:
        total[inside] += rows.used(partial)


class VarlenCall(NamedTuple):
    """One varlen flash call over the whole packed row.

    Attributes:
        cu_q, cu_k: ``IntTensor[B + 1]``, cumulative query and key lengths of the call's ``B`` entries.
        max_q, max_k: the longest entry, known to the host so that the call does not wait for the device; ``max_q`` is
            at least 2, for FA2 takes 1 to mean decoding and then counts on one query in every entry.
        causal: True for the call that joins all segments with themselves.
        queries, keys: the rows that the call is about; gaps are left out.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    queries: Rows
    keys: Rows


def _calls_of(forest: Forest, device: torch.device) -> tuple[VarlenCall, ...]:
    return varlen_calls(forest, device, stream_of(device))


@lru_cache(maxsize=CACHED_LAYOUTS)
def varlen_calls(forest: Forest, device: torch.device, stream: int = 0) -> tuple[VarlenCall, ...]:
    """The varlen calls of a forest: one causal call, then one for each level of the tree that has inner segments."""
    lengths = (forest.end - forest.start).tolist()
    everything = Rows(0, forest.num_tokens, None)
    cu, longest = _cumulative(lengths, device)
    calls = [VarlenCall(cu, cu, max(longest, 2), longest, True, everything, everything)]
    inner = forest.subtree_end > forest.end
    for level in range(int(forest.level.max())):
        members = np.flatnonzero(inner & (forest.level == level)).tolist()
        calls.append(_level_call(forest, members, device))
    return tuple(calls)


def _level_call(forest: Forest, members: list[int], device: torch.device) -> VarlenCall:
    """Descendants on keys, for the inner segments ``members`` of one level (disjoint subtrees, in packed order)."""
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    query_rows: list[tuple[int, int]] = []
    key_rows: list[tuple[int, int]] = []
    q_done = k_done = 0

    def step_over(q_until: int, k_until: int) -> None:
        for q, k in ((q_until - q_done, 0), (0, k_until - k_done)):  # apart: together they would attend
            if q or k:
                q_lengths.append(q)
                k_lengths.append(k)

    for segment in members:
        start, end, last = (int(x[segment]) for x in (forest.start, forest.end, forest.subtree_end))
        step_over(end, start)
        q_lengths.append(last - end)
        k_lengths.append(end - start)
        query_rows.append((end, last))
        key_rows.append((start, end))
        q_done, k_done = last, end
    step_over(forest.num_tokens, forest.num_tokens)
    cu_q, max_q = _cumulative(q_lengths, device)
    cu_k, max_k = _cumulative(k_lengths, device)
    return VarlenCall(cu_q, cu_k, max(max_q, 2), max_k, False, _rows(query_rows, device), _rows(key_rows, device))


def _cumulative(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    cu = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return upload(cu, device), max(lengths)


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Rows:
    start, end = ranges[0][0], ranges[-1][1]
    gaps = np.ones(end - start, dtype=bool)
    for first, last in ranges:
        gaps[first - start : last - start] = False
    return Rows(start, end, upload(gaps, device) if gaps.any() else None)


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy where a token or a head begins within 16 bytes: CUDA flash kernels read so many at once, unchecked."""
    inside = x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in x.stride()[:-1])
    return x.clone(memory_format=torch.contiguous_format) if inside else x


def varlen_forward(
    op: FlashOp, q: Tensor, k: Tensor, v: Tensor, calls: tuple[VarlenCall, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Run ``calls`` with ``op`` (schema of ``aten::_flash_attention_forward``) and merge them.

    Args:
        op: the flash forward; arguments that differ between torch versions are left at their defaults.
        q, k, v: ``[T, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D]``.

    Returns:
        ``out [T, H, D]`` and ``lse [H, T]``.
    """
    q, k, v = (_aligned(x) for x in (q, k, v))
    acc = accumulation_dtype(q.dtype)
    out = lse = torch.empty(0)
    for call in calls:
        partial_out, partial_lse = op(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, False, scale=scale
        )[:2]
        if call.causal:
            # With one call alone there is nothing to merge, hence nothing to widen.
            out = partial_out if len(calls) == 1 else partial_out.to(acc)
            lse = partial_lse.to(acc)
        else:
            _merge_used(call.queries, out, lse, partial_out, partial_lse)
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
        do, out: ``[T, H, D]``, the merged output and its gradient; lse: ``[H, T]``, merged.
        q, k, v: as in `varlen_forward`.

    Returns:
        Gradients of q, k and v in float32 or float64, or with one call alone, where nothing is added, as ``op`` gives.
    """
    do, q, k, v, out = (_aligned(x) for x in (do, q, k, v, out))
    # Dropout is off, so the random state is never read; the op still wants the tensors (as in torch's varlen_attn).
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    totals: list[Tensor] = []
    for call in calls:
        lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
        grads = op(do, q, k, v, out, lse, *lengths, 0.0, call.causal, rng_state, unused, scale=scale)
        if call.causal:  # it comes first and reaches every row
            totals = list(grads) if len(calls) == 1 else [grad.to(lse.dtype) for grad in grads]
            continue
        for total, grad, rows in zip(totals, grads, (call.queries, call.keys, call.keys), strict=True):
            _add_used(rows, total, grad)
    return totals[0], totals[1], totals[2]
