"""Token mixers on whole rows: rows and back, the layout's way to them, and faults that the family comparison must notice."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefix_grouper_plugins import (
    PrefixLayout,
    UnsupportedModelError,
    check_support,
    disable_prefix_grouper,
    enable_prefix_grouper,
)
from prefix_grouper_plugins.modeling import ShardedLayout, carrier, is_enabled, layout_inputs, packed_inputs
from prefix_grouper_plugins.modeling.mixers import on_rows as mixers
from tests import tiny
from tests.modeling import families, test_families
from tests.modeling.test_families import ROWS, gradients, packed, single_rows

small_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8).filter(
    lambda rows: max(map(len, rows)) > 1
)


@pytest.fixture
def recurrent():
    return enable_prefix_grouper(families.build("qwen3_next"))


def assert_packed_is_exact(model):
    for got, wanted in zip(packed(model), single_rows(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ rows and packed


@given(small_rows, st.integers(0, 3))
@settings(deadline=None)
def test_collapse_undoes_expand(rows, padding):
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in rows])
    layout = layout.pad_to(layout.num_tokens + padding)
    batch = mixers.Rows(layout)
    x = torch.randn(1, layout.num_tokens, 2)
    assert torch.equal(batch.collapse(batch.expand(x)), x)


@given(small_rows)
@settings(deadline=None)
def test_expanded_rows_are_the_rows_padded_on_the_right(rows):
    tensors = [torch.tensor(row) for row in rows]
    layout = PrefixLayout.from_rows(tensors)
    expanded = mixers.Rows(layout).expand(layout.pack(tensors)[None])
    for row, place in zip([t for t in tensors if len(t) > 1], expanded, strict=True):
        assert torch.equal(place[: len(row) - 1], row[:-1])


@given(small_rows)
@settings(deadline=None)
def test_the_gradient_of_a_shared_position_is_the_sum_over_its_rows(rows):
    """Through a causal mixer, with gradients arriving at each row's own copy of what comes out."""
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in rows])
    batch = mixers.Rows(layout)
    x = torch.randn(1, layout.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(len(row) - 1, 2, dtype=torch.float64) for row in rows]

    out = batch.collapse(batch.expand(x).cumsum(1).sin())
    loss = sum((y * w).sum() for y, w in zip(layout.unpack(out[0]), weights, strict=True))
    (got,) = torch.autograd.grad(loss, x)

    alone = sum((y.cumsum(0).sin() * w).sum() for y, w in zip(layout.unpack(x[0]), weights, strict=True))
    (expected,) = torch.autograd.grad(alone, x)
    torch.testing.assert_close(got, expected)


def test_a_position_takes_its_value_from_the_first_row_that_holds_it():
    layout = PrefixLayout.from_rows(ROWS)
    batch = mixers.Rows(layout)
    which_row = torch.arange(len(ROWS))[:, None, None].expand(*batch.index.shape, 1)
    assert batch.collapse(which_row)[0, 0, 0] == 0


# -------------------------------------------------------------------------------------------------- on, off, and copies


def test_disabling_restores_classes_and_forwards(recurrent):
    before = families.build("qwen3_next")
    assert is_enabled(recurrent)
    enable_prefix_grouper(recurrent)  # once more
    disable_prefix_grouper(recurrent)
    disable_prefix_grouper(recurrent)
    assert not is_enabled(recurrent)
    for restored, original in zip(recurrent.modules(), before.modules(), strict=True):
        assert type(restored) is type(original)
        assert restored.__dict__.keys() == original.__dict__.keys()


def test_a_forward_that_somebody_has_put_in_is_kept():
    model = families.build("qwen3_next")
    own = model.forward
    model.forward = patched = lambda *args, **kwargs: (own(*args, **kwargs), "patched")  # as TRL's fused head does
    enable_prefix_grouper(model)
    layout = PrefixLayout.from_rows(ROWS)
    output, mark = model(**packed_inputs(layout, layout.pack(ROWS)))
    assert mark == "patched"
    for got, row in zip(layout.unpack(output.logits[0]), ROWS, strict=True):
        torch.testing.assert_close(got, own(input_ids=row[None]).logits[0, :-1], rtol=1e-4, atol=1e-4)
    disable_prefix_grouper(model)
    assert model.forward is patched


def test_a_copy_runs_by_itself(recurrent):
    copied = copy.deepcopy(recurrent)
    with torch.no_grad():
        for weight in recurrent.parameters():
            weight.zero_()
    assert copied.forward.model is copied
    assert_packed_is_exact(copied)


def test_the_report_says_how_mixers_run(recurrent):
    report = check_support(recurrent)
    assert report.supported
    assert {(layer.attention, layer.backend) for layer in report.layers} == {
        ("gated delta net", "state forking"),
        ("causal", "merged_lse"),
    }
    assert {layer.backend for layer in check_support(families.build("mamba")).layers} == {"expand, run, collapse"}


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2", "falcon"])
def test_padding_of_the_layout_changes_nothing(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    layout = PrefixLayout.from_rows(ROWS)
    padded = layout.pad_to(layout.num_tokens + 5)
    logits = model(**packed_inputs(padded, padded.pack(ROWS))).logits[0, : layout.num_tokens]
    for got, wanted in zip(layout.unpack(logits), single_rows(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_positions_that_are_given_reach_the_mixer():
    model = enable_prefix_grouper(families.build("gpt_neox_japanese"))
    layout = PrefixLayout.from_rows(ROWS)
    stretched = layout.position_ids * 3 + 2
    logits = layout.unpack(model(**packed_inputs(layout, layout.pack(ROWS), stretched)).logits[0])
    for got, row in zip(logits, ROWS, strict=True):
        positions = torch.arange(len(row)) * 3 + 2
        wanted = model(input_ids=row[None], position_ids=positions[None]).logits[0, :-1]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_belongs_to_the_loss_may_pass_by(recurrent):
    """TRL's fused head takes `shift_labels` as a keyword of the model, which qwen3_next hands to its layers too."""
    layout = PrefixLayout.from_rows(ROWS)
    inputs = packed_inputs(layout, layout.pack(ROWS))
    plain = recurrent(**inputs).logits
    assert torch.equal(recurrent(**inputs, shift_labels=layout.labels(ROWS)[None]).logits, plain)


# --------------------------------------------------------------------------------------------------- what must not pass


def test_a_layer_that_loses_the_layout_is_an_error(recurrent):
    layer = recurrent.model.layers[0]
    layer.__class__ = type(layer)._prefix_grouper_base
    with pytest.raises(RuntimeError, match="its layer lost the layout"):
        packed(recurrent)
    single_rows(recurrent)  # ordinary forwards go on


def test_recomputing_a_layer_without_its_keywords_is_an_error(recurrent):
    """As torch's CheckpointWrapper would, which stands outside of the layer."""
    packed(recurrent)
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        recurrent.model.layers[0](torch.zeros(1, 4, 32, dtype=torch.float64), position_embeddings=None)


def test_a_cache_is_an_error(recurrent):
    layout = PrefixLayout.from_rows(ROWS)
    with pytest.raises(ValueError, match="use_cache=False"):
        recurrent(**{**packed_inputs(layout, layout.pack(ROWS)), "use_cache": True})


def test_sequence_parallelism_is_refused():
    model = enable_prefix_grouper(families.build("mamba2"))
    sharded = object.__new__(ShardedLayout)
    with pytest.raises(UnsupportedModelError, match="needs whole rows"):
        model(input_ids=ROWS[0][None], use_cache=False, **layout_inputs(sharded, torch.device("cpu")))


def test_an_argument_that_nobody_has_looked_at_is_refused(monkeypatch):
    class Strange(nn.Module):
        def forward(self, hidden_states, surprise=None):
            return hidden_states

    layout = PrefixLayout.from_rows(ROWS)
    module, x = Strange(), torch.zeros(1, layout.num_tokens, 2)
    monkeypatch.setattr(mixers, "mixer_of", lambda module: mixers.Mixer("strange"))
    with pytest.raises(UnsupportedModelError, match="`surprise`"):
        mixers.expand_run_collapse(module, module.forward, layout, (x,), {"surprise": x})


# ------------------------------------------------------------------------------------------ planted faults are noticed


def test_a_state_that_leaks_into_the_next_completion_is_noticed(monkeypatch):
    def as_one_row(module, run, layout, args, kwargs):
        return run(*args, **{name: value for name, value in kwargs.items() if name not in mixers._MASKS})

    monkeypatch.setattr(mixers, "expand_run_collapse", as_one_row)
    with pytest.raises(AssertionError, match="not close"):
        test_families.test_packed_logits_and_gradients_equal_those_of_single_rows("mamba")


def test_a_value_taken_from_another_row_is_noticed(monkeypatch):
    monkeypatch.setattr(mixers.Rows, "expand", lambda self, x: x[0][self.index].roll(1, 0))
    with pytest.raises(AssertionError, match="not close"):
        test_families.test_packed_logits_and_gradients_equal_those_of_single_rows("minimax")


def test_lora_on_a_mixer_gets_the_gradients_of_single_rows():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["in_proj_qkvz", "out_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(families.build("qwen3_next"), config)
    expected = gradients(model, single_rows(model))
    enable_prefix_grouper(model)
    got = gradients(model, packed(model))
    assert got.keys() == expected.keys() and len(got)
    for name, wanted in expected.items():
        assert (got[name] - wanted).abs().max() <= 1e-3 * wanted.abs().max(), name


def test_ordinary_and_packed_forwards_may_alternate_under_checkpointing(recurrent):
    wanted = gradients(recurrent, single_rows(recurrent))
    recurrent.gradient_checkpointing_enable({"use_reentrant": False})
    recurrent.train()
    for run in (packed, single_rows, packed):
        got = gradients(recurrent, run(recurrent))
        for name, gradient in wanted.items():
            assert (got[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max().clamp(min=1e-6), name


def test_models_without_mixers_are_left_alone():
    model = tiny.model("llama")
    enable_prefix_grouper(model)
    assert "forward" not in model.__dict__ and type(model.model.layers[0]).__mro__[1] is not carrier.PackedLayer
