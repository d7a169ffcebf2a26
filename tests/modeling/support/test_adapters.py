"""Adapters of PEFT: packed logits and the gradients of all that is trained are those of single rows, or it is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_grouper_plugins import UnsupportedModelError, check_support, enable_prefix_grouper
from prefix_grouper_plugins.modeling.support.adapters import VERIFIED_ADAPTERS
from tests import tiny
from tests.modeling.comparing import (
    LAYOUT,
    assert_packed_equals_single_rows,
    assert_same_gradients,
    exact,
    gradients,
    loss,
    packed,
    single_rows,
)

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
# Configs of PEFT with what a tiny llama needs; the name of the class without "Config" is that of the type.
ADAPTERS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 10, "init_r": 4, "target_r": 2, **ATTENTION},
    "Beft": ATTENTION,
    "BOFT": {"boft_block_size": 4, **ATTENTION},
    "C3A": {"block_size": 8, **ATTENTION},
    "Deft": ATTENTION,
    "Delora": ATTENTION,
    "FourierFT": {"n_frequency": 50, **ATTENTION},
    "Frod": ATTENTION,
    "Glora": ATTENTION,
    "Gralora": ATTENTION,
    "Hira": ATTENTION,
    "HRA": ATTENTION,
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuning": {"target_modules": ["input_layernorm"]},
    "LoHa": ATTENTION,
    "LoKr": ATTENTION,
    "Lora": ATTENTION,
    "Miss": {"r": 8, **ATTENTION},
    "OFT": {"oft_block_size": 4, "r": 0, **ATTENTION},
    "OSF": ATTENTION,
    "Peanut": ATTENTION,
    "Psoft": {"r": 4, **ATTENTION},
    "RandLora": ATTENTION,
    "Road": {"group_size": 8, **ATTENTION},
    "Shira": {"r": 4, **ATTENTION},
    "SuperTuning": ATTENTION,
    "TinyLora": ATTENTION,
    "TrainableTokens": {"token_indices": [4, 5, 6]},
    "UniLora": ATTENTION,
    "VBLoRA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 2, **ATTENTION},
    "Vera": ATTENTION,
    "WaveFT": {"n_frequency": 64, **ATTENTION},
}


def config_of(name: str, **options: Any) -> Any:
    """PEFT's config class, whatever the case of its name; the test is skipped where this PEFT has none."""
    classes = {key.lower(): value for key, value in vars(peft).items() if key.endswith("Config")}
    if f"{name.lower()}config" not in classes:
        pytest.skip(f"peft {peft.__version__} has no {name}")
    return classes[f"{name.lower()}config"](task_type="CAUSAL_LM", **options)


def kind_of(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def shake(model: nn.Module) -> None:
    """Adapters begin as nothing; let them do something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad and weight.dim():
                weight.add_(torch.randn(weight.shape) * 0.2)


def wrapped(model: PreTrainedModel, config: Any) -> PeftModel:
    torch.manual_seed(0)
    # Some adapters make float32 weights of their own, or refuse to begin with anything else.
    model = get_peft_model(model.float(), config)  # type: ignore[assignment]
    shake(model)
    return enable_prefix_grouper(model.double().eval())  # type: ignore[return-value]


def mixture_of_experts() -> PreTrainedModel:
    model = exact("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_packed_gradients_of_every_adapter_equal_those_of_single_rows(name):
    model = wrapped(exact("llama"), config_of(name, **ADAPTERS[name]))
    assert_packed_equals_single_rows(model, 1e-6)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients(model, loss(LAYOUT.unpack(packed(model)))).keys() == trained


def test_the_adapters_compared_here_are_those_that_are_called_verified_and_those_in_the_docs():
    classes = {key.lower(): value for key, value in vars(peft).items() if key.endswith("Config")}
    compared = {
        kind_of(classes[f"{name.lower()}config"](**options))
        for name, options in ADAPTERS.items()
        if f"{name.lower()}config" in classes
    }
    assert compared <= VERIFIED_ADAPTERS and len(VERIFIED_ADAPTERS) == len(ADAPTERS)
    text = (Path(__file__).parents[3] / "docs/quickstart-trl.md").read_text()
    listed = re.search(r"<!-- adapters -->(.*)<!-- /adapters -->", text, re.S)[1]  # type: ignore[index]
    assert set(re.findall(r"\w+", listed)) == VERIFIED_ADAPTERS


# --- LoRA in its variants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_rslora": True, "lora_bias": True},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "v_proj"], "trainable_token_indices": None, "use_dora": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": [5, 6, 7]},
    ],
    ids=["all_linear", "rslora", "dora", "modules_to_save", "embeddings", "trainable_tokens"],
)
def test_packed_gradients_of_lora_variants_equal_those_of_single_rows(options):
    model = wrapped(exact(tie_word_embeddings=False), LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    assert_packed_equals_single_rows(model)


@pytest.mark.parametrize(
    "target", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.gate.weight"]], ids=str
)
def test_packed_gradients_of_lora_on_experts_and_router_equal_those_of_single_rows(target):
    options = {"target_modules": ["q_proj"], "target_parameters": target}
    model = wrapped(mixture_of_experts(), LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    assert any("experts" in name or "gate" in name for name, p in model.named_parameters() if p.requires_grad)
    assert_packed_equals_single_rows(model, 1e-6)  # the router computes in float32


def test_each_of_several_adapters_and_the_base_give_their_own_rows():
    base = exact()
    bare = [row.detach() for row in single_rows(base)]
    model = wrapped(base, LoraConfig(task_type="CAUSAL_LM", r=4, **ATTENTION))
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj", "up_proj"]))
    logits = {}
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        shake(model)
        model.double()
        assert_packed_equals_single_rows(model)
        assert {n.split(".")[-2] for n in gradients(model, loss(LAYOUT.unpack(packed(model))))} == {adapter}
        logits[adapter] = packed(model).detach()
    assert (logits["other"] - logits["default"]).abs().max() > 1e-3
    with model.disable_adapter():  # the reference policy
        for row, wanted in zip(LAYOUT.unpack(packed(model)), bare, strict=True):
            torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)


# --- quantised bases -------------------------------------------------------------------------------------------------


def quantised(folder: Path, recipe: Any) -> PeftModel:
    path = tiny.saved_model(folder, hidden_size=64, head_dim=16, intermediate_size=128)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=recipe, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    shake(model)
    return model.eval()


def assert_float32_packed_equals_single_rows(model: PeftModel) -> None:
    expected, got = single_rows(model), LAYOUT.unpack(packed(model))
    for row, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(model, loss(got)), gradients(model, loss(expected)), 1e-4)


def weights_in_4_bits() -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def weights_in_8_bits() -> Any:
    """Rows of activations are rounded one by one, without outlier columns."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def torchao_weights() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_weights() -> Any:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.parametrize("recipe", [weights_in_4_bits, weights_in_8_bits, torchao_weights, quanto_weights])
def test_packed_gradients_of_lora_on_a_quantised_base_equal_those_of_single_rows(recipe, tmp_path):
    assert_float32_packed_equals_single_rows(enable_prefix_grouper(quantised(tmp_path, recipe())))


def test_bitsandbytes_8_bit_outliers_are_refused_since_a_batch_differs_from_its_rows(tmp_path):
    """The reason that the refusal gives, seen without any packing."""
    recipe = weights_in_8_bits()
    recipe.llm_int8_threshold = 6.0  # the default of bitsandbytes
    model = quantised(tmp_path, recipe)
    with pytest.raises(UnsupportedModelError, match=r"llm_int8_threshold=6\.0 chooses by all tokens"):
        enable_prefix_grouper(model)
    rows = torch.randint(3, 24, (6, 12), generator=torch.Generator().manual_seed(0))
    together = model(input_ids=rows).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
    assert (together - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("threshold", "refused"), [(6.0, True), (0.0, False)])
def test_outlier_columns_are_seen_by_the_class_of_the_layer(threshold, refused):
    class Linear8bitLt(nn.Linear):
        state = SimpleNamespace(threshold=threshold)

    model = tiny.model()
    wrapper = type("Linear8bitLt", (nn.Sequential,), {})  # PEFT's layer around it has the same name
    model.model.layers[1].mlp.up_proj = wrapper(Linear8bitLt(32, 64, bias=False))
    reasons = check_support(model).reasons
    assert bool(reasons) == refused
    assert not refused or "llm_int8_threshold=6.0 chooses by all tokens of a forward" in reasons[0]


def test_activations_that_are_rounded_together_are_refused():
    class Int8DynamicActivationInt8WeightConfig:
        pass

    model = tiny.model()
    model.config.quantization_config = SimpleNamespace(quant_type=Int8DynamicActivationInt8WeightConfig())
    (reason,) = check_support(model).reasons
    assert reason.startswith("Int8DynamicActivationInt8WeightConfig rounds the activations of a forward together")


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("PromptTuning", {"num_virtual_tokens": 3}, r"adapter 'default' learns a prompt \(PROMPT_TUNING\)"),
        ("PrefixTuning", {"num_virtual_tokens": 3}, r"adapter 'default' learns a prompt \(PREFIX_TUNING\)"),
        (
            "PromptEncoder",
            {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
            r"adapter 'default' learns a prompt \(P_TUNING\)",
        ),
        ("Lily", ATTENTION, r"adapter 'default' \(LILY\) mixes its experts by a mean over all tokens"),
        ("PVera", ATTENTION, "adapter 'default' is of type PVERA, which no test has compared"),
        ("Lora", {"alora_invocation_tokens": [5, 6], **ATTENTION}, "adapter 'default' is an aLoRA"),
    ],
)
def test_what_would_not_give_the_rows_of_the_adapter_is_refused_with_the_reason(name, options, reason):
    model = get_peft_model(tiny.model("llama"), config_of(name, **options))
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_prefix_grouper(model)


def test_a_batch_of_lily_differs_from_its_rows():
    """The reason that the refusal gives, seen without any packing."""
    model = get_peft_model(exact("llama").float(), config_of("Lily", **ATTENTION))
    shake(model)
    rows = torch.randint(3, 24, (3, 7), generator=torch.Generator().manual_seed(0))
    together = model(input_ids=rows).logits
    alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
    assert (together - alone).abs().max() > 1e-2


def test_variants_of_lora_that_nobody_has_compared_are_refused():
    model = wrapped(exact(), LoraConfig(task_type="CAUSAL_LM", r=4, **ATTENTION))
    model.peft_config["default"].velora_config = object()
    assert check_support(model).reasons == (
        "adapter 'default' has a `velora_config`, which no test has compared with single rows",
    )


def test_a_second_adapter_that_is_not_active_is_looked_at_too():
    model = wrapped(exact("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, **ATTENTION))
    model.add_adapter("asked", LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5], **ATTENTION))
    assert "adapter 'asked' is an aLoRA" in check_support(nn.Sequential(model)).reasons[0]


def test_dropout_that_only_the_adapter_knows_is_noted():
    model = wrapped(exact("llama"), config_of("LoHa", module_dropout=0.25, **ATTENTION))
    (note,) = check_support(model).notes
    assert note.startswith("dropout of 0.25 is active")
