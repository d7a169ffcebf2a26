"""Makes the classes of vision-language models that verl patches work with packed rows.

verl replaces the forward of some classes (``verl/models/transformers/monkey_patch.py``), for all models of a process:

- The attention of Qwen2-VL, Qwen2.5-VL and GLM-4V then calls flash-attn directly instead of through transformers'
  attention interface, and infers from the positions where rows begin. It would read a packed row as many short texts.
  Packed rows therefore go to the forward that the class had before, which uses the interface; all other calls run verl's.
  The gated delta nets of Qwen3.5 are treated in the same way, because state forking needs their own forward.
- Some of the models give their vision tower an empty image if a micro-batch has none, so that every rank gathers the
  tower's parameters. For Qwen2-VL and Qwen2.5-VL verl 0.9.1 fails there on the output class of the tower in
  transformers 5. Micro-batches without images are more common where groups stay whole, so here the tower returns only
  the features, which verl's code accepts too.
- With fused kernels, models for which verl has no forward get one for text, which ignores their images.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from verl.utils.model import get_hf_auto_model_class

from prefix_grouper_plugins.modeling import transformers_model
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG
from prefix_grouper_plugins.modeling.model_types import known_of

_REPLACED = ("Attention", "GatedDeltaNet")  # how the names of the classes end
_original: dict[type[nn.Module], Callable[..., Any]] = {}


def remember_attention(config: Any) -> None:
    """Remember the forwards of the token-mixing classes of the model type of ``config``, before verl patches them.

    A class that is already known is not read again: it may have been patched since, for another model of the process.
    """
    model = get_hf_auto_model_class(config)._model_mapping.get(type(config), None)
    if not isinstance(model, type):  # code from outside of transformers
        return
    for value in vars(sys.modules[model.__module__]).values():
        mixes_tokens = isinstance(value, type) and issubclass(value, nn.Module) and value.__name__.endswith(_REPLACED)
        if mixes_tokens and value.forward.__module__ == value.__module__:
            _original.setdefault(value, value.forward)


def fit_to_packed_rows(model: Any) -> None:
    """Adapt the modules of ``model`` that verl has patched, see above. In place."""
    for module in model.modules():
        cls: Any = type(module)
        if cls in _original and cls.forward is not _original[cls]:
            module.__class__ = _with_both(cls, _original[cls], cls.forward)
    if known_of(model.config.model_type).plain_tower:
        model.model.visual.register_forward_hook(_only_features)


def has_verls_forward(model: nn.Module) -> bool:
    """Whether a vision-language model, or its part without the head, runs verl's forward instead of its own."""
    return any(cls.forward.__module__.startswith("verl.") for cls in _model_classes(model))


def leaves_images_out(model: nn.Module) -> bool:
    """Whether the forward by which verl replaces that of a vision-language model takes text only."""
    return any(cls.forward.__module__ == "verl.models.transformers.dense_common" for cls in _model_classes(model))


def _model_classes(model: nn.Module) -> list[Any]:
    base: Any = transformers_model(model)
    return [type(base), type(getattr(base, "model", base))]


@contextmanager
def numbered_rows(model: nn.Module) -> Iterator[None]:
    """In this context, forwards of one row of text get the positions that verl's forwards need: ``[4, 1, tokens]``."""

    def number(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
        kwargs["position_ids"] = positions.expand(4, 1, -1)
        return args, kwargs

    base: Any = transformers_model(model)
    needed = known_of(base.config.model_type).plain_tower
    hook = base.register_forward_pre_hook(number, with_kwargs=True) if needed else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def lost_attention(model: nn.Module) -> list[str]:
    """Why ``model`` cannot be shared: verl patched its attention before :func:`remember_attention` saw it. Else empty."""
    found = {type(m).__name__ for m in model.modules() if type(m).forward.__module__.startswith("verl.")}
    return [
        f"verl has replaced {name}.forward for another engine of this process, before this one was built"
        for name in sorted(found)
        if name.endswith(_REPLACED)
    ]


@functools.cache
def _with_both(cls: Any, own: Callable[..., Any], replaced: Callable[..., Any]) -> Any:
    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (replaced if kwargs.get(LAYOUT_KWARG) is None else own)(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _only_features(tower: nn.Module, args: Any, output: Any) -> Any:
    return getattr(output, "pooler_output", output)
