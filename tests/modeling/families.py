"""A tiny model of any causal-LM type, with every feature of its config that bears on attention switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import SIZES

LAYERS = 3
# Set only where the type's config has the field.
OPTIONAL: dict[str, Any] = {
    "sliding_window": 5,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "ffn_hidden_size": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": 128,
    "n_inner": 64,
}
# Multi-head latent attention has as many key heads as query heads.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
}


def build(model_type: str) -> PreTrainedModel:
    """In float64, with all dropout off."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    settings = {k: v for k, v in SIZES.items() if k not in OPTIONAL} | {
        k: v for k, v in OPTIONAL.items() if k in defaults
    }
    settings |= {k: 0.0 for k, v in defaults.items() if isinstance(v, float) and ("dropout" in k or "pdrop" in k)}
    if defaults.get("layer_types"):
        kinds = list(dict.fromkeys(defaults["layer_types"]))
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    config = AutoConfig.for_model(model_type, **(settings | CHANGES.get(model_type, {})))
    torch.manual_seed(0)
    # transformers before 5.11 takes sdpa for such models by default, which ignores the cap.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model.eval()
