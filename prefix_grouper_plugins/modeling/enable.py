"""Packed rows on and off for a model: implementation names, hooks that check packed calls, and classes of mixers.

Nothing is decided here: what a model is made of decides (modeling/support/), and sharing.py calls this.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prefix_grouper_plugins.attention.registry import check_backend_name
from prefix_grouper_plugins.modeling.anatomy import Anatomy, decoder_of, transformers_model
from prefix_grouper_plugins.modeling.attention import WINDOW_OF_MASK, base_implementation, is_ours, register
from prefix_grouper_plugins.modeling.carrier import (
    LAYOUT_KWARG,
    FalseIfEnabled,
    ModelForward,
    PackedLayer,
    disabled_too_early,
    given_layout,
)
from prefix_grouper_plugins.modeling.column_positions import PackedPositions
from prefix_grouper_plugins.modeling.mixers.on_rows import PackedMixer, variable_keywords
from prefix_grouper_plugins.modeling.mixers.table import mixer_of
from prefix_grouper_plugins.modeling.rope import RowLimit
from prefix_grouper_plugins.modeling.support.masks import windows_by_mask


def enable_layers(anatomy: Anatomy, backend: str) -> None:
    """Let the layers of a model, which :func:`check_support` knows, take packed rows. In place and idempotent.

    Raises:
        ValueError: there is no such backend.
    """
    check_backend_name(backend)
    # Attention with code of its own may compare the name.
    configs = anatomy.configs if anatomy.attention_layers else []
    for config in configs:
        config._attn_implementation = register(base_implementation(config._attn_implementation), backend)
    _forget_windows(anatomy)
    windows = windows_by_mask(anatomy.text_models, anatomy.attention_layers)
    for layer in anatomy.attention_layers:
        if layer.name in windows:
            setattr(layer.module, WINDOW_OF_MASK, windows[layer.name])
    _unhook(anatomy, "belongs_to_enabling", "belongs_to_disabling")
    base = anatomy.base
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters or bool(
        anatomy.column_positions
    )
    base.register_forward_pre_hook(
        functools.partial(_check_call, configs=configs, takes_positions=takes_positions), with_kwargs=True
    )
    for model in anatomy.models:  # an inner one may be called by itself
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    for module, limits in anatomy.modules_with_row_limit:
        check = functools.partial(_check_positions, limit=min(limits))
        module.register_forward_pre_hook(check, with_kwargs=True)
    _enable_mixers(anatomy)


def disable_prefix_grouper(model: nn.Module) -> nn.Module:
    """Give every attention layer of ``model`` back the implementation that it had. In place and idempotent.

    Under gradient checkpointing attention layers keep a hook that refuses the backward of packed forwards from before, which would
    run them again.
    """
    anatomy = Anatomy(model)
    if has_layers_enabled(anatomy) and any(module.gradient_checkpointing for module in anatomy.checkpointable):
        for _, module in anatomy.attention_layers:
            module.register_forward_pre_hook(_refuse_late_backward, with_kwargs=True)
    for config in anatomy.configs:
        config._attn_implementation = base_implementation(config._attn_implementation)
    _unhook(anatomy, "belongs_to_enabling")
    _forget_windows(anatomy)
    _disable_mixers(anatomy)
    return model


def _forget_windows(anatomy: Anatomy) -> None:
    for _, module in anatomy.modules:
        module.__dict__.pop(WINDOW_OF_MASK, None)


def _unhook(anatomy: Anatomy, *marks: str) -> None:
    """Remove the pre-hooks whose functions have one of these attributes."""
    for _, module in anatomy.modules:  # not by the handles: those of a copied model belong to the original
        hooks = {key: getattr(hook, "func", hook) for key, hook in module._forward_pre_hooks.items()}
        for key in [key for key, function in hooks.items() if any(hasattr(function, mark) for mark in marks)]:
            # Not `_forward_pre_hooks_with_kwargs`: an earlier hook may take these away while torch goes through them.
            del module._forward_pre_hooks[key]


def _check_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], configs: list[Any], takes_positions: bool
) -> None:
    """Forward pre-hook: refuse a packed call that a model would read otherwise than its layout says."""
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is None:
        return
    others = [config._attn_implementation for config in configs if not is_ours(config)]
    if others:
        raise ValueError(
            f"the attention implementation has become {others[0]!r} since enable_prefix_grouper(model), and would read the "
            "packed row as one text: call enable_prefix_grouper(model) again"
        )
    if takes_positions and kwargs.get("position_ids") is None and len(args) < 3:
        raise ValueError(
            "a packed call has no `position_ids`, so that its tokens would be counted through: pass what "
            "packed_inputs(layout, input_ids) returns"
        )
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ValueError(
            "the model would shift `labels` along the packed row, from one response to the next: compare its logits with "
            "layout.labels(rows)"
        )


def _without_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: ``use_cache=False`` in a packed call. It also marks a model as enabled."""
    return (args, {**kwargs, "use_cache": False}) if isinstance(kwargs.get("use_cache"), FalseIfEnabled) else None


def _refuse_late_backward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of attention that is not enabled any longer: nothing else is hooked where a checkpoint runs again."""
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is not None:
        raise disabled_too_early(module)


def _check_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], limit: RowLimit) -> None:
    """Forward pre-hook: refuse a packed row in which a row is so long that it would change the angles of the others."""
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is None:
        return
    positions = kwargs.get("position_ids")
    longest = limit.length if positions is None else int(positions.max()) + 2  # a row's last token is not forwarded
    if longest >= limit.length:
        raise ValueError(
            f"a row reaches {longest} tokens, and from {limit.length} on rope_type {limit.kind!r} changes the angles of all "
            "rows of a batch: keep rows shorter, or forward these without sharing"
        )


def is_enabled(model: nn.Module) -> bool:
    """Whether :func:`~prefix_grouper_plugins.enable_prefix_grouper` is in force on ``model``."""
    return has_layers_enabled(Anatomy(model))


def why_not_enabled(base: PreTrainedModel) -> str | None:
    """Why packed rows of ``base`` are no rows: nobody has enabled it. Looks at hooks alone, since it is asked for each forward."""
    models = (base, decoder_of(base))
    if any(model is not None and _without_cache in model._forward_pre_hooks.values() for model in models):
        return None
    return f"{type(base).__name__} would read the packed row as one text: call enable_prefix_grouper(model) first"


def has_layers_enabled(anatomy: Anatomy) -> bool:
    """:func:`is_enabled` of a model whose parts are known already."""
    # A model that was built from the config of another one has its names, but neither its hooks nor its mixers.
    if not any(_without_cache in model._forward_pre_hooks.values() for model in anatomy.models):
        return False
    return _has_mixers_enabled(anatomy) if _needs_calls(anatomy) else any(map(is_ours, anatomy.configs))


@contextmanager
def without_prefix_grouper(model: nn.Module) -> Iterator[None]:
    """Restore the model's own implementation names for a while, for code that reads them (paged generation does).

    Threads may be inside together: the last one puts the names back. A packed forward of another thread is refused
    meanwhile. Never open this around a forward whose backward comes later: checkpointed layers look the name up again.
    """
    base = transformers_model(model)
    with _SWAPPING:
        if base not in _SWAPPED:
            _SWAPPED[base] = (0, [(config, config._attn_implementation) for config in Anatomy(model).configs])
        count, names = _SWAPPED[base]
        _SWAPPED[base] = (count + 1, names)
        for config, name in names:
            config._attn_implementation = base_implementation(name)
    try:
        yield
    finally:
        with _SWAPPING:
            count, names = _SWAPPED.pop(base)
            if count > 1:  # another thread is still inside
                _SWAPPED[base] = (count - 1, names)
            else:
                for config, name in names:
                    config._attn_implementation = name


_SWAPPING = threading.Lock()
_SWAPPED: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[Any, str]]]] = weakref.WeakKeyDictionary()


# -------------------------------------------------------------------------------------- mixers past the interface

_EXTENDED: weakref.WeakSet[type] = weakref.WeakSet()


def _enable_mixers(anatomy: Anatomy) -> None:
    """Let the mixers of a model take packed rows, and embeddings that count columns. In place and idempotent.

    Nothing happens to a model that has neither.
    """
    if not _needs_calls(anatomy):
        return
    takes_mask = not any(mixer_of(module).without_mask(module) for _, module in anatomy.mixers)  # type: ignore[union-attr]
    layers = anatomy.layers_with_mixers
    for model in anatomy.models:
        if not isinstance(model.__dict__.get("forward"), ModelForward):
            holds_mixers = any(layer is model for layer in layers)
            model.forward = ModelForward(model, takes_mask=takes_mask, holds_mixers=holds_mixers)  # type: ignore[method-assign,assignment]
    for layer in layers:
        if not isinstance(layer, PreTrainedModel):
            _swap(layer, PackedLayer)
    for _, module in anatomy.mixers:
        _swap(module, PackedMixer)
    for module in anatomy.column_positions:
        _swap(module, PackedPositions)


def _disable_mixers(anatomy: Anatomy) -> None:
    """Take back what :func:`_enable_mixers` did. In place and idempotent."""
    for _, module in anatomy.modules:
        forward = module.__dict__.get("forward")
        if isinstance(forward, ModelForward):
            del module.forward
            if forward.previous is not None:
                module.forward = forward.previous  # type: ignore[method-assign]
        module.__dict__.pop("_packed_before", None)
        if type(module) in _EXTENDED:  # FSDP2 may have put a class of its own on top, below which ours does no harm
            module.__class__ = type(module)._prefix_grouper_base  # type: ignore[attr-defined]


def _needs_calls(anatomy: Anatomy) -> bool:
    """Whether modules of a model ask which call is running."""
    return bool(anatomy.mixers or anatomy.column_positions)


def _has_mixers_enabled(anatomy: Anatomy) -> bool:
    """Whether :func:`_enable_mixers` is in force."""
    return any(isinstance(model.__dict__.get("forward"), ModelForward) for model in anatomy.models)


def _swap(module: nn.Module, extension: type) -> None:
    if not isinstance(module, extension):
        module.__class__ = _extended(type(module), extension)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _extended(cls: type[nn.Module], extension: type) -> type:
    """A subclass of ``cls`` under its own name. ``__call__`` is looked up on the type, so an attribute cannot do it."""
    keywords = variable_keywords(inspect.signature(inspect.unwrap(cls.forward)))
    created = type(
        cls.__name__,
        (extension, cls),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_prefix_grouper_base": cls,
            "_takes_keywords": keywords is not None,
        },
    )
    _EXTENDED.add(created)
    return created


# What distinguishes them from the hooks of others.
_check_call.belongs_to_enabling = True  # type: ignore[attr-defined]
_check_positions.belongs_to_enabling = True  # type: ignore[attr-defined]
_without_cache.belongs_to_enabling = True  # type: ignore[attr-defined]
_refuse_late_backward.belongs_to_disabling = True  # type: ignore[attr-defined]
