"""The launches of the Triton kernels. The kernels are imported with the first call: triton may not be installed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.triton.tables import TABLE_BLOCK, Tables, tables
from prefix_grouper_plugins.attention.device import dense_rows, interpreted, stream_of
from prefix_grouper_plugins.attention.request import Options
from prefix_grouper_plugins.forest import Forest

LOG2_E = 1 / math.log(2)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        query, key, value: ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D_v]``, ``Q = forest.num_queries``.
        forest: of the layout.
        options: of the layer.

    Returns:
        ``out [Q, H, D_v]`` in the query's dtype and ``lse [H, Q]`` (of scaled, capped scores, natural log) in float32.
    """
    from prefix_grouper_plugins.attention.backends.triton.forward_kernel import forward_kernel

    q, k, v = (dense_rows(x) for x in (query, key, value))
    call = _Call(q, k, v, forest, options)
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    plan = call.plan
    tensors = (q, k, v, out, lse, plan.subtree_end, plan.depth, plan.query_rows, plan.key_spans)
    call.launch("forward", forward_kernel, call.query_grid, (*tensors, *_strides(q, k, v, out), *call.numbers))
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its dtype.

    Args:
        grad_out, out: ``[Q, H, D_v]``.
        lse: ``[H, Q]``; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, options: as in `forward`.
    """
    from prefix_grouper_plugins.attention.backends.triton.backward_kernels import dkdv_kernel, dq_kernel

    q, k, v, do, out = (dense_rows(x) for x in (query, key, value, grad_out, out))
    lse = lse.contiguous()
    call = _Call(q, k, v, forest, options)
    plan = call.plan
    delta = _delta(do, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (q, k, v, do, lse, delta)
    per_token = (plan.subtree_end, plan.depth)
    dq_tensors = (*inputs, dq, *per_token, plan.query_rows, plan.key_spans)
    call.launch(
        "dq", dq_kernel, call.query_grid, (*dq_tensors, *_strides(q, k, v, do, dq), *call.numbers, options.scale)
    )
    slots = [q.new_empty((plan.num_slots * TABLE_BLOCK, *x.shape[1:]), dtype=torch.float32) for x in (k, v)]
    strides = _strides(q, k, v, do, dk, dv)
    dkdv_tensors = (*inputs, dk, dv, *slots, *per_token, plan.key_rows, plan.query_spans)
    call.launch("dkdv", dkdv_kernel, call.key_grid, (*dkdv_tensors, *strides, *call.numbers, options.scale))
    if plan.num_slots:
        for partial, grad in zip(slots, (dk, dv), strict=True):
            _add_slots(partial, grad, plan)
    return dq, dk, dv


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> None:
        self.queries, self.heads, self.kv_heads = *query.shape[:2], key.shape[1]
        self.device, self.itemsize = query.device, query.element_size()
        self.plan = tables(forest, options.window, self.kv_heads, query.device, stream_of(query.device))
        scale, cap = options.scale, options.softcap
        inner, outer = (scale * LOG2_E, 0.0) if cap is None else (scale / cap, cap * LOG2_E)
        group = self.heads // self.kv_heads
        self.numbers = (forest.num_tokens, forest.num_given, group, options.window or 0, inner, outer)
        self.constants = {
            "HEAD_DIM": query.shape[2],
            "VALUE_DIM": value.shape[2],
            "HEAD_PADDED": _padded(query.shape[2]),
            "VALUE_PADDED": _padded(value.shape[2]),
            "WINDOWED": options.window is not None,
            "CAPPED": cap is not None,
            "TABLE_BLOCK": TABLE_BLOCK,
        }

    def query_grid(self, tiles: dict[str, int]) -> tuple[int, int]:
        return len(self.plan.query_rows) * (TABLE_BLOCK // tiles["BLOCK_M"]), self.heads

    def key_grid(self, tiles: dict[str, int]) -> tuple[int, int]:
        return len(self.plan.key_rows) * (TABLE_BLOCK // tiles["BLOCK_N"]), self.kv_heads

    def launch(self, name: str, kernel: Any, grid: Any, arguments: tuple[Any, ...]) -> None:
        from prefix_grouper_plugins.attention.backends.triton.configs import launch

        with torch.cuda.device_of(arguments[0]):
            capability = None if interpreted() else torch.cuda.get_device_capability(self.device)
            launch(name, kernel, grid, arguments, self.constants, self.itemsize, capability, self.queries)


def _padded(dim: int) -> int:
    """Columns of a tile: a power of two, and at least what the matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Stride of tokens and of heads, for each of ``[T, heads, D]``."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


# Rows of a program in the kernels that only add up.
ROWS = 64


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """``sum(dO * O)`` over dims, ``[H, Q]`` in float32."""
    from prefix_grouper_plugins.attention.backends.triton.backward_kernels import delta_kernel

    tokens, heads, dim = out.shape
    delta = out.new_empty((heads, tokens), dtype=torch.float32)
    constants = {"VALUE_DIM": dim, "VALUE_PADDED": _padded(dim), "BLOCK_M": ROWS}
    with torch.cuda.device_of(out):
        strides = _strides(grad_out, out)
        delta_kernel[(-(-tokens // ROWS), heads)](grad_out, out, delta, *strides, tokens, **constants)
    return delta


def _add_slots(slots: Tensor, grad: Tensor, plan: Tables) -> None:
    """Write the sums of ``slots [slots * TABLE_BLOCK, H_kv, D]`` to their blocks of ``grad [T, H_kv, D]``."""
    from prefix_grouper_plugins.attention.backends.triton.backward_kernels import add_slots_kernel

    tokens, heads, dim = grad.shape
    rows = min(ROWS, TABLE_BLOCK)
    constants = {"DIM": dim, "PADDED": _padded(dim), "TABLE_BLOCK": TABLE_BLOCK, "BLOCK_M": rows}
    with torch.cuda.device_of(grad):
        grid = (len(plan.split_rows) * (TABLE_BLOCK // rows), heads)
        add_slots_kernel[grid](slots, grad, plan.split_rows, *_strides(grad), tokens, **constants)
