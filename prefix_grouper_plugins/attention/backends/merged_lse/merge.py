"""Merging partial outputs by their log-sum-exp, adding partial gradients in place, and summing those of copies.

All compute in float32, or float64 for float64, whatever they read and write. With Triton each is one kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.device import accumulation_dtype, interpreted, why_not_triton


def merge(out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor, gaps: Tensor | None = None) -> None:
    """Merge one partial into ``out`` and ``lse``, in place.

    Args:
        out, partial_out: ``[N, H, D]``, in any dtypes; ``out`` finite.
        lse, partial_lse: ``[H, N]`` in float32 or float64; ``lse`` finite.
        gaps: ``BoolTensor[N]``, True where the partial says nothing, whatever it holds there; None for no such row.
    """
    fused = _fused(out, lse)
    if fused is not None:
        fused.merge(out, lse, partial_out, partial_lse, gaps)
        return
    if gaps is not None:
        partial_out = partial_out.masked_fill(gaps[:, None, None], 0.0)
        partial_lse = partial_lse.masked_fill(gaps, -torch.inf)  # their weight is 0: gaps keep their row
    # exp(partial_lse - merged), where merged = logaddexp(lse, partial_lse); the old rows weigh what is left of 1.
    weight = torch.sigmoid(partial_lse - lse).t()[..., None]
    partial = partial_out.to(lse.dtype)
    if out.dtype == lse.dtype:
        out.lerp_(partial, weight)  # one pass over the rows, where two products and a sum were three
    else:
        out.copy_(torch.lerp(out.to(lse.dtype), partial, weight))
    lse.copy_(torch.logaddexp(lse, partial_lse))


def add(totals: list[Tensor], partials: list[Tensor], gaps: list[Tensor | None] | None) -> None:
    """``total += partial`` for each of them outside of its ``gaps``, ``[N, H, D]`` each, in any dtypes; None for no gaps."""
    if gaps is None and totals[0].dtype == partials[0].dtype:
        torch._foreach_add_(totals, partials)  # one kernel for all, which adds in float32 inside
        return
    gaps = gaps or [None] * len(totals)
    for total, partial, gap in zip(totals, partials, gaps, strict=True):
        fused = _fused(total, total)
        if fused is not None:
            fused.accumulate(total, partial, gap)
        else:
            total += partial if gap is None else partial.masked_fill(gap[:, None, None], 0.0)


def sum_copies(grad: Tensor, key_of: Tensor, copies: Tensor, first_copy: Tensor) -> Tensor:
    """Gradient of each key, from those of its copies.

    Args:
        grad: ``[C, H_kv, D]``, of the copies.
        key_of: ``IntTensor[C]``, the key that each copy was made of.
        copies: ``IntTensor[C]``, rows of ``grad`` ordered by key; first_copy: ``IntTensor[T + 1]``, where those of each key
            begin in it.

    Returns:
        ``[T, H_kv, D]`` in the dtype of ``grad``; zero for keys without copies.
    """
    shape = (len(first_copy) - 1, *grad.shape[1:])
    fused = _fused(grad, grad)
    if fused is not None:
        total = grad.new_empty(shape)
        fused.sum_copies(grad.contiguous(), copies, first_copy, total)
        return total
    sums = grad.new_zeros(shape, dtype=accumulation_dtype(grad.dtype))
    return sums.index_add_(0, key_of, grad.to(sums.dtype)).to(grad.dtype)


def _fused(x: Tensor, sums: Tensor) -> Any:
    """The module of fused kernels where they can run, else None."""
    if sums.dtype == torch.float64 or (x.device.type == "cpu" and not interpreted()):
        return None
    return _fused_on(x.device, interpreted())


@lru_cache  # asked four times for each layer, and the answer takes some microseconds
def _fused_on(device: torch.device, interpreted: bool) -> Any:
    if why_not_triton(device, "the fused merges") is not None:
        return None
    from prefix_grouper_plugins.attention.backends.merged_lse import fused

    return fused
