"""Finds what the masks of a transformers model express and its attention function does not receive as an argument.

A packed call carries a placeholder instead of a mask, which transformers passes through (modeling/attention.py). A sliding
window, or attention in both directions, that only the mask expresses would be lost, so it is detected beforehand. A window
is then handed to the shared-prefix core as the mask would apply it; the rest is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from prefix_grouper_plugins.modeling.anatomy import Layer
from prefix_grouper_plugins.modeling.implementations import window_is_in_mask

_SLIDING_MASK = "create_sliding_window_causal_mask"
_SLIDING_LAYER_TYPES = {"sliding_attention", "hybrid_sliding"}


def mask_functions(models: Iterable[PreTrainedModel]) -> set[str]:
    """Names of the functions by which ``models`` make their masks."""
    names: set[str] = set()
    for model in models:
        for code in _codes_of(model):  # many make only the masks that they need, in lambdas
            names |= {n for n in code.co_names if n.startswith("create_") and n.endswith(("mask", "masks"))}
    return names


def masks_hide_nothing(models: Iterable[PreTrainedModel]) -> bool:
    """Whether a config says ``is_causal=False``: transformers then makes masks that hide nothing."""
    return any(getattr(model.config, "is_causal", True) is False for model in models)


def windows_by_mask(models: Iterable[PreTrainedModel], layers: Iterable[Layer]) -> dict[str, int | None]:
    """The windows that layers of ``models`` have by their masks, by name, where their attention is called with another one.

    Only layers whose implementation takes the window from the mask; None stands for no window.
    """
    return {
        layer.name: masked
        for layer, masked, _ in _different_windows(models, layers)
        if window_is_in_mask(layer.implementation)
    }


def window_reasons(models: Iterable[PreTrainedModel], layers: Iterable[Layer]) -> list[str]:
    """Layers with one window in their mask and another in the call, where it is not known which of them counts."""
    reasons: dict[str, None] = {}  # ordered set: the layers of a model mostly share one reason
    for layer, masked, passed in _different_windows(models, layers):
        if window_is_in_mask(layer.implementation) is None:
            reasons[
                f"{type(layer.module).__name__} masks with sliding_window={masked} but calls its attention function with "
                f"{passed}, and it is not known which of them {layer.implementation!r} applies: load the model with "
                '`attn_implementation="sdpa"`, or choose settings in which both agree'
            ] = None
    return list(reasons)


def _different_windows(
    models: Iterable[PreTrainedModel], layers: Iterable[Layer]
) -> Iterator[tuple[Layer, int | None, int | None]]:
    """Layers whose mask has another window than their attention function receives: the layer and both windows."""
    in_masks = _SLIDING_MASK in mask_functions(models)
    for layer in layers:
        masked, passed = _windows(layer.module)
        masked = masked if in_masks else None
        if masked != passed:
            yield layer, masked, passed


def _windows(module: nn.Module) -> tuple[int | None, int | None]:
    """The window of a layer's mask, if its model makes such masks, and the one that its attention function receives."""
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    hands_on = any("sliding_window" in _strings(code) for code in _codes_of(module))
    if hands_on and not hasattr(module, "sliding_window"):  # it reads the config when it is called, as the mask does
        return window, window
    masked = window
    if kinds := getattr(config, "layer_types", None):  # without them all layers are alike
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index < len(kinds) and kinds[index] not in _SLIDING_LAYER_TYPES:
            masked = None
    passed = module.sliding_window if hands_on and getattr(module, "is_sliding", True) else None
    return masked, passed  # type: ignore[return-value]


def _codes_of(module: nn.Module) -> Iterator[CodeType]:
    """The code of a module's forward and of the functions defined in it."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    codes = [] if code is None else [code]
    while codes:
        yield (code := codes.pop())
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _strings(code: CodeType) -> set[str]:
    """Names of keywords, among other strings."""
    found: set[str] = set()
    for constant in code.co_consts:
        found |= {c for c in (constant if isinstance(constant, tuple) else (constant,)) if isinstance(c, str)}
    return found
