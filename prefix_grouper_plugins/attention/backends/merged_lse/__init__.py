"""Merged-LSE backend: the flash kernels that torch ships, called on rectangles of the forest, merged by log-sum-exp.

A forest's visible pairs are one causal triangle for each segment (its tokens among themselves) and one full rectangle
for each inner segment (all its descendants on its keys). Hydragen (arXiv 2402.05099) merges such partial attentions by
their log-sum-exp at decoding. Here training is exact too: a flash backward recomputes ``p = exp(s - lse)`` and
``delta = sum(dO * O)``, so calling it once for each partial with the MERGED ``O`` and ``lse`` yields that partial's
share of the true gradients, and the shares add up (the argument of Ring Attention, arXiv 2310.01889). Merging and sums
are computed in float32, or float64 for float64.

Given tokens have keys only: they have no triangle, and their keys are one rectangle with the queries that see them.

`cpu` calls torch's CPU flash kernel on each triangle and rectangle, `cuda` its varlen kernels on whole levels of the tree. Keys
of levels that are short are copied there instead (`gathered`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse import cpu, cuda
from prefix_grouper_plugins.attention.backends.merged_lse.gathered import Copies
from prefix_grouper_plugins.attention.device import why_not_flash
from prefix_grouper_plugins.attention.request import Options, Request
from prefix_grouper_plugins.forest import Forest


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
    return why_not_flash(request.device, _kernel_head_dim(request.head_dim, request.value_dim, request.device))


def _kernel_head_dim(head_dim: int, value_dim: int, device: torch.device) -> int:
    """The one head dim that the kernels see; on CUDA it is a multiple of 8."""
    widest = max(head_dim, value_dim)
    return widest if device.type == "cpu" else -(-widest // 8) * 8


def _padding(query: Tensor, value: Tensor) -> int:
    """The head dim to pad to, or 0 where nothing is padded: heads as the kernels take them."""
    dim, value_dim = query.shape[2], value.shape[2]
    if dim == value_dim and (query.is_cpu or dim % 8 == 0):
        return 0
    return _kernel_head_dim(dim, value_dim, query.device)


def _padded(head_dim: int, *tensors: Tensor) -> Iterator[Tensor]:
    """``tensors`` with zeros up to ``head_dim``, which change neither scores nor the used part of the output."""
    for x in tensors:  # padding by nothing would copy
        yield x if x.size(-1) == head_dim else F.pad(x, (0, head_dim - x.size(-1)))


def copies_for_both(query: Tensor, key: Tensor, forest: Forest) -> Copies | None:
    """What a forward and its backward may be given in place of keys and values: copies that both of them make. None if they do not."""
    return (cpu if query.is_cpu else cuda).copies_for_both(query, key, forest)


def forward(query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        query, key, value: ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D_v]``, ``Q = forest.num_queries``; or the copies of
            key and value that `copies_for_both` gives.
        forest: of the layout.
        options: of the layer, without window and softcap; see `why_not`.

    Returns:
        ``out [Q, H, D_v]`` in float32, float64 or the query's dtype, and ``lse [H, Q]`` in float32 or float64.
    """
    assert options.window is None and options.softcap is None, "why_not() has a reason against these requests"
    path = cpu if query.is_cpu else cuda
    if head_dim := _padding(query, value):
        out, lse = path.forward(*_padded(head_dim, query, key, value), forest, options.scale)
        return out[..., : value.size(-1)], lse
    return path.forward(query, key, value, forest, options.scale)


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
    """Gradients of query, key and value, not of their copies, in float32, float64 or the query's dtype.

    Args:
        grad_out, out: ``[Q, H, D_v]``; ``out`` merged, in the query's dtype.
        lse: ``[H, Q]`` merged; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, options: as in `forward`.
    """
    assert options.window is None and options.softcap is None, "why_not() has a reason against these requests"
    path, tensors = cpu if query.is_cpu else cuda, (grad_out.contiguous(), query, key, value, out)
    if head_dim := _padding(query, value):
        grads = path.backward(*_padded(head_dim, *tensors), lse.contiguous(), forest, options.scale)
        dq, dk, dv = (grad[..., : x.size(-1)] for grad, x in zip(grads, (query, key, value), strict=True))
        return dq, dk, dv
    return path.backward(*tensors, lse.contiguous(), forest, options.scale)
