"""Noticing that a model is no longer the one that was checked: other layers, forwards, functions, hooks or adapters.

Before each packed forward the module tree is read (half a microsecond for each module) and compared with what was
there when the model was enabled or checked. What has changed is checked again, and refused with the reason if it fails.

It is code that is compared: the classes of modules, their forwards, the functions that these call by name, hooks, and the kinds
of adapters; and device, dtype and autocast, which choose kernels. Other values are not, as they change all the time: attributes
of modules, what a function closes over, and which of the adapters is active, of which all kinds were looked at. Nor is code that
only those functions call.

Code that torch.compile has made is of the model as it was when it was traced, hooks included, so there it is read when it is
traced: the answer is a constant of the graph, and no step of it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefix_grouper_plugins.modeling.attention import base_implementation
from prefix_grouper_plugins.modeling.implementations import names_in

# What these put on a model does not change what it computes for one row.
_MACHINERY = ("prefix_grouper_plugins.", "torch.distributed.", "torch.utils.checkpoint", "accelerate.", "deepspeed.")

# Gradient checkpointing puts these on embeddings: outputs with requires_grad. transformers adds one whenever it is switched
# on, which TRL does after each generation.
_REQUIRES_GRAD = {"make_inputs_require_grads", "make_inputs_require_grad"}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GLOBAL_HOOKS = [
    getattr(torch.nn.modules.module, f"_global{kind}")
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
]

Kernels = tuple[str, torch.dtype, torch.dtype | None]

# Of each model all values that each part of `what_is_compared` has had.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[set[Any], ...]] = weakref.WeakKeyDictionary()
_CHECKING: ContextVar[bool] = ContextVar("prefix_grouper_checking", default=False)


def modules_of(root: nn.Module) -> list[nn.Module]:
    """Those of ``root.modules()``, in the same order, in a quarter of the time: this runs before each forward."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [root]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                left.extend(reversed(module._modules.values()))
    return list(found)


def fingerprint(base: nn.Module, modules: Iterable[nn.Module] | None = None) -> int:
    """A number for ``modules``, those at and under ``base``: their classes, forwards, hooks and adapters, not their weights."""
    parts: list[Any] = []
    for module in modules_of(base) if modules is None else modules:
        if (cls := _compared_class(type(module))) is None:  # type: ignore[arg-type]
            continue
        parts.append(cls)
        own = vars(module)
        if "forward" in own:
            parts += _codes([own["forward"]])
        for name in _HOOKS:
            if own.get(name):
                parts += _codes(own[name].values())
        if isinstance(adapters := own.get("peft_config"), dict):
            parts += [(name, str(getattr(config, "peft_type", ""))) for name, config in adapters.items()]
    return hash(tuple(parts))


@functools.lru_cache(maxsize=1024)
def _compared_class(cls: type) -> type | None:
    """``cls`` as it was before FSDP2 or enabling put classes of their own on top; None for machinery."""
    cls = next(c for c in cls.__mro__ if FSDPModule not in c.__bases__ and c is not FSDPModule)
    cls = getattr(cls, "_prefix_grouper_base", cls)
    return None if cls.__module__.startswith(_MACHINERY) else cls


def codes_of_classes(modules: Iterable[nn.Module]) -> int:
    """A number for the code of the forwards of all classes of ``modules``, and of the functions that they call."""
    classes = dict.fromkeys(map(_compared_class, dict.fromkeys(map(type, modules))))
    return hash(tuple(code for cls in classes if cls is not None for code in _codes_of_class(cls)))


def kernels(base: nn.Module, modules: Sequence[nn.Module]) -> Kernels | None:
    """What chooses the kernels of ``base``: type of the device, dtype of the weights, and of autocast where it is on.

    None where weights are sharded: they are gathered and cast within forwards. ``modules`` are all modules of ``base``.
    """
    weights = (weight for module in modules for weight in module._parameters.values())
    weight = next((weight for weight in weights if weight is not None), None)  # without another walk of the tree
    if weight is None or hasattr(weight, "ds_id") or isinstance(base, FSDPModule) or isinstance(weight, DTensor):
        return None
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        return None
    kind = weight.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return kind, weight.dtype, torch.get_autocast_dtype(kind) if casts else None


def _codes_of_class(cls: Any) -> list[Any]:
    """The code of a class's forward, of its decorators, and of the functions that it calls by name: a patch may exchange each."""
    forward, codes = cls.forward, [getattr(cls.__call__, "__code__", None)]
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        codes.append(getattr(forward, "__code__", None) or type(forward))
        forward = inner
    code = getattr(forward, "__code__", None)
    if code is None:
        return [*codes, type(forward)]
    called = map(forward.__globals__.get, names_in(code))
    return [*codes, code, *(value.__code__ for value in called if isinstance(value, FunctionType))]


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


def what_is_compared(base: nn.Module, modules: Sequence[nn.Module]) -> tuple[int, int, Kernels | None]:
    """The module tree, the code of its classes and around them, and its kernels. ``modules`` are all modules of ``base``."""
    return fingerprint(base, modules), hash((codes_of_classes(modules), *_codes_around(base))), kernels(base, modules)


def _codes_around(base: nn.Module) -> list[Any]:
    """The code of hooks that all modules have, and of the attention function that the model had before it was enabled.

    Hooks of torch's own, by which a FLOP counter knows the module that runs, change nothing.
    """
    hooks = (hook for hooks in _GLOBAL_HOOKS for hook in hooks.values())
    codes = _codes(hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch."))
    name = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if isinstance(name, str) and base_implementation(name) in ALL_ATTENTION_FUNCTIONS:
        codes += _codes([ALL_ATTENTION_FUNCTIONS[base_implementation(name)]])
    return codes


def remember(base: nn.Module, modules: Sequence[nn.Module] | None = None) -> None:
    """From now on ``base`` counts as known as it is."""
    modules = modules_of(base) if modules is None else modules
    known = _KNOWN.setdefault(base, (set(), set(), {None}))
    for values, value in zip(known, what_is_compared(base, modules), strict=True):
        values.add(value)


def forget(base: nn.Module) -> None:
    """Nothing is known of ``base`` any longer."""
    _KNOWN.pop(base, None)


@torch.compiler.disable  # where the graph breaks before the model, Dynamo would trace this walk over its modules
def has_changed(base: nn.Module) -> bool:
    """Whether ``base`` is another than all that :func:`remember` has seen of it. Never while it is being checked."""
    known = _KNOWN.get(base)
    if known is None or is_checking():
        return False
    found = what_is_compared(base, modules_of(base))
    return any(value not in values for values, value in zip(known, found, strict=True))


class Watch:
    """:func:`has_changed` of one model, for its hook. torch.compile takes the answer for a constant.

    An object that holds the model, for Dynamo of torch 2.8 takes no modules as arguments of what it calls while it traces.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    @torch.compiler.assume_constant_result
    def has_changed(self) -> bool:
        return has_changed(self.base)


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
