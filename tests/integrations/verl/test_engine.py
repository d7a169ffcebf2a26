"""What the engine keeps, restores and tells beside the numbers of an update (those are in test_equality.py)."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp  # first, as in a run: it registers our engine
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig

from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine
from prefix_grouper_plugins.integrations.verl.micro_batch import mend_positions
from prefix_grouper_plugins.modeling.self_check.schedule import Schedule
from prefix_grouper_plugins.sharing import SharingGate
from tests.integrations.verl.cases import Case, make_batch, make_rows
from tests.integrations.verl.test_equality import assert_equal


@pytest.mark.slow
def test_what_log_prob_passes_shared_is_logged_with_the_next_update(results):
    """verl drops their metrics. Micro-batches of one row reuse prompts there, too."""
    (result,) = results([Case(dynamic=False, micro_batch_size=4, log_prob_rows=1)], 1)
    assert_equal(Case(), result)
    assert result["metrics"]["prefix_grouper/token_ratio"] < 0.5
    assert "prefix_grouper/old_log_prob_token_ratio" not in result["metrics"], "there was none before the first update"
    assert result["later_metrics"]["prefix_grouper/token_ratio"] < 0.5
    assert result["later_metrics"]["prefix_grouper/old_log_prob_token_ratio"] < 0.5
    assert result["later_metrics"]["prefix_grouper/old_log_prob_rows_per_group"] == 4


def bare_engine(**attributes) -> PrefixGrouperEngine:
    engine = object.__new__(PrefixGrouperEngine)
    vars(engine).update(attributes)
    return engine


def test_a_verification_that_stops_leaves_the_engine_as_it_was():
    cleared = []
    engine = bare_engine(
        sharing="a meter", gate=SharingGate(), _verify_when=Schedule("first"), module=torch.nn.Linear(1, 1)
    )

    def run_out_of_memory(data, loss_function, forward_only):
        assert engine.gate.reason is not None, "the ordinary half comes first"
        raise torch.OutOfMemoryError

    engine._run = run_out_of_memory
    engine.optimizer_zero_grad = lambda: cleared.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        engine._verify(None, None)
    assert engine.gate.reason is None, "or every later update would take the ordinary path"
    assert engine.sharing == "a meter"
    assert cleared and engine._verify_when.is_on


def test_a_pass_is_the_references_without_the_adapter_or_in_an_engine_of_its_own(monkeypatch):
    module = torch.nn.Module()
    module.disable_adapter = lambda: torch.no_grad()
    engine = bare_engine(engine_config=SimpleNamespace(forward_only=False), _without_adapter=False, module=module)
    assert engine._pass_of(forward_only=False) == "update"
    assert engine._pass_of(forward_only=True) == "old_log_prob"
    with engine.disable_adapter():
        assert engine._pass_of(forward_only=True) == "ref_log_prob"
    assert engine._pass_of(forward_only=True) == "old_log_prob"
    engine.engine_config.forward_only = True
    assert engine._pass_of(forward_only=True) == "ref_log_prob"


def test_losses_that_choose_their_code_by_the_strategy_find_that_of_the_sharding():
    """Top-k distillation knows fsdp and fsdp2, and stops at any other name."""
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=4)
    object.__setattr__(config, "strategy", "prefix_grouper")
    engine = bare_engine(engine_config=SimpleNamespace(strategy="fsdp2"))
    engine._name_sharding(partial(distillation_ppo_loss, config=config, distillation_config=None))
    assert config.strategy == "fsdp2"


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_with_positions_of_images_can_be_selected_one_by_one(rows):
    """verl 0.9.1 stops at a single row, and at rows of equal length: the wrong axis is ragged."""
    case = Case(model="qwen3_vl", images="even")
    given = make_rows(case)[:rows]
    data = make_batch(case, given, rows)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        tu.index_select_tensor_dict(data, [0])
    mend_positions(data)
    for i, row in enumerate(given):
        assert torch.equal(tu.index_select_tensor_dict(data, [i])["position_ids"].values(), row["positions"])


@pytest.mark.slow
def test_one_row_with_an_image_trains(results):
    case = Case(model="qwen3_vl", images="one", rows_per_group=1, groups=1, dynamic=False, micro_batch_size=1)
    (result,) = results([case], 1)
    assert_equal(case, result)


def test_the_planning_hook_is_gone_after_a_failure():
    stock = fsdp.prepare_micro_batches
    planning = bare_engine()._planning(None, forward_only=False)
    planning.__enter__()
    assert fsdp.prepare_micro_batches is not stock
    planning.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert fsdp.prepare_micro_batches is stock
