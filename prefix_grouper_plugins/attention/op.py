"""The custom operators ``prefix_grouper::shared_prefix_attention`` and its backward.

One operator hides everything that depends on the layout (plans, a window that hides nothing, the choice of a backend)
from ``torch.compile``, which sees tensors alone and so compiles once for all layouts. Being an operator it also works
with gradient checkpointing of both kinds, selective checkpointing and saved-tensor hooks. Saved for the backward are
query, key, value, the output and the merged log-sum-exp. Where nothing traces, the same `forward` and `backward` are called
without the operators (`eager`).

Attention sinks belong here: a sink is one more partial with output 0 and a constant log-sum-exp, whatever the backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from prefix_grouper_plugins.attention.device import accumulation_dtype, cast
from prefix_grouper_plugins.attention.first_derivative import no_second_derivative
from prefix_grouper_plugins.attention.registry import choose, run
from prefix_grouper_plugins.attention.request import Options, Request
from prefix_grouper_plugins.forest import Forest, forest_of

_OPTIONS = "Tensor segments, SymInt num_given, Tensor? sinks, float scale, SymInt? window, float? softcap, str backend"
# A replayed CUDA graph repeats the plans of the call that it captured, whatever the segments on the host say by then. Since
# torch 2.9, which brought the tag, inductor captures operators with arguments on the CPU too, unless they are marked.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@library.custom_op(
    "prefix_grouper::shared_prefix_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D_v]`` in the query's dtype and ``lse [H, Q]`` (not differentiable); arguments already validated."""
    call = prepare(query, value, segments, num_given, Options(scale, window, softcap), backend)
    return forward(call, query, key, value, sinks)


@library.custom_op(
    "prefix_grouper::shared_prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
def attention_backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty without sinks), each in its input's dtype."""
    call = prepare(query, value, segments, num_given, Options(scale, window, softcap), backend)
    dq, dk, dv, dsinks = backward(call, grad_out, query, key, value, out, lse, sinks)
    return dq, dk, dv, query.new_empty(0) if dsinks is None else dsinks


class Call(NamedTuple):
    """What the operators' arguments come to, alike in forward and backward.

    Attributes:
        forest: of the layout.
        options: with the window that is left of theirs.
        request: what the backend has to serve.
        backend: the one that is chosen for it.
    """

    forest: Forest
    options: Options
    request: Request
    backend: str


def prepare(query: Tensor, value: Tensor, segments: Tensor, num_given: int, options: Options, backend: str) -> Call:
    """The `Call` of an operator's arguments.

    Raises:
        ValueError: the backend asked for by name cannot serve the request.
    """
    forest = forest_of(segments, num_given)
    if options.window is not None:
        options = options._replace(window=forest.effective_window(options.window))
    request = Request(query.device, query.dtype, query.shape[2], value.shape[2], options.window, options.softcap)
    return Call(forest, options, request, choose(backend, request))


def forward(call: Call, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D_v]`` in the query's dtype and ``lse [H, Q]``, both contiguous.

    Raises:
        RuntimeError: the current stream is recording a CUDA graph.
    """
    if query.is_cuda:
        refuse_capture(query.device)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # it would narrow the matrix products
        with torch.autocast(kind, enabled=False):
            return forward(call, query, key, value, sinks)
    out, lse = run(call.backend, call.request, "forward", query, key, value, call.forest, call.options)
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out, lse = out * (lse - merged).exp_().t()[..., None], merged
    return cast(out, query.dtype).contiguous(), lse.contiguous()  # as the operators promise it


def backward(
    call: Call,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and sinks (None without sinks), each in its input's dtype.

    Raises:
        RuntimeError: the current stream is recording a CUDA graph.
    """
    if query.is_cuda:
        refuse_capture(query.device)
    kind, tensors = query.device.type, (grad_out, query, key, value, out, lse)
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return backward(call, *tensors, sinks)
    grads = run(call.backend, call.request, "backward", *tensors, call.forest, call.options)
    dq, dk, dv = [cast(grad, query.dtype).contiguous() for grad in grads]
    if sinks is None:
        return dq, dk, dv, None
    delta_HT = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
    dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp_() * delta_HT).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)


def refuse_capture(device: torch.device) -> None:
    """
    Raises:
        RuntimeError: the current stream is recording a CUDA graph.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "shared_prefix_attention is being captured into a CUDA graph, whose replays would take the layout of this call "
            "for that of every batch: leave packed forwards and backwards out of CUDA graphs"
        )


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    queries, heads, _ = query.shape
    lse = query.new_empty((heads, queries), dtype=accumulation_dtype(query.dtype))
    return query.new_empty((queries, heads, value.shape[2])), lse


@attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (query.new_empty(x.shape) for x in (query, key, value))
    return dq, dk, dv, query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, ctx.num_given, sinks, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, lse, segments, sinks)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    *tensors, segments, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_backward_op(grad_out, *tensors, segments, ctx.num_given, sinks, *ctx.options)
    return dq, dk, dv, None, None, None if sinks is None else dsinks, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_setup_context)


attention_backward_op.register_autograd(no_second_derivative)
