"""Exact attention over packed rows that share prefixes: one function, several backends, no copies of K and V."""

from __future__ import annotations

from prefix_grouper_plugins.attention import flops as flops  # tells torch's FLOP counter about the operators
from prefix_grouper_plugins.attention.api import shared_prefix_attention
from prefix_grouper_plugins.attention.registry import available_backends

__all__ = ["available_backends", "shared_prefix_attention"]
