"""Triton backend: one fused kernel each for the forward, dQ and dK/dV of a prefix forest, with every feature.

FlashAttention-2 (arXiv 2307.08691) over the spans of keys that a block of queries sees (`triton_tables`): K and V of a
prefix are read in place by all of its responses, nothing is masked that need not be, and no ``T x T`` tensor exists.
Sums are in float32 and in one order, so gradients are the same in every run with the same tile sizes
(`triton_configs`).

The kernels are imported with the first call, so on a machine without Triton the package works as before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.triton.tables import TABLE_BLOCK, Tables, tables
from prefix_grouper_plugins.attention.device import stream_of, why_not_dtype, why_not_gpu
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.forest import Forest

# The widest head dim for which there are tiles that do not spill registers.
MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
KERNELS = "the Triton kernels"
LOG2_E = 1 / math.log(2)


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on any device: for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_usable(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of ``device``."""
    return _why_not_device(device) is None


def why_not(request: Request) -> str | None:
    """Why this backend cannot serve ``request``, in words; None if it can."""
    if (reason := why_not_dtype(request, KERNELS)) is not None:
        return reason
    head_dim, widest = max(request.head_dim, request.value_dim), MAX_HEAD_DIM[request.dtype]
    if head_dim > widest:
        return f"head dim {head_dim} is above {widest}, the most that the Triton kernels take in {request.dtype}"
    if interpreted() and request.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16 matrices; take float16 or float32"
    return _why_not_device(request.device) or _why_not_compiled(request.device)


def _why_not_compiled(device: torch.device) -> str | None:
    """Triton 3.4 breaks off in its pass TritonGPUHoistTMEMAlloc where it compiles dK and dV for Blackwell; 3.5 does not."""
    if interpreted() or torch.cuda.get_device_capability(device)[0] not in (10, 11) or _triton_version() >= (3, 5):
        return None
    version = ".".join(map(str, _triton_version()))
    return f"Triton {version} does not compile the kernels for compute capability 10.0 and above: upgrade it to 3.5"


@lru_cache
def _triton_version() -> tuple[int, ...]:
    """Major and minor."""
    return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:2]))


def _why_not_device(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if interpreted() else why_not_gpu(device, KERNELS) or _why_not_started()


@lru_cache
def _why_not_started() -> str | None:
    """Triton builds the library by which it talks to the driver when it is first asked: many containers have no compiler."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018 - builds it, or finds it in Triton's cache
    except Exception as error:  # RuntimeError without a compiler, CalledProcessError without Python.h, ...
        return f"Triton does not start on this machine ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


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
        scale, window, softcap: as in `shared_prefix_attention`.

    Returns:
        ``out [T, H, D_v]`` in the query's dtype and ``lse [H, T]`` (of scaled, capped scores, natural log) in float32.
    """
    from prefix_grouper_plugins.attention.backends.triton.forward_kernel import forward_kernel

    q, k, v = (_dense_rows(x) for x in (query, key, value))
    call = _Call(q, k, v, forest, scale, window, softcap)
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    plan = call.plan
    tensors = (q, k, v, out, lse, plan.subtree_end, plan.depth, plan.query_rows, plan.key_spans)
    call.launch("forward", forward_kernel, call.query_grid, (*tensors, *_strides(q, k, v, out), *call.options))
    return out, lse


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
    """Gradients of query, key and value, each in its dtype.

    Args:
        grad_out, out: ``[T, H, D_v]``.
        lse: ``[H, T]``; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, scale, window, softcap: as in `forward`.
    """
    from prefix_grouper_plugins.attention.backends.triton.backward_kernels import dkdv_kernel, dq_kernel

    q, k, v, do, out = (_dense_rows(x) for x in (query, key, value, grad_out, out))
    lse = lse.contiguous()
    call = _Call(q, k, v, forest, scale, window, softcap)
    plan = call.plan
    delta = _delta(do, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inputs = (q, k, v, do, lse, delta)
    per_token = (plan.subtree_end, plan.depth)
    dq_tensors = (*inputs, dq, *per_token, plan.query_rows, plan.key_spans)
    call.launch("dq", dq_kernel, call.query_grid, (*dq_tensors, *_strides(q, k, v, do, dq), *call.options, scale))
    slots = [q.new_empty((plan.num_slots * TABLE_BLOCK, *x.shape[1:]), dtype=torch.float32) for x in (k, v)]
    strides = _strides(q, k, v, do, dk, dv)
    dkdv_tensors = (*inputs, dk, dv, *slots, *per_token, plan.key_rows, plan.query_spans)
    call.launch("dkdv", dkdv_kernel, call.key_grid, (*dkdv_tensors, *strides, *call.options, scale))
    if plan.num_slots:
        for partial, grad in zip(slots, (dk, dv), strict=True):
            _add_slots(partial, grad, plan)
    return dq, dk, dv


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forest: Forest,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        self.tokens, self.heads, self.kv_heads = *query.shape[:2], key.shape[1]
        self.device, self.itemsize = query.device, query.element_size()
        self.plan = tables(forest, window, self.kv_heads, query.device, stream_of(query.device))
        inner, outer = (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)
        self.options = (self.tokens, self.heads // self.kv_heads, window or 0, inner, outer)
        self.constants = {
            "HEAD_DIM": query.shape[2],
            "VALUE_DIM": value.shape[2],
            "HEAD_PADDED": _padded(query.shape[2]),
            "VALUE_PADDED": _padded(value.shape[2]),
            "WINDOWED": window is not None,
            "CAPPED": softcap is not None,
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
            launch(name, kernel, grid, arguments, self.constants, self.itemsize, capability, self.tokens)


def _padded(dim: int) -> int:
    """Columns of a tile: a power of two, and at least what the matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` with a dense last dimension; other strides are the kernels' business."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Stride of tokens and of heads, for each of ``[T, heads, D]``."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


# Rows of a program in the kernels that only add up.
ROWS = 64


def _delta(grad_out: Tensor, out: Tensor) -> Tensor:
    """``sum(dO * O)`` over dims, ``[H, T]`` in float32."""
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
