"""Adapters of PEFT: with which of them packed rows are right, and why not with the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Adapters that tests/modeling/support/test_adapters.py compares: they change weights, or what a layer does with single tokens.
VERIFIED_ADAPTERS = frozenset(
    """
    ADALORA BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT OSF
    PEANUT PSOFT RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
    """.split()
)
# Options of LoRA that make something else of it.
_UNVERIFIED_LORA_OPTIONS = ("arrow_config", "kasa_config", "monteclora_config", "velora_config")


def adapter_reasons(adapters: Mapping[str, Any]) -> list[str]:
    """Why a model with these adapters (configs of PEFT by name) cannot take packed rows."""
    reasons = []
    for adapter, config in adapters.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "is_prompt_learning", False):
            reasons.append(f"adapter {adapter!r} learns a prompt ({kind}), which would be part of every row")
        elif kind == "LILY":
            reasons.append(f"adapter {adapter!r} (LILY) mixes its experts by a mean over all tokens of a forward")
        elif kind not in VERIFIED_ADAPTERS:
            reasons.append(f"adapter {adapter!r} is of type {kind}, which no test has compared with single rows")
        if getattr(config, "alora_invocation_tokens", None):
            reasons.append(f"adapter {adapter!r} is an aLoRA, which looks for its invocation tokens in every row")
        for option in _UNVERIFIED_LORA_OPTIONS:
            if getattr(config, option, None) is not None:
                reasons.append(f"adapter {adapter!r} has a `{option}`, which no test has compared with single rows")
    return reasons
