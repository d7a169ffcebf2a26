"""A flash attention that computes nothing: its shapes, what it keeps for the backward, and its FLOPs. For flops.py.

On the meta device torch's own attention falls back to plain products, which keep the scores and count every pair. The
paper's algorithm would run on flash kernels, so it is counted on this: visible pairs, as the caller states them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula


@library.custom_op("benchmarks::flash", mutates_args=())
def _flash(query: Tensor, key: Tensor, value: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("this attention is for the meta device")


@library.custom_op("benchmarks::flash_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("this attention is for the meta device")


@_flash.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_flash_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@register_flop_formula(torch.ops.benchmarks.flash, get_raw=True)
def _flops(query: Tensor, key: Tensor, value: Tensor, pairs: int, **kwargs: Any) -> int:
    return 4 * query.shape[1] * query.shape[3] * pairs


@register_flop_formula(torch.ops.benchmarks.flash_backward, get_raw=True)
def _backward_flops(grad: Tensor, query: Tensor, *rest: Any, **kwargs: Any) -> int:
    return 10 * query.shape[1] * query.shape[3] * rest[-1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pairs = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_flash_backward(grad, *ctx.saved_tensors, ctx.pairs), None)


_flash.register_autograd(_backward, setup_context=_setup)


def flash(query: Tensor, key: Tensor, value: Tensor, pairs: int) -> Tensor:
    """``[B, H, N, D]`` on the meta device; ``pairs``: visible pairs of all ``B`` rows, one head."""
    return _flash(query, key, value, pairs)[0]
