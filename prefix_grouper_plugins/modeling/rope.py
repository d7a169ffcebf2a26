"""Rotary angles that depend on the longest row of a forward, and from which length on they do.

RoPE of the kinds "dynamic" and "longrope" (transformers' ``dynamic_rope_update``) computes its angles anew for all rows
once one of them is long. Below that length each row has the angles that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

_ROPE_OF_LONGEST_ROW = {"dynamic", "longrope"}


class RowLimit(NamedTuple):
    """The length in tokens from which on a row changes the angles of the others, and the kind of RoPE."""

    length: int
    kind: str


def position_reasons(config: Any, limits: Iterable[RowLimit]) -> list[str]:
    """Why rows have other angles in a batch than alone, where no module says from which length on.

    Args:
        config: of the part of the model that mixes tokens.
        limits: those that its modules say.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer_kind = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {p.get("rope_type", p.get("type")) for p in (per_layer_kind or [parameters])}
    found = (kinds & _ROPE_OF_LONGEST_ROW) - {limit.kind for limit in limits}
    if found:
        return [f"rope_type {found.pop()!r} makes every position depend on the longest row of the batch"]
    return []


def limits_of(rotary: Any) -> list[RowLimit]:
    """The limits of one module, none unless it is such a rotary embedding; some have a kind for each type of layers."""
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
    return [RowLimit(limits[kind](options), kind) for kind, options in each if kind in limits]
