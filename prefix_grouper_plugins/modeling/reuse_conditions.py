"""Whether the prompts of a model may be forwarded apart from their responses, once for several forwards of these.

A prompt runs through the decoder alone, since nobody reads its logits (`PromptCache.run`), and its responses through the whole
model. So what the user's own code does around the decoder would be done to the responses alone. And a backward hook
on a layer would not run where no gradient arrives at the layer's output.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from prefix_grouper_plugins.modeling.anatomy import Anatomy, transformers_model
from prefix_grouper_plugins.modeling.mixers.table import why_on_rows
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.prompt_cache import decoder, has_inside
from prefix_grouper_plugins.modeling.self_check.changes import modules_of

# What these do around a decoder was compared, or has to do with its outputs alone.
_KNOWN = (
    "prefix_grouper_plugins",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "verl",
    "deepspeed",
    "liger_kernel",
)


def why_not_reuse(model: nn.Module, anatomy: Anatomy | None = None) -> str | None:
    """Why the prompts of ``model``, which takes packed rows, cannot be reused across forwards; None if they can.

    Args:
        model: the model, bare or wrapped.
        anatomy: its parts, where the caller knows them already: finding them walks the whole module tree.
    """
    anatomy = Anatomy(model) if anatomy is None else anatomy
    for _, mixer in anatomy.mixers:
        if (reason := why_on_rows(mixer)) is not None:
            return (
                f"{type(mixer).__name__} mixes tokens past the attention interface and does not start from a given state: "
                f"{reason}"
            )
    if torch.is_grad_enabled() and any(map(_checkpoints_reentrantly, anatomy.checkpointable)):
        return "reentrant gradient checkpointing hides the prompt's graph: set use_reentrant=False"
    # Not by the anatomy: these wrappers may be younger.
    if has_inside(model, FullyShardedDataParallel):
        return "FSDP1 gathers parameters for one forward and its backward at a time: use FSDP2"
    base = transformers_model(model)
    if decoder(model) is base:
        return f"{type(base).__name__} has no decoder apart from its head"
    if known_of(base.config.model_type).attention_runs_twice:
        return f"attention layers of {base.config.model_type} run twice in one forward"
    return _why_not_apart(model) or (_why_hooks_differ(model) if torch.is_grad_enabled() else None)


def _why_not_apart(model: nn.Module) -> str | None:
    """The code around the decoder that is the user's own, in words."""
    for module in _around_decoder(model):
        own, forward = vars(module), type(module).forward
        name = type(module).__name__
        for function in (own.get("forward", forward), getattr(forward, "__func__", forward)):
            if not _is_known(function):
                return f"the forward of {name} is not one of transformers or PEFT, and a prompt runs through its decoder alone"
        for hook in _own_hooks(
            module, ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ):
            return f"a hook on {name} ({_named(hook)}) would not see prompts, which run through its decoder alone"
    return None


def _why_hooks_differ(model: nn.Module) -> str | None:
    """The backward hook, in words, that would not run for prompts: no gradient arrives at the output of the last layer."""
    hooked = [m for m in modules_of(decoder(model)) if m._backward_hooks or m._backward_pre_hooks]
    for module in hooked:
        for hook in _own_hooks(module, ("_backward_hooks", "_backward_pre_hooks")):
            return f"a backward hook on {type(module).__name__} ({_named(hook)}) may not run for prompts"
    return None


def _around_decoder(model: nn.Module) -> list[nn.Module]:
    """``model`` and what is in it, down to its decoder, without that."""
    inner, modules = decoder(model), dict[str, nn.Module]()
    for name, module in model.named_modules():
        if module is inner:
            parts = name.split(".")
            return [modules[".".join(parts[:count])] for count in range(len(parts))]
        modules[name] = module
    return []


def _own_hooks(module: nn.Module, kinds: Iterable[str]) -> Iterator[Any]:
    """Hooks that are not those of a known package."""
    own = vars(module)
    return (hook for kind in kinds if own.get(kind) for hook in own[kind].values() if not _is_known(hook))


def _is_known(function: Any) -> bool:
    """Whether ``function``, and all that it wraps, is code of a known package."""
    while function is not None:
        inner = getattr(function, "func", function)
        inner = getattr(inner, "__func__", inner)
        code = inner if isinstance(inner, FunctionType) else inspect.getattr_static(type(inner), "__call__", None)
        if not isinstance(code, FunctionType) or not _is_in_known_package(code.__code__.co_filename):
            return False
        function = getattr(inner, "__wrapped__", None)
    return True


@functools.lru_cache(maxsize=4096)
def _is_in_known_package(file: str) -> bool:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in _KNOWN)
    return any(known and file.startswith(os.path.join(os.path.dirname(known), "")) for known in files)


def _named(hook: Any) -> str:
    inner = getattr(hook, "func", hook)
    return getattr(inner, "__qualname__", None) or type(inner).__name__


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or function is None:
        return False
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
