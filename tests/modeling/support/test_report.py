"""What check_support says: which models and settings are refused and why, what is noted, and how layers are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from prefix_grouper_plugins import UnsupportedModelError, check_support, enable_prefix_grouper
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.support import report as support
from tests import tiny
from tests.modeling import families
from tests.modeling.test_attention import lora

# --- what is refused, and why ----------------------------------------------------------------------------------------


def unbuilt(model_type: str, auto: Any = AutoModelForCausalLM, **changes: Any):
    """Without weights: the check reads the structure alone."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **changes))


def test_positions_by_the_padding_token_are_refused_where_a_trainer_pads():
    assert "numbers positions by its own padding token" in check_support(families.build("xmod")).left_padding_reasons[0]
    assert not check_support(families.build("bert")).left_padding_reasons


@pytest.mark.parametrize(
    ("model_type", "auto", "changes", "reason"),
    [
        ("t5", AutoModelForSeq2SeqLM, {"num_layers": 1}, "t5 is an encoder-decoder model"),
        (
            "paligemma",
            AutoModelForImageTextToText,
            {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}},
            "paligemma is a multimodal model that no test has compared with single rows",
        ),
        ("big_bird", AutoModelForCausalLM, {"num_hidden_layers": 1}, "mixes tokens by code of its own|is causal from"),
        ("deepseek_v32", AutoModelForCausalLM, {"num_hidden_layers": 1}, "layers of type indexed_attention"),
        ("doge", AutoModelForCausalLM, {"num_hidden_layers": 1, "keep_window_size": 9}, "doge keeps the 9 keys"),
        ("doge", AutoModelForCausalLM, {"num_hidden_layers": 1, "is_moe": True}, "mixes the router logits"),
        ("phimoe", AutoModelForCausalLM, {"num_hidden_layers": 1}, "draws its experts at random"),
        ("bloom", AutoModelForCausalLM, {"n_layer": 1, "attention_dropout": 0.1}, "attention dropout is 0.1"),
        ("bert", AutoModel, {"num_hidden_layers": 1}, "attention is not causal"),
        ("roberta", AutoModelForCausalLM, {"num_hidden_layers": 1, "is_decoder": False}, "attention is not causal"),
        (
            "bert",
            AutoModelForCausalLM,
            {"num_hidden_layers": 1, "is_decoder": True},
            "attention dropout is 0.1",
        ),
        ("rembert", AutoModelForCausalLM, {"num_hidden_layers": 1}, "attention is not causal|is causal from"),
        ("qwen3", AutoModelForCausalLM, {"attention_dropout": 0.1}, "attention dropout is 0.1: set `attention_dropout`"),
        ("gpt2", AutoModelForCausalLM, {"n_layer": 1}, "attention dropout is 0.1: .*attn_pdrop"),
        ("opt", AutoModelForCausalLM, {"num_hidden_layers": 1, "attention_dropout": 0.2}, "attention dropout is 0.2"),
        (
            "biogpt",
            AutoModelForCausalLM,
            {"num_hidden_layers": 1, "attention_probs_dropout_prob": 0.2},
            "attention dropout is 0.2",
        ),
        (
            "gpt2",
            AutoModelForCausalLM,
            {"n_layer": 1, "attn_pdrop": 0.0, "reorder_and_upcast_attn": True},
            "bypasses the attention interface",
        ),
        (
            "gemma3_text",
            AutoModelForCausalLM,
            {"num_hidden_layers": 1, "use_bidirectional_attention": True},
            "attention is not causal",
        ),
    ],
)  # fmt: skip
def test_models_that_could_go_wrong_are_refused_with_the_reason(model_type, auto, changes, reason):
    model = unbuilt(model_type, auto, **changes)
    before = [config._attn_implementation for config in Anatomy(model).configs]
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_prefix_grouper(model)
    assert [config._attn_implementation for config in Anatomy(model).configs] == before
    assert not check_support(model).supported


def test_angles_of_the_longest_row_that_no_known_module_computes_are_refused():
    model = unbuilt("gemma3_text", num_hidden_layers=1)
    model.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    assert "rope_type 'dynamic'" in check_support(model).reasons[0]


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_sdpa_with_softcap_or_sinks_is_refused(model_type):
    model = tiny.model(model_type)
    assert check_support(model).supported
    model.config._attn_implementation = "sdpa"  # transformers refuses to load it so, but not to be told so later
    with pytest.raises(UnsupportedModelError, match=r'sdpa ignores softcap and attention sinks.*"eager"'):
        enable_prefix_grouper(model)


def test_a_layer_whose_attention_was_replaced_is_refused():
    class Patched(nn.Module):
        def forward(self, *args, **kwargs):
            raise AssertionError

    model = tiny.model("llama")
    model.model.layers[1].self_attn = Patched()
    assert check_support(model).reasons == ("only 2 of 3 layers mix tokens in a way that is known here",)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear contains no transformers model"):
        enable_prefix_grouper(nn.Linear(2, 2))


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_how_each_layer_is_run():
    def layers(model_type):
        report = check_support(families.build(model_type))
        assert report.supported and report.reasons == () and report.notes == ()
        return [(layer.attention, layer.backend) for layer in report.layers]

    assert layers("llama") == [("causal", "merged_lse")] * 3
    assert layers("mistral") == [("sliding window of 5", "blockwise")] * 3
    assert layers("gemma2") == [
        ("sliding window of 5, softcap 50.0", "blockwise"),
        ("causal, softcap 50.0", "blockwise"),
        ("sliding window of 5, softcap 50.0", "blockwise"),
    ]
    assert layers("gpt_oss") == [
        ("sliding window of 5, sinks", "blockwise"),
        ("causal, sinks", "merged_lse"),
        ("sliding window of 5, sinks", "blockwise"),
    ]


@pytest.mark.parametrize(
    ("model_type", "dtype", "has_gpu", "expected"),
    [
        # multi-head latent attention: 128 + 64 for query and key, 128 for value
        ("deepseek_v3", torch.float32, True, ("cuda", torch.bfloat16, 192, 128)),
        ("llama", torch.float16, True, ("cuda", torch.float16, 128, 128)),
        ("llama", torch.float32, False, ("cpu", torch.float32, 128, 128)),
    ],
)
def test_the_report_asks_for_the_device_the_dtype_and_the_head_dims(monkeypatch, model_type, dtype, has_gpu, expected):
    """Models without weights, as `doctor` builds them, are described for this machine's GPU if it has one."""
    asked = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        support,
        "auto_backend",
        lambda device, dtype, head_dim, *, value_dim, **_: asked.add((device.type, dtype, head_dim, value_dim)),
    )
    check_support(unbuilt(model_type, num_hidden_layers=2).to(dtype))
    assert asked == {expected}


def test_the_report_names_the_layers_of_a_wrapped_model_too():
    names = [layer.name for layer in check_support(lora(tiny.model())).layers]
    assert names == [f"base_model.model.model.layers.{i}.self_attn" for i in range(3)]


@pytest.mark.parametrize(
    ("model_type", "changes", "rate"),
    [
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.15, "embd_pdrop": 0.0}, 0.15),
        ("opt", {"dropout": 0.15}, 0.15),  # opt and the next two keep a number and call the function
        ("starcoder2", {"residual_dropout": 0.15, "embedding_dropout": 0.0}, 0.15),
        ("seed_oss", {"residual_dropout": 0.15, "attention_dropout": 0.0}, 0.15),
    ],
)
def test_other_dropout_is_allowed_and_noted(model_type, changes, rate):
    report = check_support(unbuilt(model_type, **changes))
    assert report.supported
    assert len(report.notes) == 1 and report.notes[0].startswith(f"dropout of {rate} is active")


def test_lora_dropout_is_noted():
    (note,) = check_support(lora(tiny.model(), lora_dropout=0.05)).notes
    assert note.startswith("dropout of 0.05 is active") and "lora_dropout" in note
