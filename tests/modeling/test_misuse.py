"""Packed calls that a model would read otherwise than their layout says are errors, whoever makes them."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import PrefixLayout, disable_prefix_grouper, enable_prefix_grouper, prefix_grouped_logps
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES
from tests import tiny
from tests.modeling import families

ROWS = tiny.rows({6: [3, 1, 4], 2: [2]})
LAYOUT = PrefixLayout.from_groups([6, 2], [[3, 1, 4], [2]])
INPUTS = packed_inputs(LAYOUT, LAYOUT.pack(ROWS))


def build(model_type):
    return families.build(model_type).float()


# Attention of the interface, hybrids, attention of its own.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "stablelm", "lfm2", "minimax", "falcon", "bloom", "mpt"]
)
@pytest.mark.parametrize("once", [False, True])
def test_a_model_that_is_not_enabled_does_not_read_the_packed_row_as_one_text(model_type, once):
    model = build(model_type)
    if once:
        disable_prefix_grouper(enable_prefix_grouper(model, self_check=False))
    with pytest.raises((RuntimeError, ValueError)):
        model(**INPUTS)


# Those that read neither mask nor positions would take the packed row for one text and say nothing.
RECURRENT = ["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "falcon_h1"]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_a_recurrent_model_that_is_not_enabled_is_an_error_that_names_the_remedy(model_type, once):
    model = build(model_type)
    if once:
        disable_prefix_grouper(enable_prefix_grouper(model, self_check=False))
    for part in (model, model.base_model):
        with pytest.raises(ValueError, match=r"call enable_prefix_grouper\(model\) first"):
            part(**INPUTS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES & set(CONFIG_MAPPING)))
def test_no_verified_type_reads_a_packed_row_as_one_text(model_type):
    with pytest.raises((RuntimeError, ValueError)):
        build(model_type)(**INPUTS)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba2", "lfm2"])
def test_the_decoder_of_an_enabled_model_takes_packed_rows_by_itself(model_type):
    model = enable_prefix_grouper(build(model_type), self_check=False)
    model.base_model(**INPUTS)


@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_another_attention_implementation_after_enabling_is_named(model_type):
    model = enable_prefix_grouper(build(model_type), self_check=False)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attention implementation has become 'eager'.*call enable_prefix_grouper"):
        model(**INPUTS)
    enable_prefix_grouper(model, self_check=False)
    model(**INPUTS)


@pytest.mark.parametrize("model_type", ["llama", "falcon", "lfm2"])
def test_a_packed_call_without_positions_is_refused(model_type):
    model = enable_prefix_grouper(build(model_type), self_check=False)
    for inputs in (INPUTS | {"position_ids": None}, {k: v for k, v in INPUTS.items() if k != "position_ids"}):
        with pytest.raises(ValueError, match="a packed call has no `position_ids`"):
            model(**inputs)


def test_labels_that_the_model_would_shift_are_refused_and_shifted_ones_are_not():
    model = enable_prefix_grouper(build("llama"), self_check=False)
    labels = LAYOUT.labels(ROWS)[None]
    with pytest.raises(ValueError, match="would shift `labels` along the packed row"):
        model(**INPUTS, labels=labels)
    output = model(**INPUTS, labels=labels, shift_labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0], labels[0])
    torch.testing.assert_close(output.loss, expected)


def test_ordinary_calls_are_checked_for_nothing():
    model = build("llama")
    ids = ROWS[0][None]
    before = model(input_ids=ids, labels=ids).loss
    assert torch.equal(enable_prefix_grouper(model, self_check=False)(input_ids=ids, labels=ids).loss, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "lfm2"])
def test_disabling_in_front_of_a_checkpointed_backward_is_an_error(model_type, reentrant):
    model = enable_prefix_grouper(build(model_type), self_check=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model.train()(**INPUTS).logits.sum()
    disable_prefix_grouper(model)
    with pytest.raises(RuntimeError, match=r"was disabled between a packed forward and its backward"):
        loss.backward()
    model(input_ids=ROWS[0][None], use_cache=False).logits.sum().backward()  # ordinary ones go on
    enable_prefix_grouper(model, self_check=False)
    model(**INPUTS).logits.sum().backward()


@pytest.mark.parametrize("model_type", ["llama", "lfm2", "qwen3_next"])
def test_a_model_from_the_config_of_an_enabled_one_is_not_enabled(model_type):
    """Its attention has the names, its mixers are as they were, and nobody has checked it."""
    model = enable_prefix_grouper(build(model_type), self_check=False)
    other = type(model)(model.config)
    assert is_enabled(model) and not is_enabled(other)
    ids, mask = ROWS[0][None], torch.ones_like(ROWS[0][None])
    with pytest.raises(ValueError, match="call enable_prefix_grouper"):
        prefix_grouped_logps(other, ids[:, :6], mask[:, :6], ids[:, 6:], mask[:, 6:])
    with pytest.raises(ValueError, match="call enable_prefix_grouper"):
        other(**INPUTS)


@pytest.mark.parametrize("model_type", ["bloom", "lfm2", "mamba2"])
def test_a_layout_that_was_used_for_inference_serves_training(model_type):
    model = enable_prefix_grouper(build(model_type), self_check=False)
    layout = PrefixLayout.from_groups([6, 2], [[3, 1, 4], [2]])
    inputs = packed_inputs(layout, layout.pack(ROWS))
    with torch.inference_mode():
        before = model(**inputs).logits
    logits = model(**inputs).logits
    assert torch.equal(logits, before)
    logits.sum().backward()
