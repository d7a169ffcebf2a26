"""Enable and disable, what ordinary calls must not notice, how the layout travels, and packed calls that would go wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)
from transformers.masking_utils import AttentionMaskInterface

from prefix_grouper_plugins import (
    PrefixLayout,
    UnsupportedModelError,
    disable_prefix_grouper,
    enable_prefix_grouper,
)
from prefix_grouper_plugins.modeling import attention as interface
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs, row_positions, without_prefix_grouper
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, LAYOUT_TAG
from tests import tiny
from tests.modeling import families

ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)
IDS = LAYOUT.pack(ROWS)
# Ordinary attention of several kinds: sdpa, eager with sinks, eager with softcap, learned positions.
ORDINARY = ["qwen3", "gpt_oss", "gemma2", "gpt2"]


def exact(model_type: str = "qwen3", **changes: Any):
    """A float64 model whose norms compute in float64, so that only a different order of sums is left."""
    model = tiny.model(model_type, **changes).double()
    tiny.compute_norms_in_input_dtype(model)
    return model


def packed(model, **changes: Any):
    return model(**{**packed_inputs(LAYOUT, IDS), **changes}).logits[0]


def single_rows(model):
    return [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]


def loss(rows) -> torch.Tensor:
    return sum(x.log_softmax(-1).gather(-1, row[1:, None]).sum() for x, row in zip(rows, ROWS, strict=True))  # type: ignore[return-value]


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        error = float((got[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


def assert_packed_equals_single_rows(model, tolerance: float = 1e-10) -> None:
    """Logits and gradients; ``model`` is enabled."""
    expected, got = single_rows(model), LAYOUT.unpack(packed(model))
    for row, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(row, wanted, rtol=tolerance, atol=tolerance)
    assert_same_gradients(gradients(model, loss(got)), gradients(model, loss(expected)), tolerance)


# --- enable and disable ----------------------------------------------------------------------------------------------


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
    model = enable_prefix_grouper(tiny.model("gemma2"), backend="blockwise")
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
    model = enable_prefix_grouper(tiny.model(model_type))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "prefix_grouper" not in file.read_text(), file.name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == interface.base_implementation(model.config._attn_implementation)
    assert torch.equal(again(input_ids=ROWS[0][None]).logits, model(input_ids=ROWS[0][None]).logits)


# --- ordinary calls do not notice ------------------------------------------------------------------------------------


def left_padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_bit_identical(before: Any, after: Any) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def before_and_after_enable(model, call):
    before = call(model)
    enable_prefix_grouper(model)
    return before, call(model)


@pytest.mark.parametrize("model_type", ORDINARY)
def test_ordinary_training_is_bit_identical(model_type):
    def step(model):
        logits = model(**left_padded(ROWS)).logits
        return logits.detach(), gradients(model, logits.square().mean())

    assert_bit_identical(*before_and_after_enable(families.build(model_type).float().train(), step))


@pytest.mark.parametrize("model_type", ORDINARY)
def test_generation_is_bit_identical_also_for_left_padded_batches(model_type):
    def generate(model):
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        batches = [{"input_ids": ROWS[0][None]}, left_padded(ROWS)]
        results = [model.generate(**batch, eos_token_id=None, pad_token_id=0, **options) for batch in batches]
        return [(result.sequences, torch.stack(result.scores)) for result in results]

    assert_bit_identical(*before_and_after_enable(families.build(model_type).float(), generate))


def test_without_our_mask_function_left_padding_would_be_attended_to(monkeypatch):
    """The fault that the test above must be able to see."""
    model = tiny.model()
    before = model(**left_padded(ROWS)).logits
    name = enable_prefix_grouper(model).config._attn_implementation
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, name)
    assert (model(**left_padded(ROWS)).logits - before).abs().max() > 1e-2


def test_a_reward_model_is_bit_identical():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("qwen3", **tiny.SIZES, num_labels=1)
    ).eval()
    before, after = before_and_after_enable(model, lambda m: m(**left_padded(ROWS)).logits)
    assert is_enabled(model)
    assert_bit_identical(before, after)


# --- how the layout travels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "stablelm", "nemotron"])
def test_the_tag_on_the_mask_suffices_also_where_keywords_are_dropped(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    inputs = packed_inputs(LAYOUT, IDS)
    both = model(**inputs).logits
    inputs.pop(LAYOUT_KWARG)
    assert torch.equal(model(**inputs).logits, both)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_the_keyword_suffices_where_the_mask_is_copied_on_the_way(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    inputs = packed_inputs(LAYOUT, IDS)
    both = model(**inputs).logits
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    assert not hasattr(inputs["attention_mask"], LAYOUT_TAG)
    assert torch.equal(model(**inputs).logits, both)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["qwen3", "stablelm", "gemma2", "gpt_oss"])
def test_gradient_checkpointing_changes_no_gradient(model_type, reentrant):
    model = enable_prefix_grouper(families.build(model_type)).train()
    expected = gradients(model, loss(LAYOUT.unpack(packed(model))))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model, loss(LAYOUT.unpack(packed(model))))
    hook.remove()
    assert len(calls) == 2, "nothing was recomputed, so this test says nothing"
    assert_same_gradients(got, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "stablelm"])
def test_a_compiled_model_gives_the_same_logits_and_gradients(model_type):
    torch._dynamo.reset()
    model = enable_prefix_grouper(families.build(model_type))
    eager = packed(model)
    expected = gradients(model, loss(LAYOUT.unpack(eager)))
    compiled = packed(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(model, loss(LAYOUT.unpack(compiled))), expected, 1e-12)
    # The second layout of another shape must not run with what was compiled for the first.
    rows = tiny.rows({5: [2, 3], 8: [1, 4, 4]}, seed=1)
    layout = PrefixLayout.from_rows(rows)
    inputs = packed_inputs(layout, layout.pack(rows))
    again = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(again, model(**inputs).logits, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


# --- adapters --------------------------------------------------------------------------------------------------------


def lora(model, **changes: Any):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", r=4, **changes)
    wrapped = get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.3)
    return wrapped.double().eval()


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


def test_positions_count_from_behind_the_padding_token_as_roberta_does_it():
    rows = [torch.tensor(row) for row in ([5, 0, 6, 7], [5, 0, 6, 8, 0, 9], [4, 4])]  # 0 is its padding token
    layout = PrefixLayout.from_rows(rows)
    model = families.build("roberta")
    seen = []
    embedding = model.roberta.embeddings.position_embeddings
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row in rows:
        model(input_ids=row[None])
    positions = row_positions(model, layout, layout.pack(rows))
    for got, own in zip(layout.unpack(positions), seen, strict=True):
        assert got.tolist() == own[:-1].tolist()
    assert torch.equal(row_positions(families.build("bert"), layout, layout.pack(rows)), layout.position_ids)


# --- a packed call that would go wrong -------------------------------------------------------------------------------


def test_rows_from_which_doge_would_choose_keys_are_an_error():
    model = enable_prefix_grouper(families.build("doge"), self_check=False)
    for layer in model.model.layers:
        layer.self_attn.keep_window_size = 5
    rows = tiny.rows({3: [2, 6]})
    layout = PrefixLayout.from_rows(rows)
    with pytest.raises(ValueError, match="a row of 8 tokens is longer than keep_window_size=5"):
        model(**packed_inputs(layout, layout.pack(rows)))


def test_a_packed_row_of_another_length_names_both_lengths():
    model = enable_prefix_grouper(tiny.model())
    longer = {"input_ids": torch.cat([IDS, IDS[:3]])[None], "position_ids": torch.arange(len(IDS) + 3)[None]}
    with pytest.raises(ValueError, match=rf"row\(s\) of {len(IDS) + 3} tokens with a layout of {len(IDS)} tokens"):
        packed(model, **longer)
    two = {"input_ids": IDS.repeat(2, 1), "position_ids": LAYOUT.position_ids.repeat(2, 1)}
    with pytest.raises(ValueError, match=r"queries for 2 row\(s\)"):
        packed(model, **two)
    with pytest.raises(ValueError, match=rf"input_ids has shape \({len(IDS) + 3},\), the layout needs \({len(IDS)},\)"):
        packed_inputs(LAYOUT, longer["input_ids"][0])
    with pytest.raises(ValueError, match=r"position_ids has shape \(2,\)"):
        packed_inputs(LAYOUT, IDS, torch.arange(2))


def test_a_packed_call_on_top_of_a_cache_is_refused():
    model = enable_prefix_grouper(tiny.model())
    cache = DynamicCache()
    model(input_ids=ROWS[0][None, :5], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=rf"query \({len(IDS)}, .*key \({len(IDS) + 5}, "):
        packed(model, past_key_values=cache, use_cache=True)


def test_dropout_that_is_switched_on_later_is_refused_in_training_and_harmless_otherwise():
    model = enable_prefix_grouper(tiny.model())
    before = packed(model)
    model.model.layers[1].self_attn.attention_dropout = 0.25
    assert torch.equal(packed(model), before)
    with pytest.raises(UnsupportedModelError, match=r"Qwen3Attention applies attention dropout \(0.25\)"):
        packed(model.train())


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_a_base_that_is_switched_to_sdpa_later_is_refused(model_type):
    model = enable_prefix_grouper(tiny.model(model_type))
    model.config._attn_implementation = interface.register("sdpa", "auto")
    with pytest.raises(UnsupportedModelError, match="which transformers' sdpa ignores"):
        packed(model)


def test_attention_weights_and_noncausal_layers_are_refused():
    model = enable_prefix_grouper(tiny.model())
    with pytest.raises(ValueError, match="attention weights are not available in a packed forward"):
        packed(model, output_attentions=True)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="Qwen3Attention is not causal"):
        packed(model)


# --- faults that these tests must be able to see ---------------------------------------------------------------------


def plain_causal(query, key, value, layout, *, scale, **_: Any):
    """What a model does that ignores the layout: one long causal text."""
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "stablelm"])
def test_a_core_that_ignored_the_layout_would_be_seen(monkeypatch, model_type):
    model = enable_prefix_grouper(families.build(model_type))
    expected = [row.detach() for row in single_rows(model)]
    right = gradients(model, loss(LAYOUT.unpack(packed(model))))
    monkeypatch.setattr(interface, "shared_prefix_attention", plain_causal)
    logits = LAYOUT.unpack(packed(model))
    wrong = gradients(model, loss(logits))
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)  # nothing stands before the first row
    assert max((a - b).abs().max() for a, b in zip(logits[1:], expected[1:], strict=True)) > 1e-2
    assert max((wrong[n] - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-6) for n in right) > 1e-2


def test_positions_that_count_packed_tokens_would_be_seen():
    model = enable_prefix_grouper(exact())
    wrong = LAYOUT.unpack(packed(model, position_ids=torch.arange(len(IDS))[None]))
    assert max((a - b).abs().max() for a, b in zip(wrong, single_rows(model), strict=True)) > 1e-2


def test_one_leaking_response_token_would_be_seen(monkeypatch):
    """A single key that is visible one query too long changes the result by far more than the tolerances here."""
    model = enable_prefix_grouper(exact(), backend="dense")
    leaky = PrefixLayout.from_rows(ROWS)
    second = next(i for i, (_, _, parent, _) in enumerate(leaky.segments.tolist()) if parent >= 0)
    leaky.segments[second, 3] += 1
    right, wrong = packed(model), model(**packed_inputs(leaky, IDS)).logits[0]
    assert (right - wrong).abs().max() > 1e-4


def test_our_names_are_registered_with_both_interfaces():
    name = enable_prefix_grouper(tiny.model(), backend="blockwise").config._attn_implementation
    assert name in AttentionInterface() and name in AttentionMaskInterface()
