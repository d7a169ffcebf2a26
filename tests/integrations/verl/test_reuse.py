"""Parts of a group reuse its prompt only where that is exact, say so where not, and stop where a gradient is missing.

That numbers are verl's is in test_equality.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.utils import tensordict_utils as tu
from verl.workers.utils.losses import ppo_loss, sft_loss

import prefix_grouper_plugins.integrations.verl.engine as engine_module
from prefix_grouper_plugins.integrations.verl import PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.config import SETTINGS
from prefix_grouper_plugins.integrations.verl.micro_batch import why_positions_jump
from prefix_grouper_plugins.integrations.verl.planning import Plan
from prefix_grouper_plugins.integrations.verl.reuse import (
    PromptReuse,
    positions_differ,
    why_not_reuse,
    why_not_reuse_rows,
)
from prefix_grouper_plugins.modeling.rope import RowLimit
from prefix_grouper_plugins.sharing import SharingGate
from tests import tiny
from tests.integrations.verl.cases import Case, make_batch, make_rows
from tests.integrations.verl.test_engine import bare_engine


def engine_of(model=None, ulysses=False, offload=False):
    gate = SharingGate(self_check=False)
    gate.enable([model or tiny.model("qwen3")])
    config = SimpleNamespace(enable_activation_offload=offload)
    return SimpleNamespace(use_ulysses_sp=ulysses, model_config=config, gate=gate, module=gate.models[0])


def reentrant():
    model = tiny.model("qwen3")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


@pytest.mark.parametrize(
    ("engine", "loss", "reason"),
    [
        ({}, partial(ppo_loss, config=None), None),
        ({}, None, None),
        ({"ulysses": True}, None, "Ulysses cuts rows into pieces"),
        ({"offload": True}, None, "enable_activation_offload"),
        ({"model": reentrant()}, partial(ppo_loss, config=None), "set use_reentrant=False"),
        ({}, sft_loss, "sft_loss is not known to read log-probs of responses alone"),
    ],
)
def test_the_reason_why_prompts_are_not_reused_is_named(engine, loss, reason):
    found = why_not_reuse(engine_of(**engine), loss, gradients=True)
    assert found is None if reason is None else reason in found


def test_log_probs_do_not_mind_how_gradients_are_checkpointed():
    assert why_not_reuse(engine_of(reentrant()), None, gradients=False) is None


def test_classes_that_no_test_has_compared_do_not_reuse_prompts():
    engine = engine_of()
    engine.gate.reports = [SimpleNamespace(unverified=("no test has compared Odd",))]
    assert "no test has compared Odd" in why_not_reuse(engine, None, gradients=True)


def test_rows_that_number_their_tokens_in_another_way_do_not_reuse_prompts():
    rows = make_rows(Case())
    assert why_not_reuse_rows(make_batch(Case(), rows, len(rows))) is None
    rows[3]["positions"] = rows[3]["positions"] + 1
    assert "do not count from 0" in why_not_reuse_rows(make_batch(Case(), rows, len(rows)))


def test_rows_of_equal_prompts_that_number_their_tokens_differently_are_noticed_before_they_are_planned():
    """Else a micro-batch of many of them would take the ordinary path."""
    rows = make_rows(Case())
    assert not positions_differ(make_batch(Case(), rows, len(rows)))
    for row in rows:
        row["positions"] = row["positions"] + 1
    assert not positions_differ(make_batch(Case(), rows, len(rows)))
    rows[3]["positions"] = rows[3]["positions"] + 1
    assert positions_differ(make_batch(Case(), rows, len(rows)))


def test_a_call_that_returns_log_probs_of_prompts_does_not_reuse_them():
    engine = bare_engine(gate=engine_of().gate, use_ulysses_sp=False)
    rows = make_rows(Case())
    batch = make_batch(Case(), rows, len(rows))
    tu.assign_non_tensor(batch, return_model_output=True)
    assert engine._why_not_reuse(batch, None, True) == "return_model_output asks for log-probs of prompts"


@pytest.mark.parametrize("removes_padding", [True, False])
def test_rows_whose_positions_jump_are_several_texts_to_verl(removes_padding):
    rows = make_rows(Case())
    rows[1]["positions"] = rows[1]["positions"] + 5  # one text, which begins later
    batch = make_batch(Case(), rows, len(rows))
    tu.assign_non_tensor(batch, use_remove_padding=removes_padding)
    assert why_positions_jump(batch) is None
    rows[2]["positions"] = torch.cat([torch.arange(3), torch.arange(len(rows[2]["positions"]) - 3)])
    batch = make_batch(Case(), rows, len(rows))
    tu.assign_non_tensor(batch, use_remove_padding=removes_padding)
    assert (why_positions_jump(batch) is not None) is removes_padding
    engine = bare_engine(gate=engine_of().gate, use_ulysses_sp=False)
    engine._positions_jump = why_positions_jump(batch)
    assert engine._why_not_share(batch) == why_positions_jump(batch)


def test_rows_so_long_that_they_change_the_angles_of_others_take_verls_way():
    engine = bare_engine(gate=engine_of().gate, use_ulysses_sp=False)
    rows = make_rows(Case())
    batch = make_batch(Case(), rows, len(rows))
    longest = max(len(row["positions"]) for row in rows)
    for length, told in ((longest + 1, False), (longest, True)):
        engine.gate.anatomies[0].row_limits = [RowLimit(length, "longrope")]
        reason = engine._why_not_share(batch)
        assert (reason is not None and f"from {length} on rope_type 'longrope'" in reason) is told


def test_a_hook_that_gets_the_gradient_of_each_micro_batch_keeps_rows():
    engine = bare_engine(module=tiny.model("qwen3"), options=PrefixGrouperOptions())
    rows = make_rows(Case())
    batch = make_batch(Case(), rows, len(rows))
    tu.assign_non_tensor(batch, global_batch_size=len(rows))
    assert engine._why_rows_stay(sft_loss, batch) is None
    handle = engine.module.model.norm.weight.register_post_accumulate_grad_hook(lambda weight: None)
    assert engine._why_rows_stay(sft_loss, batch) == "a hook on model.norm.weight gets the gradient of each micro-batch"
    assert engine._why_rows_stay(None, batch) is None  # log-probs have no gradients
    handle.remove()
    assert engine._why_rows_stay(sft_loss, batch) is None


def test_rows_without_a_response_do_not_reuse_prompts():
    rows = make_rows(Case())
    for name in ("response", "mask", "old", "ref", "advantage"):
        rows[2][name] = rows[2][name][:0]
    rows[2]["positions"] = rows[2]["positions"][: len(rows[2]["prompt"])]
    assert why_not_reuse_rows(make_batch(Case(), rows, len(rows))) == "a row has an empty response"


def reuse_of(plan: Plan) -> PromptReuse:
    return PromptReuse(torch.nn.Module(), plan, None, syncs_always=False, settings=SETTINGS)


def test_an_update_that_leaves_a_prompt_open_stops(monkeypatch):
    engine = bare_engine()

    def loop(self, data, loss_function, forward_only):
        self._reuse = reuse_of(Plan([[0], [1]], [(0, 2)], [{1}, set()]))
        self._reuse._prompts.expect([0])
        self._reuse._prompts.keep(0, SimpleNamespace(is_closed=False))

    monkeypatch.setattr(fsdp.FSDPEngineWithLMHead, "forward_backward_batch", loop)
    with pytest.raises(RuntimeError, match=r"have not got their gradient.*prefix_grouper\.regroup=none"):
        engine._run(tu.get_tensordict({"ids": torch.zeros(2, 2)}), None, forward_only=False)
    assert engine._reuse is None


def test_a_micro_batch_that_cannot_be_shared_after_all_stops():
    with pytest.raises(RuntimeError, match=r"one of them cannot be shared: odd rows\. Set .*regroup=none"):
        reuse_of(Plan([[0], [1]], [(0, 2)], [{1}, set()])).refuse("odd rows")


def test_where_prompts_are_not_reused_the_log_says_why_once_for_each_pass(monkeypatch, caplog):
    plan = Plan([[0, 1], [2, 3]], [], [set(), set()])
    monkeypatch.setattr(engine_module, "plan_on_all_ranks", lambda *_, **__: plan)
    case = Case(dynamic=False, micro_batch_size=1, groups=1, prompt_tokens=40)
    attributes = {"_without_adapter": False, "ulysses_sequence_parallel_size": 1, "_placeholders": (), "_cut": set()}
    attributes |= {"options": PrefixGrouperOptions(), "use_ulysses_sp": False}
    engine = bare_engine(gate=SharingGate(), **attributes)
    for name in ("update", "update", "old_log_prob"):
        engine._pass = name
        assert engine._plan(make_batch(case, make_rows(case), 4), None, "Ulysses cuts rows into pieces") is plan
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "update: " in lines[0] and "old_log_prob: " in lines[1]
    for line in lines:
        assert "_per_gpu=1, up to " in line and "so it is cut and its prompt forwarded for each part" in line
        assert line.endswith("(its parts do not reuse one forward of it: Ulysses cuts rows into pieces)")
