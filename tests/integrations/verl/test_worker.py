"""Workers that run our engine: shuffles by group, answers to the driver, weights saved beside the model."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import torch
import verl.workers.engine_workers as workers
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.utils import tensordict_utils as tu

from prefix_grouper_plugins.integrations.verl.micro_batch import row_sizes
from prefix_grouper_plugins.integrations.verl.switch import ASK_WORKERS
from prefix_grouper_plugins.integrations.verl.worker import WholeGroups, _shuffle_whole_groups
from tests.integrations.verl.cases import Case, make_batch, make_rows


def test_a_shuffle_of_whole_groups_has_every_row_once_and_another_order_each_time():
    groups = [[0, 3], [1, 4, 6], [2], [5, 7]]
    sampler = WholeGroups(groups, torch.Generator().manual_seed(0))
    orders = [list(sampler) for _ in range(8)]
    assert all(sorted(order) == list(range(8)) for order in orders) and len(sampler) == 8
    assert len({tuple(order) for order in orders}) > 4
    for order in orders:
        assert [order[order.index(group[0]) :][: len(group)] for group in groups] == groups


def steps_of(shuffle: bool, moves: bool) -> list[list[Hashable]]:
    """Groups of the rows of each optimizer step, as verl's own iterator cuts them."""
    case = Case(groups=6)
    rows = make_rows(case)
    data = make_batch(case, rows, len(rows))
    tu.assign_non_tensor(data, dataloader_kwargs={"shuffle": shuffle}, seed=3)
    steps: list[list[Hashable]] = []

    class Worker:
        loss_fn = None
        engine = SimpleNamespace(may_change_steps=lambda loss: moves, get_data_parallel_rank=lambda: 0)

        def train_mini_batch(self, data):
            loading = tu.pop(data, key="dataloader_kwargs")
            for step in tu.make_iterator(data, mini_batch_size=8, epochs=2, seed=3, dataloader_kwargs=loading):
                steps.append([size.group for size in row_sizes(step)])

    _shuffle_whole_groups(Worker)
    Worker().train_mini_batch(data=data)
    return steps


def test_a_step_of_a_shuffled_batch_has_whole_groups_and_as_many_rows_as_verls():
    steps = steps_of(shuffle=True, moves=True)
    assert [len(step) for step in steps] == [8] * 6
    assert all(sorted(map(step.count, set(step))) == [4, 4] for step in steps)
    assert [set(step) for step in steps[:3]] != [set(step) for step in steps[3:]], "another order in the second epoch"


def test_rows_are_shuffled_as_verl_does_where_they_keep_their_steps():
    assert any(max(map(step.count, set(step))) < 4 for step in steps_of(shuffle=True, moves=False))
    assert steps_of(shuffle=False, moves=True) == steps_of(shuffle=False, moves=False)


@pytest.mark.parametrize("worker", [workers.TrainingWorker, workers.ActorRolloutRefWorker])
def test_the_driver_can_ask_the_workers_for_the_loss_that_they_run(worker):
    method = getattr(worker, ASK_WORKERS)
    assert getattr(method, MAGIC_ATTR)["dispatch_mode"] == Dispatch.ONE_TO_ALL
    trains = SimpleNamespace(loss_fn=partial(lambda config: None, config=None))
    itself = SimpleNamespace(actor=trains, loss_fn=trains.loss_fn)
    assert "is not a loss of verl's" in method(itself)
    trains.loss_fn = itself.loss_fn = None
    assert method(itself) is None


def test_a_worker_without_an_actor_has_nothing_against_moving_rows():
    assert getattr(workers.ActorRolloutRefWorker, ASK_WORKERS)(SimpleNamespace(actor=None)) is None


@pytest.mark.slow
def test_weights_that_a_separate_trainer_saves_come_back(results):
    (result,) = results([Case(saves_to_cpu=True)], 1)
    assert result["restored"] == [True, True]  # of verl's engine and of ours
