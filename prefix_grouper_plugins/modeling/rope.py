"""Rotary angles that depend on the longest row of a forward, and from which length on they do.

RoPE of the kinds "dynamic" and "longrope" (transformers' ``dynamic_rope_update``) computes its angles anew for all rows
once one of them is long. Below that length each row has the angles that it has alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

_ROPE_OF_LONGEST_ROW = {"dynamic", "longrope"}


def position_reasons(base: PreTrainedModel) -> list[str]:
    """Why rows of ``base`` have other angles in a batch than alone, where no module says from which length on."""
    config: Any = base.config
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer_kind = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {p.get("rope_type", p.get("type")) for p in (per_layer_kind or [parameters])}
    found = (kinds & _ROPE_OF_LONGEST_ROW) - {kind for _, kind in _row_limits(base)}
    if found:
        return [f"rope_type {found.pop()!r} makes every position depend on the longest row of the batch"]
    return []


def row_limit(model: nn.Module) -> tuple[int, str] | None:
    """The length in tokens from which on one row changes the rotary angles of all rows of its forward.

    So it is with RoPE of the kinds "dynamic" and "longrope" (transformers' ``dynamic_rope_update``). While every row of
    a forward is shorter, padding included where it is numbered, each has the angles that it has alone.

    Returns:
        that length and the kind, of the module with the lowest; None where there is no such module.
    """
    return min(_row_limits(model), default=None)


def modules_with_row_limit(model: nn.Module) -> list[nn.Module]:
    """The modules that hand positions to a rotary embedding of those kinds."""
    return [module for module in model.modules() if any(_limits_of(child) for child in module.children())]


def _row_limits(model: nn.Module) -> list[tuple[int, str]]:
    return [limit for module in model.modules() for limit in _limits_of(module)]


def _limits_of(rotary: Any) -> list[tuple[int, str]]:
    """As `row_limit`, for one rotary embedding; some have a kind for each type of layers."""
    kinds = getattr(rotary, "rope_type", None)
    if not kinds or not hasattr(rotary, "original_max_seq_len"):
        return []
    parameters = rotary.config.rope_parameters
    each = (
        [(kind, parameters[name]) for name, kind in kinds.items()] if isinstance(kinds, dict) else [(kinds, parameters)]
    )
    limits = {
        "dynamic": lambda _: rotary.original_max_seq_len,
        "longrope": lambda p: p["original_max_position_embeddings"],
    }
    return [(limits[kind](options), kind) for kind, options in each if kind in limits]
