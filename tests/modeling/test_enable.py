"""Enable, disable and enable again: what a model is afterwards, also as a copy, saved, or under LoRA."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from prefix_grouper_plugins import disable_prefix_grouper, enable_prefix_grouper
from prefix_grouper_plugins.modeling import attention as interface
from prefix_grouper_plugins.modeling import is_enabled, without_prefix_grouper
from tests import tiny
from tests.modeling.comparing import LAYOUT, ROWS, assert_packed_equals_single_rows, exact, lora, packed, single_rows


def test_enable_is_idempotent_and_disable_restores_what_was_there():
    for own in ("sdpa", "eager"):
        model = tiny.model(attn_implementation=own)
        assert not is_enabled(model)
        for _ in range(2):
            assert enable_prefix_grouper(model) is model
            assert model.config._attn_implementation == f"prefix_grouper:auto:{own}"
            assert is_enabled(model)
        for _ in range(2):
            assert disable_prefix_grouper(model) is model
            assert model.config._attn_implementation == own
            assert not is_enabled(model)


def test_the_backend_of_the_last_enable_is_the_one_that_runs(monkeypatch):
    used = []
    own = interface.shared_prefix_attention
    monkeypatch.setattr(
        interface, "shared_prefix_attention", lambda *a, **k: (used.append(k["backend"]), own(*a, **k))[1]
    )
    model = exact()
    results = {}
    for backend in ("auto", "dense", "blockwise", "merged_lse"):
        enable_prefix_grouper(model, backend=backend)
        used.clear()
        results[backend] = packed(model)
        assert used == [backend] * model.config.num_hidden_layers
        torch.testing.assert_close(results[backend], results["auto"], rtol=1e-11, atol=1e-11)


def test_an_unknown_backend_is_refused_before_training():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"backend='flash' is unknown: choose one of auto, .*blockwise"):
        enable_prefix_grouper(model, backend="flash")
    assert not is_enabled(model)


def test_an_unknown_backend_in_the_environment_is_refused_before_training(monkeypatch):
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "flash")
    model = tiny.model()
    with pytest.raises(ValueError, match=r"PREFIX_GROUPER_BACKEND='flash' is unknown"):
        enable_prefix_grouper(model)
    assert not is_enabled(model)


def test_without_prefix_grouper_shows_the_own_names_and_brings_ours_back():
    model = enable_prefix_grouper(tiny.model("gemma2", attn_implementation="eager"), backend="blockwise")
    with without_prefix_grouper(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "prefix_grouper:blockwise:eager"
    with pytest.raises(KeyError), without_prefix_grouper(model):
        raise KeyError
    assert model.config._attn_implementation == "prefix_grouper:blockwise:eager"
    with without_prefix_grouper(disable_prefix_grouper(model)):
        pass
    assert model.config._attn_implementation == "eager"


def test_a_copy_of_an_enabled_model_takes_packed_rows():
    model = enable_prefix_grouper(exact())
    twin = copy.deepcopy(model)
    disable_prefix_grouper(model)
    assert is_enabled(twin) and not is_enabled(model)
    assert_packed_equals_single_rows(twin)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_a_saved_config_does_not_carry_our_name_and_reloads(tmp_path, model_type):
    model = tiny.model(model_type)
    if model_type == "gemma2" and model.config._attn_implementation == "sdpa":
        pytest.skip(f"transformers {transformers.__version__} loads Gemma 2 with sdpa, which ignores its softcap")
    enable_prefix_grouper(model)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "prefix_grouper" not in file.read_text(), file.name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == interface.base_implementation(model.config._attn_implementation)
    assert torch.equal(again(input_ids=ROWS[0][None]).logits, model(input_ids=ROWS[0][None]).logits)


@pytest.mark.parametrize("first", ["wrap", "enable"])
def test_lora_models_take_packed_rows_whichever_comes_first(first):
    if first == "wrap":
        model = enable_prefix_grouper(lora(exact()))
    else:
        model = lora(enable_prefix_grouper(exact()))
        assert is_enabled(model)
    assert_packed_equals_single_rows(model)
    assert is_enabled(disable_prefix_grouper(model)) is False


def test_the_reference_of_a_lora_model_is_its_base_with_the_adapter_off():
    base = exact()
    expected = [row.detach() for row in single_rows(base)]
    model = enable_prefix_grouper(lora(base))
    with torch.no_grad(), model.disable_adapter():
        reference = LAYOUT.unpack(packed(model))
    for row, wanted in zip(reference, expected, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert (packed(model) - LAYOUT.pack([torch.cat([r, r[-1:]]) for r in reference])).abs().max() > 1e-3
