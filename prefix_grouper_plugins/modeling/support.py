"""Which models can take packed rows, and why another one cannot.

A model is supported when every place where it mixes tokens is an attention layer that we can switch, and when its type
is one whose packed forward and gradients a test has compared with row-by-row forwards (:data:`VERIFIED_MODEL_TYPES`).
Everything else is refused before training, with the reason: a guess here would be wrong numbers there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Every type in this list runs in tests/modeling/test_families.py: packed logits and gradients against single rows.
VERIFIED_MODEL_TYPES = frozenset(
    """
    afmoe apertus arcee biogpt bitnet cohere cohere2 cohere2_moe deepseek_v2 deepseek_v3 diffllama dots1
    ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe
    gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium
    hunyuan_v1_dense hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe laguna llama mellum mimo_v2_flash
    minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi
    phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
    """.split()
)

# Models that number positions from the attention mask, so that left padding does not count.
_POSITIONS_SKIP_PADDING = {"opt"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_OF_LONGEST_ROW = {"dynamic", "longrope"}


class UnsupportedModelError(ValueError):
    """The packed result could differ from the ordinary one; the message says why and what can be done."""


@dataclass(frozen=True)
class LayerSupport:
    """How one attention layer is run: its module name, what its attention does, and the backend that ``auto`` takes."""

    name: str
    attention: str
    backend: str


@dataclass(frozen=True)
class SupportReport:
    """What :func:`check_support` found.

    Attributes:
        reasons: why the model is refused; empty when it is supported.
        notes: what a user should know although it does not change the result's validity, one line each.
        layers: how each attention layer is run.
    """

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[LayerSupport, ...] = field(default=(), repr=False)

    @property
    def supported(self) -> bool:
        return not self.reasons


def check_support(model: nn.Module) -> SupportReport:
    """Say whether packed forwards of ``model`` equal its ordinary ones. Runs no forward and changes nothing.

    Args:
        model: a transformers model, bare or wrapped (PEFT, DDP, FSDP).

    Returns:
        the report; ``report.supported`` is true iff ``report.reasons`` is empty.
    """
    base = transformers_model(model)
    if base is None:
        return SupportReport((f"{type(model).__name__} contains no transformers model",))
    config = base.config
    layers = attention_layers(model)
    reasons = [
        *_type_reasons(config, layers),
        *_code_reasons(base, layers),
        *_position_reasons(config),
        *_attention_reasons(layers),
        *_adapter_reasons(model),
    ]
    return SupportReport(tuple(reasons), tuple(_notes(model)), tuple(_describe(name, m) for name, m in layers))


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside of ``model`` and its wrappers (PEFT, DDP, FSDP); None where there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs under ``model`` that name an attention implementation."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation is not None:
            found[id(config)] = config
    return list(found.values())


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that look their attention up in transformers' AttentionInterface."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__globals__
    ]


def numbers_padded_columns(model: nn.Module) -> bool:
    """Whether a padded forward without ``position_ids`` numbers padded columns too, as nearly all models do.

    Models with rotary positions give the same result either way; for learned positions it matters.
    """
    return transformers_model(model).config.model_type not in _POSITIONS_SKIP_PADDING


def _type_reasons(config: Any, layers: list[tuple[str, nn.Module]]) -> list[str]:
    kind = config.model_type
    if config.is_encoder_decoder:
        return [f"{kind} is an encoder-decoder model; only decoder-only models share prefixes"]
    if config.get_text_config(decoder=True) is not config:
        return [f"{kind} is a multimodal model, which is not supported yet"]
    if not layers:
        return [f"{kind} does not use transformers' attention interface, so its token mixing cannot be switched"]
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        return [f"{kind} has layers of type {', '.join(others)}, which mix tokens in a way that is not supported yet"]
    if kind not in VERIFIED_MODEL_TYPES:
        return [f"model type {kind!r} has not been verified: no test has compared its packed forward with single rows"]
    return []


def _code_reasons(base: PreTrainedModel, layers: list[tuple[str, nn.Module]]) -> list[str]:
    """A verified type may still be run by other code than the one that was verified."""
    if not type(base).__module__.startswith("transformers."):
        return [
            f"{type(base).__name__} is code from outside of transformers, which no test has compared with single rows"
        ]
    expected = getattr(base.config, "num_hidden_layers", 0)
    if layers and len(layers) < expected:
        return [f"only {len(layers)} of {expected} layers use transformers' attention interface"]
    return []


def _position_reasons(config: Any) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer_kind = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {p.get("rope_type", p.get("type")) for p in (per_layer_kind or [parameters])}
    if found := kinds & _ROPE_OF_LONGEST_ROW:
        return [f"rope_type {found.pop()!r} makes every position depend on the longest row of the batch"]
    return []


def _attention_reasons(layers: list[tuple[str, nn.Module]]) -> list[str]:
    reasons: dict[str, None] = {}  # ordered set: the layers of a model mostly share one reason
    for _, module in layers:
        dropout = _attention_dropout(module)
        config = getattr(module, "config", None)
        implementation = (getattr(config, "_attn_implementation", None) or "").split(":")[-1]
        if dropout:
            reasons[f"attention dropout is {dropout}: set `attention_dropout` (or `attn_pdrop`) to 0 in the config"] = (
                None
            )
        if not getattr(module, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
            reasons["attention is not causal, so a prefix would depend on what follows it"] = None
        if getattr(config, "reorder_and_upcast_attn", False):
            reasons["`reorder_and_upcast_attn=True` bypasses the attention interface"] = None
        if implementation == "sdpa" and (_softcap(module) is not None or _sinks(module) is not None):
            reasons['sdpa ignores softcap and attention sinks: load the model with `attn_implementation="eager"`'] = (
                None
            )
    return list(reasons)


def _adapter_reasons(model: nn.Module) -> list[str]:
    reasons = []
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "is_prompt_learning", False):
            reasons.append(f"adapter {adapter!r} learns a prompt ({config.peft_type}), which would stand in every row")
        if getattr(config, "alora_invocation_tokens", None):
            reasons.append(f"adapter {adapter!r} is an aLoRA, which looks for its invocation tokens in every row")
    return reasons


def _notes(model: nn.Module) -> list[str]:
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    # opt, biogpt, seed_oss and starcoder2 keep plain numbers and call the function
    rates |= {
        rate
        for module in model.modules()
        for name, rate in vars(module).items()
        if "dropout" in name and isinstance(rate, float) and rate > 0
    }
    if not rates:
        return []
    return [
        f"dropout of {max(rates)} is active: the rows of a group share one dropout mask on their prompt, which is valid "
        "training but gives other numbers than the ordinary path; set it to 0 (`lora_dropout` too) to get the same"
    ]


def _describe(name: str, module: nn.Module) -> LayerSupport:
    window, softcap, sinks = _sliding_window(module), _softcap(module), _sinks(module)
    parts = ["causal" if window is None else f"sliding window of {window}"]
    if softcap is not None:
        parts.append(f"softcap {softcap}")
    if sinks is not None:
        parts.append("sinks")
    return LayerSupport(name, ", ".join(parts), "merged_lse" if window is None and softcap is None else "blockwise")


def _attention_dropout(module: nn.Module) -> float:
    names = ("attention_dropout", "attn_dropout", "dropout")  # the last one in opt and biogpt
    rates = (getattr(module, name, None) or 0.0 for name in names)
    return max(float(rate.p if isinstance(rate, nn.Dropout) else rate) for rate in rates)


def _sliding_window(module: nn.Module) -> int | None:
    """The layer's own window; models whose layers are all alike keep it in their config (mistral)."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window  # type: ignore[return-value]
    config = getattr(module, "config", None)
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)


def _softcap(module: nn.Module) -> float | None:
    return getattr(module, "attn_logit_softcapping", None)


def _sinks(module: nn.Module) -> Any:
    return getattr(module, "sinks", None)
