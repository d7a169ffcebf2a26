"""Which models and settings are refused and why, and that no setting that makes training random passes in silence.

The self-check runs in evaluation mode and would not see random settings, nor would the comparisons of test_families.py,
which turn all dropout off. So the fields of each config are turned on one by one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.integrations.neftune import activate_neftune
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import UnsupportedModelError, check_support, enable_prefix_grouper
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.images import why_not_pack
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES, VERIFIED_MULTIMODAL_TYPES
from tests import tiny
from tests.modeling import families, multimodal_families

# No other field of a verified type's config made a training forward random when each was set to 0.25 (transformers 5.23).
FIELDS = re.compile("drop|jitter|noise")
RATE = 0.5  # neither a draw that keeps all nor one that drops all layers is likely


def fields_of(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the settings of a config and the configs inside of it that speak of randomness."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from fields_of(value, (*path, name))
        elif FIELDS.search(name) and (value is None or isinstance(value, (int, float))) and not isinstance(value, bool):
            yield *path, name


def turned_on(config: Any, *fields: tuple[str, ...]) -> Any:
    """A copy of ``config`` with those fields at RATE."""
    config = copy.deepcopy(config)
    for *path, name in fields:
        part = config
        for step in path:
            part = getattr(part, step)
        setattr(part, name, RATE)
    return config


def without_weights(config: Any, make: Callable[[Any], nn.Module] = AutoModelForCausalLM.from_config) -> nn.Module:
    with torch.device("meta"):
        return make(config)


def is_told(
    config: Any, field: tuple[str, ...], make: Callable[[Any], nn.Module] = AutoModelForCausalLM.from_config
) -> bool:
    try:
        model = without_weights(turned_on(config, field), make)
    except (ValueError, StrictDataclassError) as error:  # transformers refuses it itself
        return field[-1] in str(error)
    report = check_support(model)
    return any(str(RATE) in line for line in report.reasons + report.notes)


def is_random(model: nn.Module) -> bool:
    ids, outputs = torch.arange(3, 15)[None], []
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(model.train()(input_ids=ids, use_cache=False).logits)
    return not all(torch.equal(outputs[0], other) for other in outputs)


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES.intersection(CONFIG_MAPPING)))
def test_no_setting_that_makes_training_random_passes_in_silence(model_type):
    config = families.configure(model_type)
    silent = [field for field in fields_of(config) if not is_told(config, field)]
    if silent:  # then the model does not read it
        model = AutoModelForCausalLM.from_config(turned_on(config, *silent))
        assert not is_random(model), silent


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES.intersection(CONFIG_MAPPING)))
def test_none_of_a_vision_language_model_does_either(model_type):
    """Those of the vision tower too, whose draws the rows of a group share."""
    config = multimodal_families.configure(model_type)
    assert [f for f in fields_of(config) if not is_told(config, f, multimodal_families.make)] == []


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        (
            "mixtral",
            {"router_jitter_noise": 0.1},
            r"MixtralSparseMoeBlock draws at random while it trains \(jitter_noise=0.1\).* set `router_jitter_noise` to 0",
        ),
        ("minimax_m2", {"router_jitter_noise": 0.1}, "set `router_jitter_noise` to 0"),
        ("opt", {"layerdrop": 0.1}, r"OPTDecoder draws at random while it trains \(layerdrop=0.1\).* `layerdrop` to 0"),
    ],
)
def test_other_randomness_than_dropout_is_refused_with_the_field_to_change(model_type, changes, reason):
    model = tiny.model(model_type, **changes, **({"num_hidden_layers": 1} if model_type == "minimax_m2" else {}))
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_prefix_grouper(model)
    assert check_support(tiny.model(model_type)).supported


def test_dbrx_names_its_jitter_and_its_dropout():
    (reason,) = check_support(
        without_weights(turned_on(families.configure("dbrx"), ("ffn_config", "moe_jitter_eps")))
    ).reasons
    assert "(moe_jitter_eps=0.5)" in reason and "set `ffn_config.moe_jitter_eps` to 0" in reason
    (note,) = check_support(without_weights(turned_on(families.configure("dbrx"), ("resid_pdrop",)))).notes
    assert note.startswith("dropout of 0.5 is active")


def test_noise_on_embeddings_is_refused():
    """NEFTune scales it by the length of a forward, which is that of all rows when they are packed."""
    model = tiny.model()
    handle = activate_neftune(model, 5.0)
    with pytest.raises(UnsupportedModelError, match=r"neftune_noise_alpha=5.0.* set `neftune_noise_alpha` to 0"):
        enable_prefix_grouper(model)
    handle.remove()
    del model.get_input_embeddings().neftune_noise_alpha
    assert check_support(model).supported


def unbuilt(model_type: str, auto: Any = AutoModelForCausalLM, **changes: Any):
    """Without weights: the check reads the structure alone."""
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(model_type, **changes))


def test_positions_by_the_padding_token_are_refused_where_a_trainer_pads():
    assert "numbers positions by its own padding token" in check_support(families.build("xmod")).left_padding_reasons[0]
    assert not check_support(families.build("bert")).left_padding_reasons


@pytest.mark.parametrize("turns_values", [False, True])
def test_roformer_is_refused_on_the_left_exactly_where_padding_changes_its_rows(turns_values):
    model = families.build("roformer", rotary_value=turns_values)
    row = torch.arange(3, 15)[None]
    padded, mask = torch.nn.functional.pad(row, (5, 0)), torch.nn.functional.pad(torch.ones_like(row), (5, 0))
    alone, in_batch = model(input_ids=row).logits, model(input_ids=padded, attention_mask=mask).logits[:, 5:]
    assert ((alone - in_batch).abs().max() > 1e-2) == turns_values
    assert any("rotary_value=True" in reason for reason in check_support(model).left_padding_reasons) == turns_values


@pytest.mark.parametrize(
    ("model_type", "auto", "changes", "reason"),
    [
        ("t5", AutoModelForSeq2SeqLM, {"num_layers": 1}, "t5 is an encoder-decoder model"),
        (
            "paligemma",
            AutoModelForImageTextToText,
            {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}},
            "attention is not causal",
        ),
        ("big_bird", AutoModelForCausalLM, {"num_hidden_layers": 1}, "mixes tokens in its own code|is causal from"),
        (
            "minimax",
            AutoModelForCausalLM,
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "layers of type sliding_attention",
        ),
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


def test_a_multimodal_model_that_nobody_compared_needs_the_self_check_for_text_and_shares_no_images():
    changes = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"num_hidden_layers": 1}}
    model = unbuilt("video_llava", AutoModelForImageTextToText, **changes)
    report = check_support(model)
    assert report.supported
    assert report.unverified == ("video_llava is a multimodal model that no test has compared with single rows",)
    for name in ("pixel_values", "token_type_ids"):
        assert why_not_pack(model, [name]) == "images of video_llava have not been compared with single rows"
    assert why_not_pack(model, []) is None


def test_angles_of_the_longest_row_that_no_known_module_computes_are_refused():
    model = unbuilt("gemma3_text", num_hidden_layers=1)
    model.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    assert "rope_type 'dynamic'" in check_support(model).reasons[0]


def test_sinks_that_sdpa_ignores_are_left_out_and_noted():
    model = tiny.model("gpt_oss")
    with_sinks = model(input_ids=tiny.rows({5: [4]})[0][None]).logits
    model.config._attn_implementation = "sdpa"  # transformers refuses to load it so, but not to be told so later
    report = check_support(model)
    assert report.supported
    assert {layer.attention for layer in report.layers} == {"causal", "sliding window of 128"}
    (note,) = report.notes
    assert note.startswith(
        "sdpa ignores the attention sinks of this model, without sharing too, so packed rows leave them"
    )
    assert (model(input_ids=tiny.rows({5: [4]})[0][None]).logits - with_sinks).abs().max() > 1e-3


def test_a_softcap_is_refused_where_sdpa_refuses_it_and_left_out_where_sdpa_ignores_it():
    """Which of the two it does depends on the release of transformers, and an ordinary forward shows it."""
    model = tiny.model("gemma2")
    model.config._attn_implementation = "sdpa"
    try:
        model(input_ids=tiny.rows({5: [4]})[0][None])
    except ValueError:
        with pytest.raises(UnsupportedModelError, match=r'sdpa refuses a softcap.*"eager"'):
            enable_prefix_grouper(model)
    else:
        (note,) = check_support(model).notes
        assert note.startswith("sdpa ignores the softcap of this model")


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
