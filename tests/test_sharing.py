"""The gate: refused with all reasons, or left to the ordinary path; self-checked first; counted; said once."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch

from prefix_grouper_plugins import UnsupportedModelError, disable_prefix_grouper, enable_prefix_grouper, self_check
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs
from prefix_grouper_plugins.sharing import SharingGate, self_check_pending
from tests import tiny
from tests.processes import run_in_fork

ROWS = tiny.rows({6: [4, 3]})


def packed(model):
    from prefix_grouper_plugins import PrefixLayout

    layout = PrefixLayout.from_rows(ROWS)
    return model(**packed_inputs(layout, layout.pack(ROWS)))


def wrong_model():
    """Its packed rows have wrong positions, its single rows right ones."""
    model = tiny.model("llama")
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None])
    return model


def dropout_model():
    return tiny.model("llama", attention_dropout=0.1)


def test_all_reasons_stand_in_one_error_in_the_callers_words():
    gate = SharingGate(refusal=lambda reasons: f"no sharing: {reasons}. Set x=y")
    with pytest.raises(UnsupportedModelError, match=r"no sharing: z is set; attention dropout is 0\.1.* Set x=y$"):
        gate.enable([tiny.model(), dropout_model()], ["z is set"])


def test_under_fallback_every_model_is_left_as_it_was_and_the_reason_stays():
    models = [tiny.model(), dropout_model()]
    gate = SharingGate(on_unsupported="fallback")
    gate.enable(models)
    assert "attention dropout is 0.1" in gate.reason
    assert not any(is_enabled(model) or self_check_pending(model) for model in models)
    assert not gate.needs_self_check(models[0])


def test_settings_of_one_trainer_do_not_take_the_model_from_another():
    model, other = tiny.model("llama"), SharingGate(on_unsupported="fallback")
    gate = SharingGate()
    gate.enable([model])
    other.enable([model], ["a setting of its own"])
    assert other.reason == "a setting of its own" and gate.reason is None
    assert is_enabled(model)
    packed(model)


def test_a_model_that_fails_its_self_check_takes_the_others_with_it():
    models = [tiny.model("llama"), wrong_model()]
    gate = SharingGate(on_unsupported="fallback")
    gate.enable(models)
    assert gate.reason is None and all(map(gate.needs_self_check, models)) and all(map(is_enabled, models))
    gate.self_check(models[0])
    assert gate.reason is None and not gate.needs_self_check(models[0])
    gate.self_check(models[1])
    assert "are not its rows" in gate.reason
    assert not any(is_enabled(model) or self_check_pending(model) for model in models)


def test_without_the_self_check_nothing_waits_and_unknown_types_are_refused():
    class Own(type(tiny.model("llama"))):
        pass

    gate = SharingGate(self_check=False)
    gate.enable([model := tiny.model("llama")])
    assert is_enabled(model) and not gate.needs_self_check(model)
    with pytest.raises(UnsupportedModelError, match="Own is code from outside of transformers"):
        gate.enable([Own(model.config)])


def test_padding_on_the_left_is_a_reason_for_callers_whose_batches_are_padded_so():
    model = tiny.model("rwkv", attention_hidden_size=32)
    SharingGate().enable([model])
    with pytest.raises(UnsupportedModelError, match="padding on the left"):
        SharingGate().enable([model], left_padding=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_waits_can_be_copied_and_its_copy_waits_for_itself(copied):
    model = enable_prefix_grouper(tiny.model("llama"), self_check="later")
    other = copied(model)
    packed(other)
    assert self_check_pending(model) and not self_check_pending(other)
    packed(model)
    assert not self_check_pending(model)


@pytest.mark.parametrize("left_padding", [False, True])
def test_a_model_that_waits_can_be_checked_by_hand(left_padding):
    model = enable_prefix_grouper(tiny.model("llama"), self_check="later")
    assert self_check(model, left_padding=left_padding).passed
    packed(model)
    assert not self_check_pending(model)


def test_a_reason_of_another_process_refuses_the_model_here_too(monkeypatch):
    from dataclasses import replace

    from prefix_grouper_plugins import sharing

    monkeypatch.setattr(sharing, "on_all_ranks", lambda result, device: replace(result, reason="another process"))
    gate = SharingGate(on_unsupported="fallback")
    gate.enable([model := tiny.model("llama")])
    gate.self_check(model)
    assert "another process" in gate.reason and not is_enabled(model)


def leak(module, args, output):
    return output + 0.5 * output.roll(1, dims=-2)


def changed_model(gate):
    model = tiny.model("llama")
    gate.enable([model])
    gate.self_check(model)
    model.model.layers[1].mlp.register_forward_hook(leak)
    return model


@pytest.mark.parametrize("where", [{}, {"device": torch.device("cpu"), "alone": False}], ids=["alone", "on all ranks"])
def test_a_model_that_fails_after_a_change_is_left_to_the_ordinary_path_before_its_next_pass(where):
    gate = SharingGate(on_unsupported="fallback")
    model = changed_model(gate)
    gate.check_changes(model, **where)
    assert re.match("LlamaForCausalLM has changed since it was checked.* depends on tokens of other rows", gate.reason)
    assert not is_enabled(model)
    with pytest.raises(UnsupportedModelError, match=r"has changed since it was checked.* Set x=y"):
        (strict := SharingGate(refusal=lambda reasons: f"{reasons}. Set x=y")).check_changes(
            changed_model(strict), **where
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            disable_prefix_grouper,
            r"its attention implementation has become 'sdpa', by disable_prefix_grouper\(model\) or",
        ),
        (lambda model: model.set_attn_implementation("eager"), "its attention implementation has become 'eager'"),
    ],
    ids=["disabled", "another implementation"],
)
def test_a_model_that_takes_no_packed_rows_any_longer_goes_the_ordinary_path(change, reason):
    gate = SharingGate(on_unsupported="fallback")
    gate.enable([model := tiny.model("llama")])
    gate.self_check(model)
    gate.check_changes(model)
    assert gate.reason is None
    change(model)
    gate.check_changes(model)
    assert re.search(f"cannot be shared any longer: {reason}", gate.reason)


def test_a_change_that_another_process_finds_wrong_is_refused_here_too(monkeypatch):
    gate = SharingGate(on_unsupported="fallback")
    model = tiny.model("llama")
    gate.enable([model])
    gate.self_check(model)
    monkeypatch.setattr("prefix_grouper_plugins.sharing.on_any_rank", lambda here, device: True)
    gate.check_changes(model, torch.device("cpu"), alone=False)
    assert gate.reason.endswith("another process found a difference")


def test_a_change_that_does_no_harm_is_checked_once(monkeypatch):
    gate = SharingGate()
    gate.enable([model := tiny.model("llama")])
    gate.self_check(model)
    gate.check_changes(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    gate.check_changes(model)
    monkeypatch.setattr("prefix_grouper_plugins.sharing.self_check", None)
    gate.check_changes(model)
    packed(model)
    assert gate.reason is None


def test_a_warning_is_said_once_and_by_one_process(caplog):
    for is_main in (True, False):
        gate = SharingGate(is_main=is_main)
        for _ in range(2):
            gate.warn("rows are long")
    assert caplog.messages == ["prefix grouper: rows are long"]


def test_one_line_says_what_is_shared_how_layers_run_and_what_limits_it(caplog):
    gate = SharingGate()
    gate.enable([tiny.model("mistral", sliding_window=4)])
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        line = gate.announce("8 rows of a prompt in each micro-batch", ["dropout is on"])
    assert caplog.messages == [line]
    assert line == (
        "prefix grouper is on for MistralForCausalLM (3 layers: blockwise): 8 rows of a prompt in each micro-batch; "
        "limited: dropout is on"
    )


TERMINAL = """
import logging
{setup}
from prefix_grouper_plugins.sharing import SharingGate
gate = SharingGate()
gate.announce("one"); gate.announce("two"); gate.warn("three")
{after}
"""


@pytest.mark.parametrize(
    ("setup", "after", "shown"),
    [
        ("", "", ["one", "two", "three"]),
        ("logging.basicConfig(level=logging.INFO)", "", ["one", "two", "three"]),  # by the user's handler, once
        ("logging.basicConfig()", "", ["three"]),  # who sets up logging decides
        ("logging.getLogger('prefix_grouper_plugins').setLevel(logging.ERROR)", "", []),
        ("", "logging.basicConfig(); gate.announce('four')", ["one", "two", "three"]),
    ],
)
def test_the_line_reaches_the_terminal_once_unless_the_user_has_set_up_logging(tmp_path, setup, after, shown):
    code = TERMINAL.format(setup=setup, after=after)
    done = run_in_fork("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "prefix grouper" in line]
    assert [line.split()[-1].rstrip(":") for line in lines] == shown
