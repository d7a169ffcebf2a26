"""The driver keeps groups on one rank, balances what is forwarded, and leaves every optimizer step its rows."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from prefix_grouper_plugins.integrations.verl import driver
from prefix_grouper_plugins.integrations.verl.driver import regrouped_order
from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens


def rows(groups: int, members: int, seed: int = 0) -> list[RowSize]:
    """Rows of equal groups, shuffled."""
    random = np.random.default_rng(seed)
    prompts = random.integers(5, 400, groups)
    sizes = [RowSize(g, int(prompts[g]), int(random.integers(1, 90))) for g in range(groups) for _ in range(members)]
    return [sizes[i] for i in random.permutation(len(sizes))]


def step_of(place: int, count: int, ranks: int, steps: int) -> int:
    """The optimizer step that sees the row at ``place``: verl deals consecutive shares to ranks, and cuts each."""
    share = count // (ranks * steps)
    return place // share % steps


def homes(order: list[int], sizes: list[RowSize], ranks: int, steps: int = 1) -> dict:
    """(rank, step) of each group's rows."""
    found: dict = {}
    for place, row in enumerate(order):
        home = (place // (len(order) // ranks), step_of(place, len(order), ranks, steps))
        found.setdefault(sizes[row].group, set()).add(home)
    return found


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    steps=st.sampled_from([1, 2, 3]),
    members=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10**6),
)
def test_every_optimizer_step_sees_the_same_rows_as_before(ranks, steps, members, seed):
    sizes = rows(12, members, seed)
    order = regrouped_order(sizes, ranks, steps)
    assert sorted(order) == list(range(len(sizes)))
    for place, row in enumerate(order):
        assert step_of(place, len(sizes), ranks, steps) == step_of(row, len(sizes), ranks, steps)


@settings(deadline=None, max_examples=60)
@given(ranks=st.sampled_from([1, 2, 4]), members=st.sampled_from([2, 4, 8]), seed=st.integers(0, 10**6))
def test_with_one_step_every_group_is_whole_on_one_rank(ranks, members, seed):
    sizes = rows(12, members, seed)
    assert all(len(found) == 1 for found in homes(regrouped_order(sizes, ranks, 1), sizes, ranks).values())


@settings(deadline=None, max_examples=60)
@given(steps=st.sampled_from([2, 3]), ranks=st.sampled_from([1, 2]), seed=st.integers(0, 10**6))
def test_across_steps_every_group_is_whole_in_one_step_and_on_one_rank(steps, ranks, seed):
    sizes = rows(12, 4, seed)
    order = regrouped_order(sizes, ranks, steps, across_steps=True)
    assert sorted(order) == list(range(len(sizes)))
    assert all(len(found) == 1 for found in homes(order, sizes, ranks, steps).values())


def test_rows_of_a_group_lie_side_by_side():
    sizes = rows(6, 4)
    order = [sizes[row].group for row in regrouped_order(sizes, 2, 1)]
    assert len([1 for a, b in pairwise(order) if a != b]) == 5


def test_what_is_forwarded_is_balanced_over_the_ranks():
    sizes = rows(64, 8, seed=3)
    order = regrouped_order(sizes, 4, 1)
    loads = [packed_tokens(sizes[i] for i in share) for share in np.array(order).reshape(4, -1)]
    assert max(loads) < 1.05 * min(loads)


def test_uneven_groups_are_split_no_more_than_equal_shares_need():
    sizes = [RowSize("big", 10, 5)] * 5 + [RowSize("small", 10, 5)] * 3
    found = homes(regrouped_order(sizes, 2, 1), sizes, 2)
    assert len(found["big"]) == 2 and len(found["small"]) == 1


def test_rows_that_cannot_be_shared_out_evenly_are_refused():
    with pytest.raises(ValueError, match="10 rows cannot be shared out to 4 ranks in 1 steps evenly"):
        regrouped_order([RowSize(0, 5, 5)] * 10, 4, 1)


# ------------------------------------------------------------------------------------------------------ verl's trainers


def config(strategy: str = "prefix_grouper", regroup: str = "exact", mini: int = 4, shuffle: bool = False):
    actor = {
        "strategy": strategy,
        "ppo_mini_batch_size": mini,
        "shuffle": shuffle,
        "fsdp_config": {"prefix_grouper": {"regroup": regroup}},
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
        self.batch = {"prompts": mask[:, :width], "attention_mask": mask}

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


def trainer(install, given):
    hooked = type("Trainer", (StockTrainer,), {})
    hooked._balance_batch, hooked._update_actor = StockTrainer._balance_batch, StockTrainer._update_actor
    install(SimpleNamespace(PPOTrainer=hooked, RayPPOTrainer=hooked))
    return hooked(given)


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
