"""One thing to type, three ways to type it, and every mistake is an error that names the remedy."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import FSDPEngineConfig

from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngineConfig, PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.config import adopt, adopt_critic
from prefix_grouper_plugins.integrations.verl.switch import is_asked_for

MICRO_BATCHES = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.n=4",
    "data.train_batch_size=256",
]
WAYS = {
    "model_engine": ["model_engine=prefix_grouper"],
    "strategy": ["actor_rollout_ref.actor.strategy=prefix_grouper"],
    "flag": ["actor_rollout_ref.actor.use_prefix_grouper=True", "actor_rollout_ref.actor.strategy=fsdp2"],
}


def composed(*overrides: str):
    """verl's config for this command line."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*MICRO_BATCHES, *overrides])


def validated(*overrides: str):
    """What a run with this command line starts with: ``actor_rollout_ref``."""
    config = composed(*overrides)
    validate_config(config, use_reference_policy=True, use_critic=False)
    return config.actor_rollout_ref


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_asking_gives_actor_and_reference_the_engine(way):
    config = validated(*WAYS[way])
    for part in (config.actor, config.ref):
        engine = omega_conf_to_dataclass(part.fsdp_config)
        assert isinstance(engine, PrefixGrouperEngineConfig)
        assert part.strategy == "prefix_grouper", "the key under which verl looks the engine up"
        assert engine.prefix_grouper == PrefixGrouperOptions()
    assert config.ref.fsdp_config.forward_only is True


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("ask", [WAYS["model_engine"], WAYS["flag"][:1]], ids=["model_engine", "flag"])
def test_a_recipe_that_chose_fsdp_or_fsdp2_keeps_it(ask, sharding):
    config = validated(*ask, f"actor_rollout_ref.actor.strategy={sharding}")
    assert config.actor.strategy == config.ref.strategy == "prefix_grouper"
    assert config.actor.fsdp_config.prefix_grouper.sharding == sharding
    assert config.ref.fsdp_config.prefix_grouper.sharding == sharding


@pytest.mark.parametrize("way", WAYS)
def test_settings_reach_the_reference_policy_too(way):
    plus = "" if way == "model_engine" else "+"
    config = validated(*WAYS[way], f"{plus}actor_rollout_ref.actor.fsdp_config.prefix_grouper.backend=blockwise")
    for part in (config.actor, config.ref):
        assert omega_conf_to_dataclass(part.fsdp_config).prefix_grouper.backend == "blockwise"


def test_other_settings_of_the_recipe_stay():
    config = validated(*WAYS["model_engine"], "actor_rollout_ref.actor.fsdp_config.param_offload=True")
    assert omega_conf_to_dataclass(config.actor).engine.param_offload is True


def test_adopting_twice_changes_nothing():
    config = validated(*WAYS["flag"])
    before = OmegaConf.to_container(config, resolve=True)
    assert adopt(config)
    assert OmegaConf.to_container(config, resolve=True) == before


def test_a_run_that_does_not_ask_is_left_alone():
    config = composed("actor_rollout_ref.actor.strategy=fsdp2")
    before = OmegaConf.to_container(config, resolve=False)
    validate_config(config, use_reference_policy=True, use_critic=False)
    assert OmegaConf.to_container(config, resolve=False) == before
    assert not is_asked_for(config.actor_rollout_ref)


def test_a_worker_without_an_actor_is_left_alone():
    assert not is_asked_for(OmegaConf.create({"model": {"path": "teacher"}}))


def validated_critic(*overrides: str):
    """The engine config of the critic that a PPO run with this command line starts with, and its strategy."""
    config = composed("algorithm.adv_estimator=gae", *overrides)
    validate_config(config, use_reference_policy=True, use_critic=False)  # True reads the critic's model from disk
    return omega_conf_to_dataclass(config.critic.fsdp), config.critic.strategy


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_asking_gives_the_critic_the_engine_and_the_actors_settings(way):
    plus = "" if way == "model_engine" else "+"
    setting = f"{plus}actor_rollout_ref.actor.fsdp_config.prefix_grouper.share=tree"
    engine, strategy = validated_critic(*WAYS[way], setting)
    assert isinstance(engine, PrefixGrouperEngineConfig)
    assert strategy == "prefix_grouper", "the key under which verl looks the engine up"
    sharding = "fsdp2" if way == "model_engine" else "fsdp"  # what verl gives a critic of which nobody says more
    own = PrefixGrouperOptions(share="tree", on_unsupported="fallback", sharding=sharding)
    assert engine.prefix_grouper == own


@pytest.mark.parametrize("way", WAYS)
def test_settings_of_the_critic_come_before_those_of_the_actor(way):
    plus = "" if way == "model_engine" else "+"
    own = [f"{plus}critic.fsdp.prefix_grouper.{name}" for name in ("regroup=none", "on_unsupported=error")]
    engine, strategy = validated_critic(*WAYS[way], *own, "critic.strategy=fsdp2")
    assert engine.prefix_grouper == PrefixGrouperOptions(regroup="none", on_unsupported="error")
    assert strategy == "prefix_grouper"


@pytest.mark.parametrize("way", WAYS)
def test_a_critic_can_be_left_to_verl(way):
    plus = "" if way == "model_engine" else "+"
    engine, strategy = validated_critic(*WAYS[way], f"{plus}critic.fsdp.prefix_grouper=null")
    assert type(engine) is FSDPEngineConfig and strategy == ("fsdp2" if way == "model_engine" else "fsdp")


def test_a_critic_can_ask_alone():
    config = composed("critic.strategy=prefix_grouper", "actor_rollout_ref.actor.strategy=fsdp2")
    validate_config(config, use_reference_policy=True, use_critic=False)
    assert isinstance(omega_conf_to_dataclass(config.critic.fsdp), PrefixGrouperEngineConfig)
    assert config.critic.strategy == "prefix_grouper"
    assert config.actor_rollout_ref.actor.strategy == "fsdp2"


def test_a_critic_of_another_engine_runs_without_sharing_and_says_so(caplog):
    config = composed(*WAYS["model_engine"])
    config.critic.strategy = "veomni"
    assert not adopt_critic(config) and config.critic.strategy == "veomni"
    assert "the critic runs without sharing: its strategy is 'veomni'" in caplog.text


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_misspelt_setting_is_refused_by_hydra():
    with pytest.raises(ConfigCompositionException) as error:
        composed(*WAYS["model_engine"], "actor_rollout_ref.actor.fsdp_config.prefix_grouper.backned=auto")
    assert "backned" in str(error.value) + str(error.value.__cause__)


def test_a_misspelt_setting_beside_the_flag_is_refused_before_the_run_starts():
    with pytest.raises(Exception, match="unexpected keyword argument 'backned'"):
        validated(*WAYS["flag"], "+actor_rollout_ref.actor.fsdp_config.prefix_grouper.backned=auto")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("backend=fast", "prefix_grouper.backend is 'fast': choose one of auto, merged_lse, triton, flex, blockwise"),
        ("sharding=megatron", "prefix_grouper.sharding is 'megatron': choose one of fsdp2, fsdp"),
        ("regroup=all", "prefix_grouper.regroup is 'all': choose one of auto, exact, group, none"),
        ("on_unsupported=ignore", "prefix_grouper.on_unsupported is 'ignore': choose one of error, fallback"),
    ],
)
def test_a_wrong_value_is_refused_with_the_choices(setting, message):
    with pytest.raises(Exception, match=message):
        validated(*WAYS["model_engine"], f"actor_rollout_ref.actor.fsdp_config.prefix_grouper.{setting}")


def test_the_flag_with_another_engine_is_refused():
    with pytest.raises(ValueError, match=r"the actor's strategy is 'veomni': set .*strategy to fsdp2 or fsdp"):
        validated("model_engine=veomni", "actor_rollout_ref.actor.use_prefix_grouper=True")
