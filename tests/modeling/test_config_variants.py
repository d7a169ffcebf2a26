"""Settings of verified types other than those that test_families.py builds: exact as well, or refused.

What a config can ask for is found by reading the modeling files; each case here is one that decides what a token sees, at
which position, or how states run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import UnsupportedModelError, check_support, disable_prefix_grouper, enable_prefix_grouper
from prefix_grouper_plugins.modeling import attention as interface
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.enable import enable_layers
from prefix_grouper_plugins.modeling.support.masks import mask_functions
from tests.modeling import families
from tests.modeling.test_families import assert_packed_equals, gradients, single_rows
from tests.modeling.unseen import UnseenForCausalLM, unseen

ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e2, "factor": 4.0, "original_max_position_embeddings": 4}

EXACT: list[tuple[str, dict[str, Any]]] = [
    # Windows: of one token, on some layers, shorter and longer than prompts.
    ("qwen2", {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 1}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ALTERNATING}),
    ("mistral", {"sliding_window": 2}),
    ("ministral", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 2}),
    ("exaone4", {"layer_types": ["full_attention"] * 3, "sliding_window": None}),
    ("modernbert-decoder", {"sliding_window": 2}),
    ("gpt_neo", {"window_size": 1}),
    ("recurrent_gemma", {"attention_window_size": 2, "conv1d_width": 2}),
    ("moshi", {"sliding_window": 2}),
    ("olmo3", {"layer_types": ALTERNATING, "sliding_window": 3}),
    # The window stands in the mask alone, as attention does not hand it on; or the other way round, where only kernels
    # without a mask would apply it.
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ALTERNATING}),
    ("smollm3", {"use_sliding_window": False, "sliding_window": 3, "layer_types": ALTERNATING}),
    ("olmoe", {"sliding_window": 3}),
    ("minimax_m3_vl_text", {"layer_types": ["full_attention"] * 3}),
    ("dots3_note_text", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("deepseek_v4", {"layer_types": ["sliding_attention"] * 3}),
    # Positions.
    ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}),
    ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e2, "partial_rotary_factor": 0.25}}),
    ("granite_swa", {"layer_rope_theta": [1e2, 1e4, 0.0]}),
    ("smollm3", {"no_rope_layers": [0, 1, 0]}),
    ("gptj", {"rotary_dim": 8}),
    *(
        ("falcon", {"multi_query": mq, "new_decoder_architecture": new, "alibi": alibi, "parallel_attn": parallel})
        for mq, new, alibi, parallel in [
            (False, False, True, False),
            (True, False, True, True),
            (False, True, False, True),
        ]
    ),
    ("mpt", {"attn_config": {"alibi": True, "alibi_bias_max": 4, "clip_qkv": 0.5}}),
    # Scores, heads and latent attention.
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("cohere", {"use_qk_norm": True}),
    ("olmo", {"clip_qkv": 0.1, "num_key_value_heads": 1}),
    ("phi", {"qk_layernorm": True}),
    ("deepseek_v2", {"q_lora_rank": None, "n_routed_experts": 8, "routed_scaling_factor": 3.0}),
    ("deepseek_v3", {"q_lora_rank": None, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    ("gemma3n_text", {"num_kv_shared_layers": 0, "altup_active_idx": 1}),
    ("gemma4_text", {"num_kv_shared_layers": 1}),
    # States: kernels longer than responses, chunks of one token and longer than rows, clamped time steps.
    ("lfm2", {"conv_L_cache": 9}),
    ("lfm2", {"conv_L_cache": 1}),
    ("mamba", {"conv_kernel": 7}),
    ("mamba2", {"chunk_size": 1, "conv_kernel": 2}),
    ("mamba2", {"chunk_size": 32, "time_step_limit": (0.0, 0.01)}),
    ("bamba", {"mamba_chunk_size": 3, "attn_layer_indices": [0, 2]}),
    ("nemotron_h", {"chunk_size": 3, "n_groups": 1, "mamba_hidden_act": "relu"}),
    ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 0, "mamba_d_conv": 2}),
    ("minimax", {"block_size": 3}),
    ("zaya", {"cca_time0": 3, "cca_time1": 3}),
    ("rwkv", {"rescale_every": 1}),
    # Weights that several layers or both ends share.
    ("llama", {"tie_word_embeddings": True, "pad_token_id": 5}),
    ("hrm_text", {"H_cycles": 1, "L_cycles": 2}),
]


@pytest.mark.parametrize(("model_type", "changes"), EXACT, ids=[f"{t}-{'-'.join(c)}" for t, c in EXACT])
def test_packed_rows_are_exact_under_other_settings_too(model_type, changes):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = families.build(model_type, **changes)
    report = check_support(model)
    if model_type == "nemotron_h" and "is causal from transformers" in str(report.reasons):
        pytest.skip(str(report.reasons))
    expected = single_rows(model)
    expected_gradients = gradients(model, expected)
    noise = 1e-5 * max(float(g.abs().max()) for g in expected_gradients.values())
    assert_packed_equals(expected, expected_gradients, enable_prefix_grouper(model, self_check=False), noise)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("minimax", {"layer_types": ALTERNATING}, "minimax has layers of type sliding_attention"),
        # transformers then makes masks for reading both ways.
        ("llama", {"is_causal": False}, "attention is not causal"),
        ("falcon", {"is_causal": False}, "attention is not causal"),
    ],
)
def test_what_a_mask_alone_would_say_is_refused(model_type, changes, reason):
    model = families.build(model_type, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_prefix_grouper(model, self_check=False)


def test_a_window_that_is_changed_in_the_config_of_a_built_model_is_that_of_the_mask():
    """Masks follow the config, attention keeps what it read when it was built."""
    model = families.build("gemma2")
    before = single_rows(model)
    model.config.sliding_window = 2
    expected = single_rows(model)
    assert max(float((x - y).detach().abs().max()) for x, y in zip(before, expected, strict=True)) > 1e-2
    assert check_support(model).layers[0].attention.startswith("sliding window of 2")
    assert_packed_equals(expected, gradients(model, expected), enable_prefix_grouper(model, self_check=False), 1e-6)
    disable_prefix_grouper(model)
    assert all("_window_of_mask" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(("implementation", "window"), [("sdpa", 3), ("flash_attention_2", None)])
def test_the_window_is_the_one_that_the_users_implementation_applies(implementation, window):
    """Flash kernels have no mask, so qwen2_moe has no window under them."""
    model = families.build(
        "qwen2_moe", use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 3
    )
    model.config._attn_implementation = implementation
    enable_layers(Anatomy(model), "auto")
    attention = model.model.layers[0].self_attn
    assert interface._window(attention, implementation, None) == window


def test_a_window_that_nobody_knows_the_rule_for_is_refused():
    model = families.build(
        "qwen2_moe", use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 3
    )
    model.config._attn_implementation = "my_kernels"
    (reason,) = check_support(model).reasons
    assert "Qwen2MoeAttention masks with sliding_window=3 but calls its attention function with None" in reason
    assert "which of them 'my_kernels' applies: load the model with `attn_implementation=\"sdpa\"`" in reason


def test_a_mask_that_is_made_in_a_lambda_is_seen():
    """So transformers does where it makes only the masks that the layers ask for."""

    class Lazy(UnseenForCausalLM):
        def forward(self, *args, **kwargs):
            masks = {"chunked_attention": lambda: create_chunked_causal_mask(self.config)}  # noqa: F821
            return super().forward(*args, **kwargs) if masks else None

    model = unseen()
    model.__class__ = Lazy
    assert mask_functions(Anatomy(model).models) == {"create_chunked_causal_mask"}
    assert "not known here: create_chunked_causal_mask" in str(check_support(model).reasons)


BIASED = {
    "mamba": {"use_bias": True},
    "mamba2": {"use_bias": True},
    "jamba": {"mamba_proj_bias": True},
    "zamba2": {"add_bias_linear": True},
    "lfm2": {"conv_bias": True},
    "zaya": {"attention_bias": True},
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("model_type", sorted(BIASED))
def test_recurrent_layers_that_put_a_bias_on_padding_are_not_padded(model_type, biased):
    """What is said of padding is what a batch that is padded on the left shows."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = families.build(model_type, **(BIASED[model_type] if biased else {}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # biases are zero at first
                weight.add_(0.3 * torch.randn_like(weight))
    row = torch.arange(5, 11)
    alone = model(input_ids=row[None], use_cache=False).logits[0]
    padded, mask = torch.cat([torch.zeros(3, dtype=row.dtype), row]), torch.tensor([0] * 3 + [1] * 6)
    behind = model(input_ids=padded[None].repeat(2, 1), attention_mask=mask[None].repeat(2, 1), use_cache=False).logits[
        0
    ]
    report = check_support(model)
    assert bool(report.left_padding_reasons) is biased
    if biased:
        assert "adds a bias to what it mixes, padding on the left included" in report.left_padding_reasons[0]
    elif report.supported:
        torch.testing.assert_close(behind[3:], alone, rtol=1e-4, atol=1e-4)
    if biased and Version(transformers.__version__) >= Version("5.23"):  # older code of some types blanks it again
        assert (behind[3:] - alone).abs().max() > 1e-3
