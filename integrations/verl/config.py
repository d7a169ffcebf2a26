"""Settings: a typed part of verl's FSDP engine config, which Hydra checks.

The three ways to turn sharing on (``model_engine=prefix_grouper``, ``actor.strategy=prefix_grouper`` and verl's own
``actor.use_prefix_grouper=True``) are brought to one form by :func:`adopt` and :func:`adopt_critic`, before anything reads
the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.base_config import BaseConfig
from verl.workers.config import FSDPEngineConfig

from prefix_grouper_plugins import settings
from prefix_grouper_plugins.integrations.verl.switch import (
    ENGINE_TARGET,
    STRATEGY,
    is_asked_for,
    is_asked_for_critic,
)
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.settings import SHARDINGS

SETTINGS = "actor_rollout_ref.actor.fsdp_config.prefix_grouper"  # where users set those of actor and reference policy
CRITIC_SETTINGS = "critic.fsdp.prefix_grouper"
_OPTIONS_TARGET = "prefix_grouper_plugins.integrations.verl.PrefixGrouperOptions"


@dataclass
class PrefixGrouperOptions(BaseConfig):
    """``actor_rollout_ref.actor.fsdp_config.prefix_grouper``; reference policy and critic take over the actor's.

    Raises:
        ValueError: a value that is not among the choices.
    """

    sharding: str = settings.SHARDING.field()
    share: str = settings.SHARE.field()
    backend: str = settings.BACKEND.field()
    regroup: str = settings.VERL_REGROUP.field()
    on_unsupported: str = settings.ON_UNSUPPORTED.field()
    verify: str = settings.VERIFY.field()
    self_check: bool = settings.SELF_CHECK.field()

    def __post_init__(self) -> None:
        for setting in settings.VERL_SETTINGS:
            setting.check(getattr(self, setting.name), f"prefix_grouper.{setting.name}")
        object.__setattr__(self, "verify", settings.VERIFY.read(self.verify))  # which was a switch once


@dataclass
class PrefixGrouperEngineConfig(FSDPEngineConfig):
    """:class:`verl.workers.config.FSDPEngineConfig` with :class:`PrefixGrouperOptions`."""

    prefix_grouper: PrefixGrouperOptions = field(default_factory=PrefixGrouperOptions)


def adopt(config: DictConfig) -> bool:
    """Bring ``config`` (``actor_rollout_ref``) into the one form that the engine runs with, if it asks for sharing.

    Whatever asked for it, afterwards the strategy of actor and reference policy is ``prefix_grouper``, their engine
    configs are :class:`PrefixGrouperEngineConfig`, and a strategy of fsdp or fsdp2 that stood there is kept as
    ``prefix_grouper.sharding``. Calling it again changes nothing.

    Returns:
        whether sharing was asked for.

    Raises:
        ValueError: the actor has another engine than FSDP.
    """
    actor = config.actor
    if not is_asked_for(config):
        return False
    if actor.strategy not in (STRATEGY, *SHARDINGS):
        raise ValueError(
            f"prefix_grouper shares prompts on FSDP, the actor's strategy is {actor.strategy!r}: set "
            "actor_rollout_ref.actor.strategy to fsdp2 or fsdp, or drop use_prefix_grouper"
        )
    options = dict(OmegaConf.select(actor, "fsdp_config.prefix_grouper") or {})
    if actor.strategy in SHARDINGS:
        options["sharding"] = actor.strategy
    for name in ("ref", "actor"):  # the reference policy's strategy may be interpolated from the actor's
        part = config.get(name)
        if part is not None and "fsdp_config" in part:
            own = {} if name == "actor" else dict(part.fsdp_config.get("prefix_grouper") or {})
            own["sharding"] = options.get("sharding", SHARDINGS[0])
            _adopt_engine(part, part.fsdp_config, {**options, **own})
    return True


def adopt_critic(config: DictConfig) -> bool:
    """Let the critic of ``config``, a trainer's whole one, take the actor's settings, if actor or critic ask for sharing.

    Settings of its own in ``critic.fsdp.prefix_grouper`` come first; ``null`` there leaves the critic to verl. Unless told
    otherwise, a critic that cannot be shared takes verl's path. To be called after :func:`adopt`; again, it changes nothing.

    Returns:
        whether the critic runs our engine.
    """
    critic = config.get("critic")
    asked = is_asked_for(config.actor_rollout_ref)
    if critic is None or not (asked or is_asked_for_critic(config)):
        return False
    if critic.strategy not in (STRATEGY, *SHARDINGS):
        if critic.get("enable") is not False:
            logger.warning(
                "prefix grouper: the critic runs without sharing: its strategy is %r, and prompts are shared on FSDP",
                critic.strategy,
            )
        return False
    if critic.fsdp.get("prefix_grouper", {}) is None:
        with open_dict(critic.fsdp):
            critic.fsdp.pop("prefix_grouper")
            critic.fsdp["_target_"] = f"{FSDPEngineConfig.__module__}.{FSDPEngineConfig.__name__}"
        critic.strategy = SHARDINGS[0] if critic.strategy == STRATEGY else critic.strategy
        return False
    actors = dict(OmegaConf.select(config, SETTINGS) or {}) if asked else {}
    options = {**actors, "on_unsupported": "fallback", **dict(critic.fsdp.get("prefix_grouper") or {})}
    if critic.strategy in SHARDINGS:
        options["sharding"] = critic.strategy
    _adopt_engine(critic, critic.fsdp, options)
    return True


def _adopt_engine(part: DictConfig, engine: DictConfig, options: dict[str, Any]) -> None:
    """Let ``part`` run our engine, configured by its ``engine``."""
    with open_dict(part), open_dict(engine):
        engine["_target_"] = ENGINE_TARGET
        engine["prefix_grouper"] = {**options, "_target_": _OPTIONS_TARGET}
        part["strategy"] = STRATEGY
