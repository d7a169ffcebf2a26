"""Rows change their micro-batch only under losses that are sums over rows; all others keep their gradients, too."""

from __future__ import annotations

import functools
from functools import partial

import pytest

pytest.importorskip("verl")

import verl.workers.engine.fsdp.transformer_impl  # noqa: F401  first, as in a run: it registers our engine
from omegaconf import OmegaConf
from verl.trainer.distillation import losses as distillation_losses
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.trainer.ppo import core_algos
from verl.workers.config import FSDPActorConfig, FSDPCriticConfig, PolicyLossConfig
from verl.workers.utils import losses as verl_losses
from verl.workers.utils.losses import ppo_loss, sft_loss, value_loss

from prefix_grouper_plugins.integrations.verl import losses as our_losses
from prefix_grouper_plugins.integrations.verl.losses import (
    why_actor_rows_stay,
    why_aggregation_keeps_rows,
    why_prompts_are_read,
    why_rows_stay,
)
from tests.integrations.verl.cases import Case
from tests.integrations.verl.test_equality import assert_equal

NORM = "seq-mean-token-sum-norm"


def weights(**correction):
    """Importance weights by which ``bypass_mode`` corrects the rollout's probabilities."""
    settings = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 2.0, **correction}
    return {"loss_mode": "bypass_mode", "policy_loss": {"rollout_correction": settings}}


# Four rows of three groups stand in each micro-batch of verl, so rows that stay share less than whole groups would.
FIXED, BY_TOKENS = {"dynamic": False, "micro_batch_size": 4}, {"token_budget": 60}
MOVING = [
    *(
        Case(actor={"loss_agg_mode": mode}, **FIXED)
        for mode in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
    ),
    Case(actor={"loss_agg_mode": NORM, "loss_scale_factor": 16}, **FIXED),
    Case(**weights(), **FIXED),
    Case(**weights(loss_type="ppo_clip", rollout_is_batch_normalize=True), **FIXED),  # which does not use the weights
    Case(loss_mode="cispo", **FIXED),
]
STAYING = [
    Case(actor={"loss_agg_mode": NORM}, **FIXED),
    Case(actor={"loss_agg_mode": NORM}, **BY_TOKENS),
    Case(actor={"loss_agg_mode": NORM, "entropy_coeff": 0.0, "use_kl_loss": False}, **FIXED),
    Case(**weights(rollout_is_batch_normalize=True), **FIXED),
    Case(**weights(rollout_is_batch_normalize=True, rollout_is="sequence"), **FIXED),
    Case(loss_mode="kl_cov", policy_loss={"kl_cov_ratio": 0.1}, **FIXED),
    Case(loss_mode="geo_mean", **BY_TOKENS),
]


@pytest.mark.slow
def test_each_loss_has_the_gradients_of_verl_and_only_sums_over_rows_move_them(results):
    for case, result in zip(MOVING + STAYING, results(MOVING + STAYING, 1), strict=True):
        assert_equal(case, result)
        assert (result["metrics"]["prefix_grouper/rows_per_group"] == 4) is (case in MOVING), (str(case), result)


@pytest.mark.slow
def test_moving_the_rows_of_a_coupled_loss_would_be_noticed(results):
    """`regroup=group` moves them whatever the loss is: the comparison above can fail."""
    (result,) = results([Case(actor={"loss_agg_mode": NORM}, options={"regroup": "group"}, **FIXED)], 1)
    assert result["gradient"] > 0.1


# ------------------------------------------------------------------------------------------------------ without engines


def actor(**changes):
    loss = changes.pop("policy_loss", {})
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=4, policy_loss=PolicyLossConfig(**loss), **changes
    )


@pytest.mark.parametrize(
    "mode", ["vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "dro", "cispo", "bypass_mode"]
)
def test_rows_move_under_the_policy_losses_that_are_sums_over_rows(mode):
    assert why_rows_stay(partial(ppo_loss, config=actor(policy_loss={"loss_mode": mode}))) is None


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov", "geo_mean", "one_of_next_year"])
def test_rows_stay_under_all_others(mode):
    reason = why_rows_stay(partial(ppo_loss, config=actor(policy_loss={"loss_mode": mode})))
    assert reason == f"the policy loss {mode} may depend on which rows are in one micro-batch"


def test_rows_stay_under_a_loss_that_was_registered_in_place_of_verls(monkeypatch):
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "vanilla", lambda **kwargs: None)
    assert why_rows_stay(partial(ppo_loss, config=actor())).startswith("the policy loss vanilla may depend")


def my_loss(config, model_output, data, dp_group=None):
    """A user's own."""


def test_rows_stay_under_a_loss_of_the_users_own_whatever_its_config_says():
    reason = why_rows_stay(partial(my_loss, config=actor()))
    assert reason == "my_loss is not a loss of verl's that is known to be a sum over rows"
    assert why_rows_stay(lambda **kwargs: None) is not None
    assert why_rows_stay(ppo_loss) is not None  # without a config to look at


def test_rows_move_where_there_is_no_loss_and_under_that_of_sft():
    assert why_rows_stay(None) is None
    assert why_rows_stay(partial(sft_loss, config=None)) is None


def test_means_over_rows_need_the_number_of_rows_of_the_whole_step():
    loss = partial(ppo_loss, config=actor(loss_agg_mode="seq-mean-token-sum"))
    assert why_rows_stay(loss) is None
    assert "global_batch_size is missing" in why_rows_stay(loss, knows_global_batch=False)
    assert why_rows_stay(partial(ppo_loss, config=actor()), knows_global_batch=False) is None
    sapo = partial(ppo_loss, config=actor(policy_loss={"loss_mode": "sapo"}))  # which averages over rows in any mode
    assert "global_batch_size is missing" in why_rows_stay(sapo, knows_global_batch=False)
    critic = FSDPCriticConfig(strategy="fsdp2", ppo_micro_batch_size_per_gpu=4, loss_agg_mode="seq-mean-token-mean")
    assert why_rows_stay(partial(value_loss, config=critic)) is None
    assert "global_batch_size is missing" in why_rows_stay(partial(value_loss, config=critic), knows_global_batch=False)


class MorePartial(partial):
    def __call__(self, *args, **kwargs):
        loss, metrics = super().__call__(*args, **kwargs)
        return loss * len(kwargs["data"]), metrics


def test_a_subclass_of_partial_is_a_loss_of_the_users_own():
    assert "MorePartial" in why_rows_stay(MorePartial(ppo_loss, config=actor()))
    assert "is not known to read log-probs of responses alone" in why_prompts_are_read(
        MorePartial(ppo_loss, config=actor())
    )


def test_a_distillation_loss_of_the_users_own_may_read_log_probs_of_prompts(monkeypatch):
    def loss(mode):
        config = OmegaConf.create({"distillation_loss": {"loss_mode": mode}})
        return partial(distillation_ppo_loss, config=actor(), distillation_config=config)

    monkeypatch.setitem(distillation_losses.DISTILLATION_LOSS_REGISTRY, "mine", lambda **kwargs: None)
    assert why_prompts_are_read(loss("k1")) is None
    assert why_prompts_are_read(loss("mine")) == (
        "the distillation loss mine is not known to read log-probs of responses alone"
    )


@pytest.mark.parametrize("config", [actor(loss_agg_mode=NORM), OmegaConf.create({"loss_agg_mode": NORM})], ids=type)
def test_the_engine_and_the_driver_ask_the_same_function(config):
    """The engine has verl's dataclasses, the driver has what Hydra composed."""
    assert "unless loss_scale_factor is set" in why_actor_rows_stay(config)


def test_the_loss_of_a_critic_is_asked_for_its_aggregation():
    critic = FSDPCriticConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=4, loss_agg_mode=NORM)
    assert "divides by the longest response" in why_aggregation_keeps_rows(critic)
    assert why_aggregation_keeps_rows({"loss_agg_mode": "median"}) == (
        "loss_agg_mode=median is not known to be a sum over rows"
    )


def distillation(**loss):
    return OmegaConf.create(
        {"enabled": True, "distillation_loss": {"loss_mode": "k3", "policy_loss_mode": "vanilla"} | loss}
    )


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ({}, None),
        ({"use_policy_gradient": True}, None),
        ({"use_policy_gradient": True, "policy_loss_mode": "geo_mean"}, "the policy loss geo_mean may depend"),
        ({"use_policy_gradient": False, "policy_loss_mode": "geo_mean"}, None),
        ({"loss_mode": "mine"}, "the distillation loss mine is not known"),
    ],
)
def test_distillation_is_asked_for_the_losses_that_it_uses(loss, reason):
    found = why_rows_stay(partial(distillation_ppo_loss, config=actor(), distillation_config=distillation(**loss)))
    assert found is None if reason is None else found.startswith(reason)


def test_functions_of_verl_that_others_have_replaced_are_not_known(monkeypatch):
    """A module that verl imports early may put its own under their names, before ours are bound or later."""
    actor = FSDPActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1)
    loss = partial(ppo_loss, config=actor)
    assert why_rows_stay(loss) is None and why_prompts_are_read(loss) is None

    def replaced(own):
        return functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))

    for name in ("agg_loss", "kl_penalty"):
        for module in (core_algos, verl_losses):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, replaced(getattr(module, name)))
                assert why_rows_stay(loss).startswith(f"{name} was replaced by code that is not verl's")
    with monkeypatch.context() as patch:
        patch.setitem(core_algos.POLICY_LOSS_REGISTRY, "vanilla", replaced(core_algos.POLICY_LOSS_REGISTRY["vanilla"]))
        assert "the policy loss vanilla may depend" in why_rows_stay(loss)
    own = replaced(ppo_loss)
    monkeypatch.setattr(our_losses, "ppo_loss", own)  # as if it had been replaced before ours was imported
    assert why_rows_stay(partial(own, config=actor)).startswith("ppo_loss was replaced by code that is not verl's")
    assert "is not known to read log-probs of responses alone" in why_prompts_are_read(partial(own, config=actor))
