"""Hooks on the gradients of weights: they get that of one backward, and may do anything with it."""

from __future__ import annotations

from typing import Any

from torch import nn

_MACHINERY = ("torch.distributed.", "accelerate.", "deepspeed.")  # whose hooks reduce gradients over processes


def hooked_weight(model: nn.Module) -> str | None:
    """The name of a weight that learns and whose gradient the user's own code gets; None where there is none."""
    for name, weight in model.named_parameters():
        after = getattr(weight, "_post_accumulate_grad_hooks", None)
        hooks = [hook for known in (weight._backward_hooks, after) for hook in (known or {}).values()]
        if weight.requires_grad and any(not _module_of(hook).startswith(_MACHINERY) for hook in hooks):
            return name
    return None


def _module_of(function: Any) -> str:
    inner = getattr(function, "func", function)
    return getattr(inner, "__module__", None) or type(inner).__module__
