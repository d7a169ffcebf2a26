"""Why a model cannot take packed rows: one function for each part of it that decides.

Each returns its reasons, one sentence each with the remedy where there is one; an empty list where nothing speaks
against the model. What is known of single model types is in modeling/model_types.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from prefix_grouper_plugins.modeling.anatomy import Anatomy, Layer
from prefix_grouper_plugins.modeling.mixers.table import mixer_of, puts_bias_on_padding
from prefix_grouper_plugins.modeling.model_types import (
    known_of,
    reasons_of_type,
)
from prefix_grouper_plugins.modeling.rope import position_reasons
from prefix_grouper_plugins.modeling.support.adapters import adapter_reasons
from prefix_grouper_plugins.modeling.support.masks import mask_functions, masks_hide_nothing, window_reasons

# Layers of these types do not mix tokens.
_POINTWISE_LAYER_TYPES = {"mlp", "moe"}
# Attention of the core, and the mixers of modeling/mixers/. Chunked, sparse and compressed attention are neither.
_LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid"} | _POINTWISE_LAYER_TYPES
_LAYER_TYPES |= {"attention", "mamba"}  # transformers before 5.23
# Functions of transformers that make the masks which the core knows, and one that only tells recurrent layers what is padding.
_MASK_FUNCTIONS = {"create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate"}
_MASK_FUNCTIONS |= {"create_recurrent_attention_mask"}
# Settings of attention that takes some keys and leaves others, beyond what a few short rows show.
_SELECTS_KEYS = re.compile(r"attention_chunk_size|index_topk|sparse|keep_window|compress|block_topk")
# Fields in a config of what modules draw at random by, where these have other names.
_FIELD_OF_RANDOMNESS = {"jitter_noise": "router_jitter_noise", "moe_jitter_eps": "ffn_config.moe_jitter_eps"}


def reasons_to_refuse(anatomy: Anatomy) -> list[str]:
    """Why packed rows of a transformers model could differ from its rows."""
    parts = (anatomy.base.config, anatomy.config)
    if refused := [reason for part in parts if (reason := known_of(part.model_type).refused) is not None]:
        return refused[:1]  # what else speaks against it has remedies that would not help
    layers = anatomy.attention_layers + anatomy.mixers
    reasons = [
        *(_type_reasons(anatomy.config, layers) or _randomness_reasons(anatomy)),
        *_unknown_layers(anatomy.config, len(layers)),
        *position_reasons(anatomy.config, anatomy.text_row_limits),
        *_attention_reasons(layers, masks_hide_nothing(anatomy.text_models)),
        *adapter_reasons(anatomy.adapters),
        *_quantization_reasons(anatomy),
    ]
    # Their remedy would mislead next to reasons without one.
    return reasons or window_reasons(anatomy.text_models, anatomy.attention_layers)


def left_padding_reasons(anatomy: Anatomy) -> list[str]:
    """Why an ordinary batch that is padded on the left does not compute what its single rows compute."""
    kind = anatomy.config.model_type
    if (reason := known_of(kind).left_padding) is not None:
        return [reason]
    if anatomy.numbers_positions is not None:
        return [
            f"{kind} numbers positions by its own padding token, which need not be the one that a batch is padded with"
        ]
    counting = [type(module).__name__ for _, module in anatomy.mixers if mixer_of(module).counts_columns(module)]  # type: ignore[union-attr]
    if counting:
        return [
            f"{kind}: {counting[0]} counts columns, padding on the left included, so a padded batch does not compute what "
            "single rows compute"
        ]
    biased = [type(module).__name__ for _, module in anatomy.mixers if puts_bias_on_padding(module)]
    if biased:
        return [
            f"{kind}: {biased[0]} adds a bias to what it mixes, padding on the left included, so a padded batch does "
            "not compute what single rows compute"
        ]
    if getattr(anatomy.base.config, "rotary_value", False):
        return [f"{kind} with `rotary_value=True` turns its values by columns, so padding on the left changes them"]
    return []


def unverified_reasons(anatomy: Anatomy) -> list[str]:
    """What no test has compared: an unknown type, and other code than the one that was verified."""
    # FSDP2 puts a class of its own on top.
    classes = type(anatomy.base).__mro__
    own = next(c for c in classes if issubclass(c, PreTrainedModel) and FSDPModule not in c.__bases__)
    if not own.__module__.startswith("transformers."):
        return [f"{own.__name__} is code from outside of transformers, which no test has compared with single rows"]
    whole = anatomy.base.config.model_type
    if anatomy.text is not anatomy.base and not known_of(whole).verified_with_images:
        return [f"{whole} is a multimodal model that no test has compared with single rows"]
    kind = anatomy.config.model_type
    known = known_of(kind)
    if not (known.verified or known.text_part_of_verified):
        return [f"model type {kind!r} has not been verified: no test has compared its packed forward with single rows"]
    return []


def unknown_masks(anatomy: Anatomy) -> list[str]:
    """Masks that a packed forward leaves out, and whose effect a few short rows may not show."""
    base = anatomy.base
    # Not those of towers, which do not run on text.
    around_text = [model for model in anatomy.models if any(module is anatomy.text for module in model.modules())]
    found = sorted(mask_functions([*around_text, *anatomy.text_models]) - _MASK_FUNCTIONS)
    found += [f"{name}={value}" for name, value in vars(base.config).items() if value and _SELECTS_KEYS.search(name)]
    found += sorted(anatomy.indexers)
    if not found:
        return []
    return [f"{type(base).__name__} masks its attention in a way that is not known here: {', '.join(found)}"]


def _type_reasons(config: Any, layers: Sequence[Layer]) -> list[str]:
    kind = config.model_type
    if config.is_encoder_decoder:
        return [f"{kind} is an encoder-decoder model; only decoder-only models share prefixes"]
    if reasons := reasons_of_type(config):
        return reasons
    if not layers:
        return [f"{kind} mixes tokens in its own code, which is not supported yet"]
    known = _LAYER_TYPES.union(*(mixer.layer_types for _, m in layers if (mixer := mixer_of(m))))
    known -= known_of(kind).unshared_layer_types
    others = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if others:
        return [f"{kind} has layers of type {', '.join(others)}, which mix tokens in a way that is not supported yet"]
    return []


def _unknown_layers(config: Any, known: int) -> list[str]:
    kinds = getattr(config, "layer_types", None) or []
    # Decoders of encoder-decoder models mean the layers of their encoder by `num_hidden_layers`.
    layers: Any = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", 0)
    expected = layers - sum(kind in _POINTWISE_LAYER_TYPES for kind in kinds)
    if stack := getattr(config, "num_layers_per_stack", None):  # hrm_text runs two stacks again and again
        expected = 2 * stack
    if known and known < expected:
        return [f"only {known} of {expected} layers mix tokens in a way that is known here"]
    return []


def _attention_reasons(layers: Sequence[Layer], hide_nothing: bool) -> list[str]:
    reasons: dict[str, None] = {}  # ordered set: the layers of a model mostly share one reason
    for layer in layers:
        reasons |= dict.fromkeys(_reasons_of_layer(layer, hide_nothing))
    return list(reasons)


def _reasons_of_layer(layer: Layer, hide_nothing: bool) -> list[str]:
    reasons = []
    module, config = layer.module, getattr(layer.module, "config", None)
    if dropout := layer.dropout:
        reasons.append(f"attention dropout is {dropout}: set `attention_dropout` (or `attn_pdrop`) to 0 in the config")
    # A text that only images would be read both ways in ("vision") is causal.
    both_ways = getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    causal = getattr(module, "is_causal", True) and getattr(module, "is_decoder", True)
    if not causal or both_ways or hide_nothing:
        reasons.append("attention is not causal, so a prefix would depend on what follows it")
    if getattr(config, "reorder_and_upcast_attn", False):
        reasons.append("`reorder_and_upcast_attn=True` bypasses the attention interface")
    if layer.implementation == "sdpa" and layer.softcap is not None:
        reasons.append('sdpa refuses a softcap: load the model with `attn_implementation="eager"`')
    return reasons


def _randomness_reasons(anatomy: Anatomy) -> list[str]:
    """Randomness other than dropout, whose values a packed row would not share out as an ordinary batch does."""
    return [
        f"{owner} draws at random while it trains ({name}={value}), so that no two forwards agree: set "
        f"`{_FIELD_OF_RANDOMNESS.get(name, name)}` to 0"
        for owner, name, value in sorted(anatomy.randomness)
    ]


def _quantization_reasons(anatomy: Anatomy) -> list[str]:
    """Quantised weights are weights; activations that are quantised together make rows depend on each other."""
    if anatomy.int8_thresholds:
        return [
            f"llm_int8_threshold={max(anatomy.int8_thresholds)} chooses by all tokens of a forward which columns are "
            "rounded, so that rows depend on their neighbours: set it to 0, or load in 4 bits"
        ]
    quantization = getattr(anatomy.config, "quantization_config", None)
    recipe = type(getattr(quantization, "quant_type", None)).__name__
    if "DynamicActivation" in recipe:
        return [f"{recipe} rounds the activations of a forward together, so that rows depend on their neighbours"]
    return []
