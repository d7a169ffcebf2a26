"""Noticing that a model is no longer the one that was checked: other layers, forwards, hooks or adapters.

Before each packed forward the module tree is read once (about a microsecond for each module) and compared with what was
there when the model was enabled or checked. What has changed is checked again, and refused with the reason if it fails.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

# What these put on a model does not change what it computes for one row.
_MACHINERY = ("prefix_grouper_plugins.", "torch.distributed.", "torch.utils.checkpoint", "accelerate.", "deepspeed.")

# Gradient checkpointing puts these on embeddings: outputs with requires_grad. transformers adds one whenever it is switched
# on, which TRL does after each generation.
_REQUIRES_GRAD = {"make_inputs_require_grads", "make_inputs_require_grad"}

_KNOWN: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
_CHECKING: ContextVar[bool] = ContextVar("prefix_grouper_checking", default=False)


def fingerprint(base: nn.Module, modules: Iterable[nn.Module] | None = None) -> int:
    """A number for ``modules``, those at and under ``base``: their classes, forwards, hooks and adapters, not their weights."""
    parts: list[Any] = []
    for module in base.modules() if modules is None else modules:
        cls = type(module)
        if cls.__module__.startswith(_MACHINERY) and "_prefix_grouper_base" not in vars(cls):
            continue
        own = vars(module)
        cls = getattr(cls, "_prefix_grouper_base", cls)
        # FSDP2 puts a class of its own on top.
        parts.append(next(c for c in cls.__mro__ if FSDPModule not in c.__bases__ and c is not FSDPModule))
        if "forward" in own:
            parts += _codes([own["forward"]])
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            if own.get(name):
                parts += _codes(own[name].values())
        adapters = own.get("peft_config")
        if isinstance(adapters, dict):
            parts += [(name, str(getattr(config, "peft_type", ""))) for name, config in adapters.items()]
    return hash(tuple(parts))


def _codes(functions: Iterable[Any]) -> list[Any]:
    """What runs, by its code: a function that is made anew for each call is still the same one."""
    found = []
    for function in functions:
        inner = getattr(function, "func", function)
        inner = getattr(inner, "__wrapped__", inner)
        module = getattr(inner, "__module__", None) or type(inner).__module__
        is_known = str(module).startswith(_MACHINERY) or getattr(inner, "__name__", None) in _REQUIRES_GRAD
        if not is_known:
            found.append(getattr(inner, "__code__", None) or type(inner))
    return found


def remember(base: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
    """From now on ``base`` counts as known as it is."""
    _KNOWN.setdefault(base, set()).add(fingerprint(base, modules))


def forget(base: nn.Module) -> None:
    """Nothing is known of ``base`` any longer."""
    _KNOWN.pop(base, None)


def has_changed(base: nn.Module) -> bool:
    """Whether ``base`` is another than all that :func:`remember` has seen of it. Never while it is being checked."""
    known = _KNOWN.get(base)
    return known is not None and not is_checking() and fingerprint(base) not in known


def is_checking() -> bool:
    """Whether a self-check runs in this thread: forwards of the model are its own."""
    return _CHECKING.get()


def while_checking(run: Callable[[], Any]) -> Any:
    """Call ``run``, whose forwards of the model are not looked at."""
    token = _CHECKING.set(True)
    try:
        return run()
    finally:
        _CHECKING.reset(token)
