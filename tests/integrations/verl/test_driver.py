"""verl's trainers get whole groups on one rank, in one optimizer step where verl's own assignment protects nothing."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import numpy as np
import torch
from omegaconf import OmegaConf

from prefix_grouper_plugins.integrations.verl import driver
from prefix_grouper_plugins.integrations.verl.driver import new_order
from prefix_grouper_plugins.micro_batches import RowSize
from tests.test_step_order import homes, rows, step_of


def config(strategy: str = "prefix_grouper", regroup: str = "exact", mini: int = 4, shuffle: bool = False, **loss):
    actor = {
        "strategy": strategy,
        "ppo_mini_batch_size": mini,
        "shuffle": shuffle,
        "fsdp_config": {"prefix_grouper": {"regroup": regroup}},
        **loss,
    }
    critic = {"ppo_mini_batch_size": 2, "shuffle": False}
    return OmegaConf.create({"actor_rollout_ref": {"actor": actor, "rollout": {"n": 4}}, "critic": critic})


class Batch:
    """What a trainer's batch needs here: verl's KVBatchMeta (V1) and DataProto (V0) alike."""

    def __init__(self, sizes: list[RowSize]) -> None:
        self.keys = [f"uid-{size.group}_{i}_0" for i, size in enumerate(sizes)]
        self.tags = [{"prompt_len": s.prompt, "seq_len": s.prompt + s.response} for s in sizes]
        self.non_tensor_batch = {"uid": np.array([f"uid-{size.group}" for size in sizes], dtype=object)}
        width, length = max(s.prompt for s in sizes), max(s.response for s in sizes)
        mask = torch.zeros(len(sizes), width + length, dtype=torch.long)
        for row, size in zip(mask, sizes, strict=True):
            row[width - size.prompt : width + size.response] = 1
        # Tokens of which those of a group begin alike, and no others.
        tokens = torch.arange(len(sizes) * mask.shape[1]).view_as(mask)
        group = torch.tensor([[hash(size.group) % 10_000] for size in sizes])
        tokens[:, :width] = -1 - group * width - torch.arange(width)
        self.batch = {"prompts": mask[:, :width], "attention_mask": mask, "input_ids": tokens}

    def reorder(self, order) -> None:
        order = [int(i) for i in order]
        self.keys, self.tags = [self.keys[i] for i in order], [self.tags[i] for i in order]
        self.non_tensor_batch = {"uid": self.non_tensor_batch["uid"][order]}


def order_of(batch: Batch, sizes: list[RowSize]) -> list[RowSize]:
    """The rows as they lie in ``batch`` now."""
    return [sizes[int(key.split("_")[1])] for key in batch.keys]


class StockTrainer:
    """Balances like verl in that it leaves groups scattered."""

    actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})
    use_critic = False

    def __init__(self, given) -> None:
        self.config = given

    def _get_dp_size(self, group, role) -> int:
        return 2

    def _balance_batch(self, batch, metrics, logging_prefix="global_seqlen", keep_minibatch=False):
        assert not getattr(self, "use_prefix_grouper", False), "verl's own handling refuses uneven batches"
        metrics["global_seqlen/mean"] = 1.0
        return batch

    def _update_actor(self, batch, metrics=None):
        if metrics is not None:
            metrics.update({"actor/prefix_grouper/token_ratio": 0.3, "actor/pg_loss": 1.0})
        return SimpleNamespace(meta_info={"metrics": {"actor/prefix_grouper/token_ratio": 0.3, "actor/pg_loss": 1.0}})

    def _update_critic(self, batch, metrics=None):
        return batch


def trainer(install, given, **overridden):
    """verl's trainer with our hooks, or one that derives from it."""
    methods = {name: vars(StockTrainer)[name] for name in ("_balance_batch", "_update_actor", "_update_critic")}
    hooked = type("Trainer", (StockTrainer,), methods)
    install(SimpleNamespace(PPOTrainer=hooked, RayPPOTrainer=hooked))
    return type("Derived", (hooked,), overridden)(given)


@pytest.mark.parametrize("install", [driver.install_v1, driver.install_v0])
def test_the_trainers_bring_groups_together_after_balancing(install):
    sizes = rows(4, 4)
    batch, metrics = Batch(sizes), {}
    hooked = trainer(install, config())
    if install is driver.install_v0:
        hooked.use_prefix_grouper = True
    hooked._balance_batch(batch, metrics)
    uids = [key.split("_")[0] for key in batch.keys] if install is driver.install_v1 else batch.non_tensor_batch["uid"]
    assert Counter(uids[:8]).most_common()[-1][1] == 4, "two whole groups on the first rank"
    totals = [sum(tokens) for tokens in np.array([s.prompt + s.response for s in order_of(batch, sizes)]).reshape(2, 8)]
    assert metrics == {
        "global_seqlen/mean": 1.0,
        "global_seqlen/balanced_min": min(totals),
        "global_seqlen/balanced_max": max(totals),
    }
    assert getattr(hooked, "use_prefix_grouper", False) is (install is driver.install_v0)


@pytest.mark.parametrize("given", [config("fsdp2"), config(regroup="none"), config(mini=2, shuffle=True)])
def test_rows_stay_where_verl_put_them_when_sharing_is_off_or_could_change_a_step(given):
    sizes = rows(4, 4)
    batch = Batch(sizes)
    before = list(batch.keys)
    trainer(driver.install_v1, given)._balance_batch(batch, {})
    assert batch.keys == before


def test_groups_that_verl_scattered_over_steps_are_told_of_once_with_the_remedy(caplog):
    driver._warn_once.cache_clear()
    hooked = trainer(driver.install_v1, config(mini=2))
    with caplog.at_level(logging.WARNING, logger="prefix_grouper_plugins"):
        for _ in range(2):
            hooked._balance_batch(Batch(rows(4, 4)), {})
    assert len(caplog.records) == 1
    assert "2 optimizer steps" in caplog.text and "regroup=group" in caplog.text


def test_the_optimizer_steps_of_a_critic_keep_their_rows_too():
    sizes = rows(4, 4)
    batch = Batch(sizes)
    hooked = trainer(driver.install_v1, config(mini=4))  # the critic makes two steps of this batch, the actor one
    hooked.use_critic = True
    hooked._balance_batch(batch, {})
    for place, key in enumerate(batch.keys):
        assert step_of(place, 16, ranks=2, steps=2) == step_of(int(key.split("_")[1]), 16, ranks=2, steps=2)


def test_a_run_that_does_not_ask_is_not_looked_at():
    batch = Batch(rows(4, 4))
    batch.tags = [{"seq_len": 5}] * 16  # as another trainer may leave them
    trainer(driver.install_v1, config("fsdp2"))._balance_batch(batch, {})


def test_metrics_keep_their_names():
    metrics: dict = {}
    trainer(driver.install_v1, config())._update_actor(None, metrics)
    assert metrics == {"prefix_grouper/token_ratio": 0.3, "actor/pg_loss": 1.0}
    output = trainer(driver.install_v0, config())._update_actor(None)
    assert output.meta_info["metrics"] == {"prefix_grouper/token_ratio": 0.3, "actor/pg_loss": 1.0}


def update_in_two_steps(self, batch, metrics=None):
    """As trainers do that hand `num_mini_batch` to the workers in place of a size."""


@pytest.mark.parametrize("name", ["_update_actor", "_update_critic"])
def test_rows_keep_the_steps_of_a_trainer_that_makes_its_own(name, caplog):
    """24 rows that it updates in two steps of 12; by `ppo_mini_batch_size` they would be three of eight."""
    driver._warn_once.cache_clear()
    batch = Batch(rows(6, 4))
    before = list(batch.keys)
    trainer(driver.install_v1, config(mini=2), **{name: update_in_two_steps})._balance_batch(batch, {})
    assert batch.keys == before
    assert "this trainer makes optimizer steps in its own way" in caplog.text and "regroup=group" in caplog.text


def test_rows_that_verl_would_refuse_to_cut_stay():
    assert new_order(trainer(driver.install_v1, config(mini=4)), rows(5, 4), 2) is None  # 20 rows, steps of 16


def test_groups_of_a_trainer_that_makes_its_own_steps_lie_whole_on_each_rank_where_steps_may_change():
    sizes = rows(6, 4)
    batch = Batch(sizes)
    trainer(driver.install_v1, config(regroup="auto", mini=2), _update_actor=update_in_two_steps)._balance_batch(
        batch, {}
    )
    order = [int(key.split("_")[1]) for key in batch.keys]
    assert all(len(found) == 1 for found in homes(order, sizes, 2).values())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("install", [driver.install_v1, driver.install_v0])
def test_auto_brings_whole_groups_into_one_step_where_verls_steps_are_arbitrary(install, shuffle, caplog):
    caplog.set_level(logging.INFO, logger="prefix_grouper_plugins")
    sizes = rows(8, 4)
    batch = Batch(sizes)
    hooked = trainer(install, config(regroup="auto", mini=2, shuffle=shuffle))
    for _ in range(2):
        hooked._balance_batch(batch, {})
    if install is driver.install_v1:
        order = [int(key.split("_")[1]) for key in batch.keys]
        assert all(len(found) == 1 for found in homes(order, sizes, 2, steps=4).values())
    assert sum("4 optimizer steps" in record.message for record in caplog.records) == 1
    assert "gets whole groups" in caplog.text and "with regroup=exact" in caplog.text


def test_the_line_at_the_start_has_the_figures_of_both_ways(caplog):
    caplog.set_level(logging.INFO, logger="prefix_grouper_plugins")
    groups = [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 0, 1]  # on two ranks, so that each of four steps has all groups
    sizes = [RowSize(group, 81, 20) for group in groups]
    trainer(driver.install_v1, config(regroup="auto", mini=1))._balance_batch(Batch(sizes), {})
    # 404 tokens of four rows: 4 x 20 of responses, and 80 of a prompt for each rank of each group
    whole, scattered = (2 * 80 + 4 * 20) / 404, (4 * 80 + 4 * 20) / 404
    assert f"the update forwards {whole:.0%}, with regroup=exact {scattered:.0%}" in caplog.text


def test_auto_keeps_the_steps_that_a_caller_of_verl_asked_to_keep():
    sizes = rows(8, 4)
    batch = Batch(sizes)
    hooked = trainer(driver.install_v0, config(regroup="auto", mini=2))
    order = new_order(hooked, sizes, 2, steps_are_fixed=True)
    assert all(step_of(place, 32, 2, 4) == step_of(row, 32, 2, 4) for place, row in enumerate(order))
    kept = []
    batch.reorder = lambda order: kept.extend(order.tolist())
    hooked._balance_batch(batch, {}, keep_minibatch=True)
    assert kept == order


COUPLED = [
    ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "divides by the longest response"),
    ({"policy_loss": {"loss_mode": "kl_cov"}}, "the policy loss kl_cov may depend"),
    ({"policy_loss": {"loss_mode": "clip_cov"}}, "the policy loss clip_cov may depend"),
]


@pytest.mark.parametrize("regroup", ["auto", "exact"])
@pytest.mark.parametrize(("loss", "reason"), COUPLED)
def test_rows_stay_in_verls_order_under_losses_that_look_at_micro_batches(loss, reason, regroup, caplog):
    driver._warn_once.cache_clear()
    batch = Batch(rows(4, 4))
    before = list(batch.keys)
    trainer(driver.install_v1, config(regroup=regroup, **loss))._balance_batch(batch, {})
    assert batch.keys == before
    assert reason in caplog.text


def test_rows_stay_where_the_loss_of_the_critic_looks_at_micro_batches():
    given = config()
    given.critic.loss_agg_mode = "seq-mean-token-sum-norm"
    hooked = trainer(driver.install_v1, given)
    assert new_order(hooked, rows(4, 4), 2) is not None
    hooked.use_critic, hooked.critic_wg = True, SimpleNamespace()
    assert new_order(hooked, rows(4, 4), 2) is None


@pytest.mark.parametrize("worker", ["actor_rollout_wg", "critic_wg"])
def test_rows_stay_where_a_worker_runs_another_loss_than_the_config_says(worker):
    hooked = trainer(driver.install_v1, config())
    hooked.use_critic = True
    hooked.actor_rollout_wg = SimpleNamespace(prefix_grouper_why_rows_stay=lambda: [None, None])
    hooked.critic_wg = SimpleNamespace(prefix_grouper_why_rows_stay=lambda: [None, None])
    assert new_order(hooked, rows(4, 4), 2) is not None
    setattr(hooked, worker, SimpleNamespace(prefix_grouper_why_rows_stay=lambda: [None, "a loss of the user's"]))
    assert new_order(hooked, rows(4, 4), 2) is None
