"""The attention function of enabled models: ordinary calls do not notice it, packed calls that would go wrong are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, DynamicCache
from transformers.integrations import flash_attention
from transformers.masking_utils import AttentionMaskInterface

from prefix_grouper_plugins import PrefixLayout, UnsupportedModelError, enable_prefix_grouper
from prefix_grouper_plugins.modeling import attention as interface
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs
from tests import tiny
from tests.modeling import families
from tests.modeling.comparing import IDS, LAYOUT, ROWS, exact, gradients, loss, packed, single_rows

# Ordinary attention of several kinds: sdpa, eager with sinks, eager with softcap, learned positions.
ORDINARY = ["qwen3", "gpt_oss", "gemma2", "gpt2"]


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


def test_flash_attention_is_asked_for_by_its_own_name(monkeypatch):
    """transformers loads the kernel that a layer's config names; a name of ours would be looked for on the hub."""
    asked = []

    def forward(query, key, value, mask, *, attn_implementation, query_length, is_causal, **_: Any):
        asked.append((attn_implementation, is_causal))
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", forward)
    model = tiny.model()
    expected = model(ROWS[0][None]).logits
    model.config._attn_implementation = "flash_attention_2"
    before, after = before_and_after_enable(model, lambda m: m(ROWS[0][None]).logits)
    assert set(asked) == {("flash_attention_2", True)}, "by the self-check, too"
    assert_bit_identical(before, after)
    torch.testing.assert_close(after, expected)
    asked.clear()
    packed(model)
    assert not asked, "packed forwards run the core"


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
def test_packed_rows_do_what_sdpa_does_with_softcap_and_sinks(model_type):
    """It ignores sinks, and a softcap in older releases; newer ones refuse that."""
    model = tiny.model(model_type)
    if model_type == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped matrix product of torch 2.8 does not run on a CPU
    model.config._attn_implementation = "sdpa"
    try:
        expected = [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]
    except ValueError:
        model = enable_prefix_grouper(tiny.model(model_type))
        model.config._attn_implementation = interface.register("sdpa", "auto")
        with pytest.raises(UnsupportedModelError, match=r"has changed since it was checked.*: sdpa refuses a softcap"):
            packed(model)
        return
    enable_prefix_grouper(model)
    for got, wanted in zip(LAYOUT.unpack(packed(model)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_attention_weights_and_noncausal_layers_are_refused():
    model = enable_prefix_grouper(tiny.model())
    with pytest.raises(ValueError, match="attention weights are not available in a packed forward"):
        packed(model, output_attentions=True)
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="attention is not causal"):
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
