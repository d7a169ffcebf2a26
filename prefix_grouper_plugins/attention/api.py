"""shared_prefix_attention(): validates its arguments, then hands them to a backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from prefix_grouper_plugins.attention.backends.dense import dense_attention
from prefix_grouper_plugins.attention.backends.merged_lse import cpu
from prefix_grouper_plugins.attention.bidirectional import attend_within_blocks
from prefix_grouper_plugins.attention.eager import attend, is_in_function_mode, is_traced
from prefix_grouper_plugins.attention.op import attention_op
from prefix_grouper_plugins.attention.registry import BACKEND_NAMES, check_backend_name, choose
from prefix_grouper_plugins.attention.request import Options, Request
from prefix_grouper_plugins.forest import forest_of

if TYPE_CHECKING:
    from prefix_grouper_plugins.layout import PrefixLayout

# A constant, for Dynamo of torch 2.8 to 2.11 cannot trace the question and would break the graph at every layer.
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu") if torch.amp.is_autocast_available(kind)
)
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# Of the options, which are None where the layer has none.
_WHOLE_NUMBER = (type(None), int, torch.SymInt)
_NUMBER = (*_WHOLE_NUMBER, float, torch.SymFloat)


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over a packed forest of rows: query ``q`` sees key ``k`` iff ``k <= q < layout.subtree_end[k]``.

    Every row of the forest gets what causal attention over the row alone would give it. Shared keys and values are read in
    place; only the flash kernels on CUDA get copies of those of short prefixes, which is faster there. Differentiable once in query, key, value and sinks.

    Args:
        query (`Tensor[Q, H, D]`): packed queries, positions (rotary or other) already applied. ``Q == T``, but for a
            layout whose first ``layout.num_given`` tokens are given: those have keys and values only, so
            ``Q == T - layout.num_given``.
        key (`Tensor[T, H_kv, D]`): packed keys; ``H % H_kv == 0``, query head ``h`` reads key head ``h * H_kv // H``.
        value (`Tensor[T, H_kv, D_v]`): packed values; ``D_v`` may differ from ``D`` (multi-head latent attention).
        layout (`PrefixLayout`): which token lies where; ``layout.num_tokens == T``. Tokens of one of ``layout.blocks``
            see each other in both directions.
        scale: factor of the scores, any finite number, by default ``D ** -0.5``.
        sliding_window: a query sees the last ``sliding_window`` tokens of its row only, itself included.
        softcap: scores become ``softcap * tanh(score / softcap)``, after scaling (Gemma 2, arXiv 2408.00118).
        sinks (`Tensor[H]`): for each head one learned logit in the softmax's denominator (gpt-oss).
        backend: ``"auto"`` takes the first of ``"merged_lse"`` (the flash kernels of torch), ``"triton"`` (fused kernels),
            ``"flex"`` (compiled) and ``"blockwise"`` (pure torch) that can serve the call, see `available_backends` and
            docs/attention.md; ``"dense"`` is the oracle with a ``T x T`` mask, for tests. The environment variable
            ``PREFIX_GROUPER_BACKEND`` wins over all but ``"dense"``.

    Returns:
        `Tensor[Q, H, D_v]` in the dtype of ``query``, or in autocast's where that is on: like torch's own attention,
        this one then runs in the lower precision.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit, or the backend asked for by name cannot run them.
    """
    kind = query.device.type
    if kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind):
        query, key, value = (_narrowed(x, torch.get_autocast_dtype(kind)) for x in (query, key, value))
    _check_tensors(query, key, value, layout)
    if not (isinstance(scale, _NUMBER) and isinstance(sliding_window, _WHOLE_NUMBER) and isinstance(softcap, _NUMBER)):
        scale, softcap = _number("scale", scale), _number("softcap", softcap)
        sliding_window = _number("sliding_window", sliding_window)
    _check_options(query, scale, sliding_window, softcap, sinks, backend)
    traced = is_traced(query, key, value, sinks)
    if traced and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        _check_no_function_transform(query, key, value, sinks)
    if backend != "dense" and forward_ad._current_level >= 0:
        _check_no_tangent(query, key, value, sinks)
    if scale is None:
        scale = query.shape[2] ** -0.5
    elif scale <= 0:  # flash kernels take a factor above 0 for granted: they compare scores before they scale them
        query, scale = (-query, -scale) if scale else (query * 0.0, 1.0)
    options, forest_args = Options(float(scale), sliding_window, softcap), (layout.segments, layout.num_given)
    if backend == "dense":
        forest = forest_of(*forest_args)
        options = options._replace(window=forest.effective_window(sliding_window))
        out = dense_attention(query, key, value, forest, options, sinks)
    elif not traced and _is_one_causal_call(query, value, layout, options, sinks, backend):
        out = cpu.causal(query, key, value, options.scale)
    elif traced or is_in_function_mode() or torch._C._is_tracing():  # torch.jit cannot save a Python function
        out, _ = attention_op(query, key, value, *forest_args, sinks, *options, backend)
    else:
        out = attend(query, key, value, *forest_args, sinks, options, backend)
    if layout.blocks is None or (layout.blocks_in_windows_only and sliding_window is None):
        return out
    if softcap is not None or sinks is not None:
        raise ValueError(f"softcap={softcap} and sinks={sinks} do not go together with blocks: set both to None")
    return attend_within_blocks(out, query, key, value, layout, scale=float(scale), window=sliding_window)


def _is_one_causal_call(
    query: Tensor, value: Tensor, layout: PrefixLayout, options: Options, sinks: Tensor | None, backend: str
) -> bool:
    """Whether our backend would call torch's CPU flash kernel once, as where the layout holds one row.

    torch has the derivative of that call itself. Around it ours takes longer than the attention of a short row.
    What traces (torch.compile, make_fx, fake tensors) gets the operator, which is the same for all layouts.
    """
    if not query.is_cpu or sinks is not None or options.softcap is not None or layout.num_given:
        return False
    forest, (_, _, head_dim) = forest_of(layout.segments), query.shape
    if not forest.is_one_row or forest.effective_window(options.window) is not None or value.shape[2] != head_dim:
        return False
    request = Request(query.device, query.dtype, head_dim, head_dim)
    return choose(backend, request) == "merged_lse"


def _check_no_tangent(*tensors: Tensor | None) -> None:
    """The operator has no rule for forward-mode AD, and torch would take its output for a constant."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "shared_prefix_attention has no forward-mode derivative (torch.func.jvp, dual numbers): differentiate in reverse "
            "mode, with torch.autograd.grad say"
        )


def _check_no_function_transform(*tensors: Tensor | None) -> None:
    """torch.func differentiates by rules that neither custom operators nor reads of the layout have."""
    is_tracked = torch._C._functorch.is_gradtrackingtensor  # what tells is not public
    if forward_ad._current_level < 0 and any(x is not None and is_tracked(x) for x in tensors):
        raise ValueError(
            "shared_prefix_attention cannot be differentiated by torch.func (grad, vjp, jacrev): take torch.autograd.grad or "
            "backward()"
        )


def _number(name: str, value: Any) -> Any:
    """``value``, or the Python number in a tensor or in an array of NumPy.

    Raises:
        ValueError: it is none, or a tensor whose gradient would be lost.
    """
    if isinstance(value, _NUMBER):
        return value
    if not hasattr(value, "item"):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}: give a number, or None")
    if getattr(value, "requires_grad", False):
        raise ValueError(
            f"{name}={value!r} would get no gradient: give a number, and multiply query by a scale that is learned"
        )
    return value.item()


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in autocast's dtype; as everywhere in torch, float64 is left alone.

    Rotary embeddings and norms may leave query and key in float32 and value in bfloat16.
    """
    return x.to(dtype) if x.dtype.is_floating_point and x.dtype != torch.float64 else x


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout) -> None:
    if not query.dim() == key.dim() == value.dim() == 3:
        name, x = next((name, x) for name, x in _named(query, key, value) if x.dim() != 3)
        raise ValueError(f"{name} has shape {tuple(x.shape)}: packed [T, heads, head_dim] is needed, no batch axis")
    (queries, heads, head_dim), (tokens, kv_heads, key_dim), (values, value_heads, _) = (
        query.shape,
        key.shape,
        value.shape,
    )
    num_tokens, num_given = layout.num_tokens, layout.num_given
    if queries != num_tokens - num_given:
        given = f", of which {num_given} are given and have no query" if num_given else ""
        raise ValueError(
            f"query has {queries} tokens and the layout {num_tokens}{given}: pack the rows with layout.pack()"
        )
    if not tokens == values == num_tokens or kv_heads != value_heads or key_dim != head_dim:
        raise ValueError(
            f"shapes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; "
            "query [T, H, D], key [T, H_kv, D] and value [T, H_kv, D_v] are needed"
        )
    if not (heads and kv_heads and head_dim):
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} have no heads, or heads without dims")
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not a multiple of {kv_heads} key heads: "
            "each key head serves the same number of query heads"
        )
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in _named(query, key, value))
        raise ValueError(f"dtypes are {dtypes}: cast the three to one floating-point dtype of 16, 32 or 64 bits")
    if not query.device == key.device == value.device:
        devices = ", ".join(f"{name} {x.device}" for name, x in _named(query, key, value))
        raise ValueError(f"devices are {devices}: move the three to one device")


def _named(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[str, Tensor]]:
    return [("query", query), ("key", key), ("value", value)]


def _check_options(
    query: Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
) -> None:
    if (
        backend == "dense" or backend not in BACKEND_NAMES
    ):  # the others look at the environment variable when they choose
        check_backend_name(backend)
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale}: give a finite number, or None for head_dim ** -0.5")
    if sliding_window is not None and not (isinstance(sliding_window, _WHOLE_NUMBER) and sliding_window >= 1):
        raise ValueError(
            f"sliding_window={sliding_window}: give a number of tokens of at least 1, or None for no window"
        )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: give a positive cap that is finite, or None for no cap")
    if sinks is None:
        return
    if sinks.dim() != 1 or sinks.shape[0] != query.shape[1]:
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}: one logit for each of the {query.shape[1]} query heads"
        )
    if sinks.device != query.device or not sinks.dtype.is_floating_point:
        raise ValueError(f"sinks is {sinks.dtype} on {sinks.device}: move it, as floating point, to {query.device}")
