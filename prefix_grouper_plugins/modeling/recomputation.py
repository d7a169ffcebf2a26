"""Decoder layers whose forward runs again in the backward, so that their graph is not kept: gradient checkpointing for one forward.

Transformers checkpoints whole trainings. Here the same switch is on for one forward, that of a prompt which waits for
several parts of its responses: its layers keep their inputs alone, and their keys and values, which the parts read.
Dropout draws the same mask again, since ``torch.utils.checkpoint`` restores the state of torch's own generators.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins.modeling.anatomy import Anatomy


def recomputable_layers(anatomy: Anatomy) -> list[GradientCheckpointingLayer]:
    """The decoder layers of a model that can run again in the backward, and hold all that mixes tokens.

    None where checkpointing is on already, where the model is not in training mode, since layers take the switch for
    off there, and where parameters are sharded, since each forward of a layer is a collective. Nor where a module draws from
    a generator of its own, which would go on in the second forward, or where a layer's ``forward`` has been replaced, which is what
    transformers checkpoints.
    """
    base = anatomy.base
    if anatomy.is_sharded or anatomy.has_generators or not getattr(base, "supports_gradient_checkpointing", False):
        return []
    if any(module.gradient_checkpointing for module in anatomy.checkpointable):
        return []
    found: dict[int, GradientCheckpointingLayer] = {}
    layers = {name: module for name, module in anatomy.modules if isinstance(module, GradientCheckpointingLayer)}
    for name, _ in (*anatomy.attention_layers, *anatomy.mixers):
        around = _outermost(name, layers)
        if around is None or not around.training or "forward" in vars(around):
            return []
        found[id(around)] = around
    return list(found.values())


def _outermost(name: str, layers: dict[str, GradientCheckpointingLayer]) -> GradientCheckpointingLayer | None:
    """The one of ``layers`` that holds the module ``name``: of a layer inside another (Zamba2) the other, which runs it again too."""
    parts = name.split(".")
    names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((layers[own] for own in names if own in layers), None)


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Forwards of ``layers`` in here keep their inputs, and run again in the backward. Not reentrant: their outputs keep a graph.

    Args:
        layers: from :func:`recomputable_layers`.
    """
    function = functools.partial(checkpoint, use_reentrant=False)
    before = [vars(layer).copy() for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, function  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if name in own:
                    setattr(layer, name, own[name])
                else:
                    delattr(layer, name)
