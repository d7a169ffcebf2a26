"""Attention of a transformers model, switched to the shared-prefix core wherever a layout is present.

transformers looks its attention up by the name in ``config._attn_implementation`` (``AttentionInterface``; its masks in
``AttentionMaskInterface``). We register one name for each implementation that a user may have chosen, say
``prefix_grouper:auto:sdpa``: with a layout it runs the shared-prefix core, without one it calls exactly what ``sdpa``
would have called, so that generation, evaluation and reward models do not notice. The name is the only state, but for
hooks that check packed calls and for windows that only a mask would express.

How the layout gets there is in modeling/carrier.py. Mixers past this interface are in modeling/mixers/.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, given_layout, is_placeholder, layout_of_layer
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.implementations import BY_MASK, ignored_by
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout, sequence_parallel_attention

_NAME = "prefix_grouper"
WINDOW_OF_MASK = "_window_of_mask"  # on layers whose mask has another window than their attention is called with


def is_ours(config: Any) -> bool:
    """Whether ``config`` names an implementation that :func:`register` made."""
    return config._attn_implementation.startswith(f"{_NAME}:")


def base_implementation(name: str) -> str:
    """The user's own implementation that a registered name contains: ``prefix_grouper:auto:sdpa`` -> ``sdpa``."""
    return name.split(":", 2)[2] if name.startswith(f"{_NAME}:") else name


def register(base: str, backend: str) -> str:
    """Make the name known to both interfaces of transformers, and return it."""
    name = f"{_NAME}:{backend}:{base}"
    # What `base` ignores is asked here and not at each call: Dynamo traces through caches, and warns of it.
    AttentionInterface.register(
        name, functools.partial(_attention, base=base, backend=backend, ignored=ignored_by(base))
    )
    masks = AttentionMaskInterface()
    # A name that the mask registry does not know gets no mask at all, which would break left-padded generation. Bases
    # without a mask function of their own (kernels from the hub) keep none.
    if base in masks:
        AttentionMaskInterface.register(name, masks[base])
    return name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    base: str,
    backend: str,
    ignored: frozenset[str],
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function: ``query [1, H, T, D]``, ``key``/``value [1, H_kv, T, D]`` -> ``[1, T, H, D]``."""
    layout: Any = given_layout(kwargs.pop(LAYOUT_KWARG, None), attention_mask)
    if layout is None:
        layout = layout_of_layer()
    if layout is None:
        if is_placeholder(attention_mask) and query.shape[2] > 1:
            raise RuntimeError(f"{type(module).__name__} runs in a packed forward, but the layout was lost on the way")
        own, layer = _own_attention(module, base), module
        if base not in BY_MASK:
            # transformers' flash attention loads the kernel that the layer's config names, and knows none by our name.
            layer = _With(module, config=_With(module.config, _attn_implementation=base))  # type: ignore[assignment]
        return own(layer, query, key, value, attention_mask, *args, **kwargs)
    if attention_mask is not None and not is_placeholder(attention_mask):
        raise UnsupportedModelError(
            f"{type(module).__name__} got a mask of {tuple(attention_mask.shape)} of the model's own making, which the "
            "shared-prefix core does not apply"
        )
    _check_packed_call(module, query, layout, base, ignored, args, kwargs)
    packed_key, packed_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if isinstance(layout, PrefixLayout) and layout.cache is not None:
        packed_key, packed_value = layout.cache.join(module, packed_key, packed_value, layout)
    attention = sequence_parallel_attention if isinstance(layout, ShardedLayout) else shared_prefix_attention
    output = attention(
        query[0].transpose(0, 1),
        packed_key,
        packed_value,
        layout,
        scale=kwargs.get("scaling"),
        sliding_window=_window(module, base, kwargs.get("sliding_window")),
        softcap=None if "softcap" in ignored else kwargs.get("softcap"),
        sinks=None if "s_aux" in ignored else kwargs.get("s_aux"),
        backend=backend,
    )
    return output.unsqueeze(0), None


class _With:
    """``owner``, some of whose attributes have the values given."""

    def __init__(self, owner: Any, **values: Any) -> None:
        self._owner = owner
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)


def _check_packed_call(
    module: nn.Module,
    query: Tensor,
    layout: PrefixLayout | ShardedLayout,
    base: str,
    ignored: frozenset[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Refuse whatever the core would not reproduce."""
    where = type(module).__name__
    expected = layout.num_queries if isinstance(layout, PrefixLayout) else layout.num_tokens
    if query.shape[0] != 1 or query.shape[2] != expected:
        raise ValueError(
            f"{where} got queries for {query.shape[0]} row(s) of {query.shape[2]} tokens with a layout of "
            f"{expected} tokens: a packed batch is one row, and nothing may be cached, padded or cut on the way"
        )
    if args:
        raise UnsupportedModelError(f"{where} passes {len(args)} unnamed argument(s) to its attention function")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnsupportedModelError(f"{where} is not causal, so a prefix would depend on what follows it")
    if kwargs.get("dropout"):
        raise UnsupportedModelError(
            f"{where} applies attention dropout ({kwargs['dropout']}), which the shared-prefix core does not: "
            "set `attention_dropout` to 0 in the model's config"
        )
    for name in ("position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{where} passes `{name}`, which the shared-prefix core does not apply")
    if kwargs.get("output_attentions"):
        raise ValueError("attention weights are not available in a packed forward: set `output_attentions=False`")
    if base == "sdpa" and kwargs.get("softcap") is not None and "softcap" not in ignored:
        raise UnsupportedModelError(
            f'{where} has a softcap, which transformers\' sdpa refuses: load the model with `attn_implementation="eager"`'
        )


def _window(module: nn.Module, base: str, passed: int | None) -> int | None:
    """The sliding window that ``base`` applies in an ordinary forward: that of the mask, or the one that it is called with."""
    if base in BY_MASK:
        return getattr(module, WINDOW_OF_MASK, passed)
    return passed


def _own_attention(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model's own code would have looked up for ``base``."""
    namespace = _namespace(type(module))  # type: ignore[arg-type]
    eager = namespace.get("eager_attention_forward")
    if base == "eager":
        if eager is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function to go back to")
        return eager
    # A modeling file may override single functions in an instance of its own.
    return namespace.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[base]


def _namespace(cls: type[nn.Module]) -> dict[str, Any]:
    """Globals of the file in which the attention class ``cls`` has its forward."""
    own = getattr(cls, "_prefix_grouper_base", cls)  # of a mixer that uses the interface inside
    return inspect.unwrap(own.forward).__globals__
