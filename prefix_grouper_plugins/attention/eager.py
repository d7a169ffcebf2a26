"""Attention past the custom operators: torch takes longer to dispatch one with a backward than its functions take.

`torch.autograd.Function` calls the functions of the operators instead, under the conditions that they have there. Whoever
looks at operators (torch.compile, selective checkpointing, fake tensors, a FLOP counter) has to see ours, so `is_traced` is
asked in the forward and again in the backward. A mode of functions (a default device) gets the operators too, in which it
changes nothing.

Where hooks are there for all that is saved, it saves what the operator saves, in the same order: a layer that is checkpointed
under a mode of functions may run again without it, since torch takes such modes off for `Tensor.backward`, and so may one
whose operators are counted in one pass only. Where none are, copies of keys and values that the backward needs too are saved in
their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefix_grouper_plugins.attention import op
from prefix_grouper_plugins.attention.backends import merged_lse
from prefix_grouper_plugins.attention.request import Options

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_BATCHED_GRADIENTS = torch._C._parse_dispatch_key("VmapMode")  # torch.autograd.grad(is_grads_batched=True)


def is_traced(first: Tensor, *others: Tensor | None) -> bool:
    """Whether a trace, a mode of operators, a transform of functions or a subclass of tensors gets to see those of a call.

    So does the meta device, for which operators know shapes, and backends nothing.
    """
    return (
        torch.compiler.is_compiling()
        or first.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS)  # type: ignore[arg-type]
        or not _PLAIN.issuperset(map(type, (first, *others)))
    )


def is_in_function_mode() -> bool:
    """Whether a mode changes functions, also those that attention would call."""
    return bool(torch._C._len_torch_function_stack() > 0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    options: Options,
    backend: str,
) -> Tensor:
    """``out [Q, H, D_v]`` in the query's dtype, of arguments that are already validated, where nothing traces."""
    call = op.prepare(query, value, segments, num_given, options, backend)
    arguments = (segments, num_given, *options, backend)
    return SharedPrefixAttention.apply(query, key, value, sinks, (call, arguments))  # type: ignore[no-any-return]


class SharedPrefixAttention(torch.autograd.Function):
    """The forward and backward of the operators, whose derivative is taken once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        call: tuple[op.Call, tuple[Any, ...]],
    ) -> Tensor:
        ctx.call, (segments, *ctx.arguments) = call
        with torch._C._AutoDispatchBelowAutograd():
            ctx.copies = _copies_to_save(ctx.call, query, key)
            if ctx.copies is not None:
                key, value = ctx.copies.of(key, value)
            out, lse = op.forward(ctx.call, query, key, value, sinks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, segments, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_out is None:
            return (None,) * 5
        query, key, value, out, lse, segments, sinks = ctx.saved_tensors  # hooks may return others than were saved
        tensors = (grad_out, query, key, value, out, lse)
        if torch.is_grad_enabled() or is_traced(*tensors, sinks) or is_in_function_mode():
            if ctx.copies is not None:
                tensors = (grad_out, query, ctx.copies.undo(key), ctx.copies.undo(value), out, lse)
            num_given, *options = ctx.arguments  # the operator refuses a second derivative
            dq, dk, dv, dsinks = op.attention_backward_op(*tensors, segments, num_given, sinks, *options)
            return dq, dk, dv, None if sinks is None else dsinks, None
        with torch._C._AutoDispatchBelowAutograd():
            grads = op.backward(ctx.call, *tensors, sinks)
        return *grads, None


def _copies_to_save(call: op.Call, query: Tensor, key: Tensor) -> merged_lse.Copies | None:
    """The copies of keys and values to save instead of them, or None."""
    if call.backend != "merged_lse" or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    if query.is_cuda:
        op.refuse_capture(query.device)  # before tables go to the device
    return merged_lse.copies_for_both(query, key, call.forest)
