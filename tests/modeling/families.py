"""A tiny model of any causal-LM type, with every feature of its config that bears on attention switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import SIZES

LAYERS = 3
# Code that computes only in float32.
SINGLE_PRECISION = {"inkling2_loop_text", "inkling2_text", "xglm", "xlm"}
# Set only where the type's config has the field. The defaults of some are as wide as a real model's, and slow.
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
    "ffn_dim": 64,
    "dff": 64,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 64,
    "router_hidden_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "mamba_d_state": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "kv_channels": 8,
    # Fewer than rows have, so that some are left out. With few heads, scores of two keys would both be zero.
    "index_topk": 4,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "hc_mult": 2,
    "conv_kernel_size": 3,
    "adapter_rank": 8,
    "embedding_size": 16,
    "input_embedding_size": 16,
    "output_embedding_size": 48,
    "pronunciation_embed_dim": 8,
    "pronunciation_vocab_size": 24,
    "shape_embed_dim": 8,
    "shape_vocab_size": 24,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": 512,
    "n_inner": 64,
    "max_position_embeddings": SIZES["max_position_embeddings"],
    "is_decoder": True,  # of those that are encoders otherwise
    # Decoders of encoder-decoder models.
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    # Of xlm and xlnet, whose usual models are not causal.
    "causal": True,
    "attn_type": "uni",
}
_RELATIVE_POSITIONS = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 5,
    "d_rel": 4,
    "rel_extent": 6,
    "log_scaling_n_floor": 4,
}
_PADDED_HEAD = {"vocab_size": SIZES["vocab_size"] + 4, "unpadded_vocab_size": SIZES["vocab_size"]}
# Multi-head latent attention has as many key heads as query heads.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gemma4_text": {
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "whisper": {"max_target_positions": 512, "max_source_positions": 8},
    "dots3_note": {
        "vision_config": {"adapter_out_dim": SIZES["hidden_size"]},
        "audio_config": {"adapter_out_dim": SIZES["hidden_size"]},
    },
    "moss_transcribe_diarize": {
        "audio_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_source_positions": 8,
        }
    },
    "emu3_text_model": {"bos_token_id": 2},
    "mllama_text_model": {"bos_token_id": 2, "cross_attention_layers": [1]},
    "xlm": {"n_heads": 4, "n_layers": LAYERS, "emb_dim": 32},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "git": {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 4,
            "patch_size": 4,
        }
    },
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "crop_size": 8,
            "patch_size": 4,
        },
        "audio_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 8,
            "depthwise_separable_out_channel": 8,
            "nemo_conv_channels": 8,
        },
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "num_layers": LAYERS, "window_size": 5},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_chunk_size": 4,
        "mamba_n_groups": 2,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 4, "mamba_n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_chunk_size": 4,
        "mamba_n_groups": 2,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "minimax": {"block_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "n_group": 1,
        "num_experts_per_tok": 2,
    },
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        "attention_chunk_size": 5,
        "floor_scale": 4,
        "attn_temperature_tuning": True,
        "no_rope_layers": [1, 1, 0],
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "recurrent"], "attention_window_size": 5},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {"num_heads": 4, "num_blocks": LAYERS, "chunk_size": 16},
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4, "gated_norm_rank": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
        "hc_sinkhorn_iters": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "glm_moe_dsa": {"num_key_value_heads": 4, "indexer_types": ["full", "shared", "full"]},
    "hy_v4": {"indexer_types": ["full", "shared", "full"], "learnable_sink_init": 0.5},
    "inkling_text": {
        **_RELATIVE_POSITIONS,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "logits_mup_width_multiplier": 2.0,
        **_PADDED_HEAD,
    },
    "inkling2_text": {
        **_RELATIVE_POSITIONS,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "qk_l2_clip_threshold": 2.0,
        "rel_l2_clip_threshold": 1.0,
        "n_layers_per_attn_res_block": 2,
        **_PADDED_HEAD,
    },
    "inkling2_loop_text": {
        **_RELATIVE_POSITIONS,
        **_PADDED_HEAD,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "qk_l2_clip_threshold": 2.0,
        "rel_l2_clip_threshold": 1.0,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "sarvam_mla": {"num_key_value_heads": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "dense_intermediate_size": 32,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
        "logit_scale": 0.5,
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "num_key_value_heads": 4,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
        "shared_experts_intermediate_size": 16,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [3],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 31,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "minicpm3": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
    "cwm": {"bos_token_id": 2},
    "modernbert-decoder": {"bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2},
    "zaya": {"num_experts_per_tok": 1},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "doge": {"sliding_window": 7},
    # The kind with block-sparse attention is for encoders alone.
    "big_bird": {"attention_type": "original_full", "sep_token_id": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "vocab_size_per_layer_input": 24,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "longcat_flash": {
        "num_layers": 2,
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "n_routed_experts": 4,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "mamba_ngroups": 2,
        "chunk_size": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        # transformers before 5.23 builds the router for hidden states as wide as the experts
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
}

# The config works out the kinds of layers itself, from other settings above.
_KINDS_BY_PERIOD = {"jamba", "nemotron_h", "zamba", "zamba2", "bamba"}


def configure(model_type: str, **changes: Any) -> Any:
    """Its tiny config. ``changes`` are settings of it, of its text part where it has one."""
    defaults = CONFIG_MAPPING[model_type]().to_dict()
    if isinstance(text := defaults.get("text_config"), dict):
        kind = text["model_type"]
        parts = {"text_config": {"model_type": kind, **_settings(kind, text, changes)}}
        return AutoConfig.for_model(model_type, **parts, **CHANGES.get(model_type, {}))
    return AutoConfig.for_model(model_type, **_settings(model_type, defaults, changes))


def _settings(model_type: str, defaults: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in SIZES.items() if k not in OPTIONAL} | {
        k: v for k, v in OPTIONAL.items() if k in defaults
    }
    settings |= {k: 0.0 for k, v in defaults.items() if isinstance(v, float) and ("dropout" in k or "pdrop" in k)}
    if defaults.get("layer_types") and model_type not in _KINDS_BY_PERIOD:
        kinds = list(dict.fromkeys(defaults["layer_types"]))
        settings["layer_types"] = [kinds[i % len(kinds)] for i in range(changes.get("num_hidden_layers", LAYERS))]
    return settings | CHANGES.get(model_type, {}) | changes


def build(model_type: str, **changes: Any) -> PreTrainedModel:
    """In float64 where the code allows, with all dropout off. ``changes`` are settings of its config."""
    config = configure(model_type, **changes)
    torch.manual_seed(0)
    # transformers before 5.11 takes sdpa for models with a cap by default, which ignores it; doge was not causal there.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) or model_type == "doge" else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.float() if model_type in SINGLE_PRECISION else model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.requires_grad:  # no table of sines
                weight.normal_(0, 0.3)
    return model.eval()
