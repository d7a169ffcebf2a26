"""Which models can take packed rows, and why another one cannot.

A model is supported when every place where it mixes tokens is an attention layer that we can switch, or a mixer that we
can run on whole rows (modeling/mixers/on_rows.py), under masks that we know. Where besides a test has compared packed forward and
gradients of its type with row-by-row forwards (modeling/model_types.py), nothing more is asked; other types and code
from outside of transformers stand or fall with a self-check (modeling/self_check.py). Everything else is refused
before training, with the reason: a guess here would be wrong numbers there.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_grouper_plugins.attention.registry import auto_backend
from prefix_grouper_plugins.modeling.mixers.table import foreign_mixers, forking_notes, how_it_runs, mixer_of
from prefix_grouper_plugins.modeling.model_types import (
    POSITIONS_SKIP_PADDING,
    TEXT_PARTS,
    VERIFIED_MODEL_TYPES,
    VERIFIED_MULTIMODAL_TYPES,
    padding_reasons,
    reasons_of_type,
)
from prefix_grouper_plugins.modeling.rope import position_reasons, row_limit
from prefix_grouper_plugins.modeling.support.masks import mask_functions, reads_both_ways, window_reasons

# Layers of these types do not mix tokens.
_POINTWISE_LAYER_TYPES = {"mlp", "moe"}
# Attention of the core, and mixers of modeling/mixers/on_rows.py. Chunked, sparse and compressed attention are neither.
_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid"} | _POINTWISE_LAYER_TYPES
_LAYER_TYPES |= {"attention", "mamba"}  # transformers before 5.23
# Functions of transformers that make the masks which the core knows.
_MASK_FUNCTIONS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate"}
# Settings of attention that takes some keys and leaves others, beyond what a few short rows show.
_SELECTS_KEYS = re.compile(r"attention_chunk_size|index_topk|sparse|keep_window|compress|block_topk")
# What modules call the rate of their dropout, and that of other random changes while they train: noise on a router's
# input (mixtral, minimax, dbrx) or on embeddings (NEFTune), layers that are left out (opt, biogpt, xglm; in vision towers).
_DROPOUT = re.compile(r"dropout|pdrop")
_OTHER_RANDOMNESS = re.compile(r"jitter|noise|layer_?drop|drop_path|drop_prob")
# Their fields in a config, where these have other names.
_FIELD_OF_RANDOMNESS = {"jitter_noise": "router_jitter_noise", "moe_jitter_eps": "ffn_config.moe_jitter_eps"}

# Adapters that tests/modeling/test_peft.py compares: they change weights, or what a layer does with single tokens.
VERIFIED_ADAPTERS = frozenset(
    """
    ADALORA BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT OSF
    PEANUT PSOFT RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
    """.split()
)
# Options of LoRA that make something else of it.
_UNVERIFIED_LORA_OPTIONS = ("arrow_config", "kasa_config", "monteclora_config", "velora_config")


@dataclass(frozen=True)
class LayerSupport:
    """How one layer is run: its module name, how it mixes tokens, and the backend that ``auto`` takes.

    The backend is that of the device the model is on, for a model without weights that of this machine; on a GPU that
    for half precision, in which autocast runs attention whatever the weights are. Mixers past the attention interface
    have "state forking" or "expand, run, collapse".
    """

    name: str
    attention: str
    backend: str


@dataclass(frozen=True)
class SupportReport:
    """What :func:`check_support` found.

    Attributes:
        reasons: why the model is refused; empty when it is supported.
        unverified: why it is refused unless :func:`~prefix_grouper_plugins.self_check` shows that it is right.
        left_padding_reasons: why ordinary batches that are padded on the left compute something else than single rows, and so than
            packed ones: trainers that pad so refuse the model.
        notes: what a user should know although it does not change the result's validity, one line each.
        layers: how each attention layer and each other mixer is run.
    """

    reasons: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    left_padding_reasons: tuple[str, ...] = ()
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
    config = text_part(base).config
    layers, mixers = attention_layers(model), foreign_mixers(model)
    reasons = [
        *(_multimodal_reasons(base) or _type_reasons(config, layers + mixers) or _randomness_reasons(model)),
        *_unknown_layers(config, layers, mixers),
        *position_reasons(text_part(base)),
        *_attention_reasons(layers + mixers, reads_both_ways(text_part(base))),
        *_adapter_reasons(model),
        *_quantization_reasons(model, config),
    ]
    reasons = reasons or window_reasons(text_part(base), layers)  # its remedy would mislead beside reasons without one
    unverified = _unproven(base)
    if unverified and not reasons:
        reasons += _unknown_masks(base)
    padded = padding_reasons(base, config.model_type)
    device, dtype = _where_attention_runs(base)
    described = [_describe(name, m, device, dtype) for name, m in layers]
    described += [_describe_mixer(name, m) for name, m in mixers]
    return SupportReport(
        tuple(reasons), tuple(unverified), tuple(padded), (*_notes(model), *forking_notes(mixers)), tuple(described)
    )


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside of ``model`` and its wrappers (PEFT, DDP, FSDP); None where there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def text_part(base: Any) -> Any:
    """The part of a multimodal model that mixes tokens; any other transformers model itself."""
    if base.config.is_encoder_decoder or base.config.get_text_config(decoder=True) is base.config:
        return base
    return base.get_decoder() or base


def _text_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules under ``model`` by name, without those of a vision tower."""
    base = transformers_model(model)
    if base is None or (part := text_part(base)) is base:
        return list(model.named_modules())
    start = next(name for name, module in model.named_modules() if module is part)
    return [(f"{start}.{name}" if name else start, module) for name, module in part.named_modules()]


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs under ``model`` that name an attention implementation, for text alone."""
    found = {}
    for _, module in _text_modules(model):
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation is not None:
            found[id(config)] = config
    return list(found.values())


def attention_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of text that look their attention up in transformers' AttentionInterface."""
    return [
        (name, module)
        for name, module in _text_modules(model)
        if ("Attention" in type(module).__name__ or type(module).__name__.endswith("MLA"))
        and not type(module).__name__.endswith(("Layer", "Norm"))  # what surrounds attention in some hybrids
        and mixer_of(module) is None
        and "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__globals__
    ]


def without_router_loss(model: nn.Module) -> dict[str, bool]:
    """Keywords that keep a mixture of experts from computing its router loss over packed tokens.

    A shared token would weigh once, however many rows share it. Who wants the loss weighs them (integrations/trl).
    """
    config = transformers_model(model).config.get_text_config(decoder=True)
    return {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}


def largest_window(model: nn.Module) -> int | None:
    """The longest sliding window of any attention layer under ``model``; None where there is none."""
    windows = [window for _, m in attention_layers(model) if (window := _sliding_window(m)) is not None]
    return max(windows, default=None)


def numbers_padded_columns(model: nn.Module) -> bool:
    """Whether a padded forward without ``position_ids`` numbers padded columns too, as nearly all models do.

    Models with rotary positions give the same result either way; for learned positions it matters.
    """
    return transformers_model(model).config.model_type not in POSITIONS_SKIP_PADDING


def _type_reasons(config: Any, layers: list[tuple[str, nn.Module]]) -> list[str]:
    kind = config.model_type
    if config.is_encoder_decoder:
        return [f"{kind} is an encoder-decoder model; only decoder-only models share prefixes"]
    if reasons := reasons_of_type(config):
        return reasons
    if not layers:
        return [f"{kind} mixes tokens by code of its own, which is not supported yet"]
    known = _LAYER_TYPES.union(*(mixer.layer_types for _, m in layers if (mixer := mixer_of(m))))
    if kind == "minimax":
        known -= {"sliding_attention"}  # it would hand such layers the mask for padding
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if others:
        return [f"{kind} has layers of type {', '.join(others)}, which mix tokens in a way that is not supported yet"]
    return []


def _unproven(base: PreTrainedModel) -> list[str]:
    """What no test has compared: an unknown type, and other code than the one that was verified."""
    # FSDP2 puts a class of its own on top.
    own = next(c for c in type(base).__mro__ if issubclass(c, PreTrainedModel) and FSDPModule not in c.__bases__)
    if not own.__module__.startswith("transformers."):
        return [f"{own.__name__} is code from outside of transformers, which no test has compared with single rows"]
    kind = text_part(base).config.model_type
    if kind not in VERIFIED_MODEL_TYPES and kind not in TEXT_PARTS:
        return [f"model type {kind!r} has not been verified: no test has compared its packed forward with single rows"]
    return []


def _multimodal_reasons(base: PreTrainedModel) -> list[str]:
    kind = base.config.model_type
    if text_part(base) is base or kind in VERIFIED_MULTIMODAL_TYPES:
        return []
    return [f"{kind} is a multimodal model that no test has compared with single rows"]


def _unknown_masks(base: PreTrainedModel) -> list[str]:
    """Masks that a packed forward leaves out, and whose effect a few short rows may not show."""
    found = sorted(mask_functions(base) - _MASK_FUNCTIONS)
    found += [f"{name}={value}" for name, value in vars(base.config).items() if value and _SELECTS_KEYS.search(name)]
    found += sorted({type(m).__name__ for m in base.modules() if "Indexer" in type(m).__name__})
    return (
        [f"{type(base).__name__} masks its attention in a way that is not known here: {', '.join(found)}"]
        if found
        else []
    )


def _unknown_layers(config: Any, layers: list[tuple[str, nn.Module]], mixers: list[tuple[str, nn.Module]]) -> list[str]:
    kinds = getattr(config, "layer_types", None) or []
    expected = getattr(config, "num_hidden_layers", 0) - sum(kind in _POINTWISE_LAYER_TYPES for kind in kinds)
    if stack := getattr(config, "num_layers_per_stack", None):  # hrm_text runs two stacks again and again
        expected = 2 * stack
    known = len(layers) + len(mixers)
    if known and known < expected:
        return [f"only {known} of {expected} layers mix tokens in a way that is known here"]
    return []


def _attention_reasons(layers: list[tuple[str, nn.Module]], noncausal_config: bool) -> list[str]:
    reasons: dict[str, None] = {}  # ordered set: the layers of a model mostly share one reason
    for _, module in layers:
        dropout = _attention_dropout(module)
        config = getattr(module, "config", None)
        implementation = (getattr(config, "_attn_implementation", None) or "").split(":")[-1]
        if dropout:
            reasons[f"attention dropout is {dropout}: set `attention_dropout` (or `attn_pdrop`) to 0 in the config"] = (
                None
            )
        # A text that only images would be read both ways in ("vision") is causal.
        both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
        causal = getattr(module, "is_causal", True) and getattr(module, "is_decoder", True)
        if not causal or both_ways or noncausal_config:
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
    for adapter, config in _adapters(model).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "is_prompt_learning", False):
            reasons.append(f"adapter {adapter!r} learns a prompt ({kind}), which would stand in every row")
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


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Configs of PEFT by the names of the adapters; no wrapper (DDP, FSDP) hides them."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return next((configs for configs in found if isinstance(configs, dict)), {})


def _randomness_reasons(model: nn.Module) -> list[str]:
    """Randomness other than dropout, whose values a packed row would not share out as an ordinary batch does."""
    found = {
        (type(module).__name__, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if _OTHER_RANDOMNESS.search(name) and _is_rate(value)
    }
    return [
        f"{owner} draws at random while it trains ({name}={value}), so that no two forwards agree: set "
        f"`{_FIELD_OF_RANDOMNESS.get(name, name)}` to 0"
        for owner, name, value in sorted(found)
    ]


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _quantization_reasons(model: nn.Module, config: Any) -> list[str]:
    """Quantised weights are weights; activations that are quantised together make rows depend on each other."""
    # PEFT's layer around the one of bitsandbytes has the same name, but no state.
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt" and hasattr(m, "state")]
    thresholds = {layer.state.threshold for layer in layers if layer.state.threshold > 0}
    if thresholds:
        return [
            f"llm_int8_threshold={max(thresholds)} chooses by all tokens of a forward which columns are rounded, so that "
            "rows depend on what stands beside them: set it to 0, or load in 4 bits"
        ]
    recipe = type(getattr(getattr(config, "quantization_config", None), "quant_type", None)).__name__
    if "DynamicActivation" in recipe:
        return [
            f"{recipe} rounds the activations of a forward together, so that rows depend on what stands beside them"
        ]
    return []


def _notes(model: nn.Module) -> list[str]:
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    # opt, biogpt, seed_oss and starcoder2 keep plain numbers and call the function; some adapters only have a config
    rates |= {
        rate
        for owner in (*model.modules(), *_adapters(model).values())
        for name, rate in vars(owner).items()
        if _DROPOUT.search(name) and _is_rate(rate)
    }
    notes = []
    if limit := row_limit(model):
        notes.append(
            f"rope_type {limit[1]!r} turns all rows of a batch by other angles once one of them reaches {limit[0]} tokens: "
            "such batches are not shared"
        )
    if not rates:
        return notes
    return [
        *notes,
        f"dropout of {max(rates)} is active: the rows of a group share one dropout mask on their prompt, which is valid "
        "training but gives other numbers than the ordinary path; set it to 0 (`lora_dropout` too) to get the same",
    ]


def _where_attention_runs(base: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    weight = next(base.parameters())
    device, dtype = weight.device, weight.dtype
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype


def _describe(name: str, module: nn.Module, device: torch.device, dtype: torch.dtype) -> LayerSupport:
    window, softcap, sinks = _sliding_window(module), _softcap(module), _sinks(module)
    parts = ["causal" if window is None else f"sliding window of {window}"]
    if softcap is not None:
        parts.append(f"softcap {softcap}")
    if sinks is not None:
        parts.append("sinks")
    head_dim, value_dim = _head_dims(module)
    backend = auto_backend(device, dtype, head_dim, value_dim=value_dim, sliding_window=window, softcap=softcap)
    return LayerSupport(name, ", ".join(parts), backend)


def _head_dims(module: nn.Module) -> tuple[int, int]:
    """Head dims of query and key, and of value. Multi-head latent attention has names of its own for them."""
    config: Any = getattr(module, "config", None)
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    by_width = width // heads if heads and width else 64
    head_dim = next(
        (d for x in ("qk_head_dim", "head_dim") if isinstance(d := getattr(module, x, None), int)), by_width
    )
    value_dim = getattr(module, "v_head_dim", None)
    return head_dim, value_dim if isinstance(value_dim, int) else head_dim


def _describe_mixer(name: str, module: nn.Module) -> LayerSupport:
    return LayerSupport(name, mixer_of(module).kind, how_it_runs(module))  # type: ignore[union-attr]


def _attention_dropout(module: nn.Module) -> float:
    names = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")  # the last one in opt and biogpt
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
