"""Entry point in the group ``verl.plugins``: verl imports this module at the beginning of ``import verl``, everywhere.

It imports next to nothing, and each hook waits for the module that it is for. verl swallows the errors of plugins, so
none leaves here: a hook that fails is remembered, and a run that asks for sharing is stopped with the reason, before it
starts (:func:`_watch_validation`) or where its engine is built (:func:`_refusing_engine`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from prefix_grouper_plugins.import_hooks import after_import
from prefix_grouper_plugins.integrations.verl.switch import (
    STRATEGY,
    failures,
    is_asked_for,
    is_asked_for_critic,
    raise_failures,
    show_what_is_decided,
)

DEVICES = ["cuda", "npu", "cpu"]
# Each of our modules has an `install...` for the module of verl that it hooks into.
_HOOKS = {
    "verl.workers.engine_workers": "worker.install",
    "verl.experimental.separation.engine_workers": "worker.install_separate",
    "verl.trainer.ppo.v1.trainer_base": "driver.install_v1",
    "verl.trainer.ppo.ray_trainer": "driver.install_v0",
}


def load() -> None:
    """Set the hooks up."""
    after_import("hydra.core.plugins", _guarded(_offer_configs))
    after_import("verl.utils.config", _watch_validation)
    after_import("verl.workers.engine.fsdp.transformer_impl", _register_engine)
    for module, function in _HOOKS.items():
        after_import(module, _guarded(functools.partial(_install, function=function)))


def _ours(name: str) -> ModuleType:
    return importlib.import_module(f"prefix_grouper_plugins.integrations.verl.{name}")


def _guarded(callback: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """``callback``, whose failure waits for those who ask for sharing and does not disturb others."""

    def guarded(module: ModuleType) -> None:
        try:
            callback(module)
        except Exception as error:
            failures.append(error)

    return guarded


def _install(module: ModuleType, function: str) -> None:
    _ours("compatibility").check(module.__name__)
    home, name = function.split(".")
    getattr(_ours(home), name)(module)


def _offer_configs(module: ModuleType) -> None:
    """Put our yaml files on Hydra's search path, so that ``model_engine=prefix_grouper`` is found."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class PrefixGrouperSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("prefix-grouper", f"file://{Path(__file__).parent / 'hydra'}")

    module.Plugins.instance().register(PrefixGrouperSearchPath)


def _watch_validation(module: ModuleType) -> None:
    """verl's trainers validate their config before they start anything: a run that cannot share stops there."""
    stock = module.validate_config

    @functools.wraps(stock)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        if is_asked_for(config.actor_rollout_ref) or is_asked_for_critic(config):
            _ours("compatibility").check_all(v1=bool(config.trainer.get("use_v1", True)))
            raise_failures()
            show_what_is_decided()
            _ours("config").adopt(config.actor_rollout_ref)
            _ours("config").adopt_critic(config)
        stock(config, *args, **kwargs)

    module.validate_config = validate_config  # type: ignore[attr-defined]


def _register_engine(module: ModuleType) -> None:
    """Make the engines known to verl; if that fails, one under their name that says why."""
    from verl.workers.engine.base import EngineRegistry

    try:
        _ours("compatibility").check(module.__name__)
        engine, critic = _ours("engine").PrefixGrouperEngine, _ours("value_engine").PrefixGrouperValueEngine
    except Exception as error:
        failures.append(error)
        engine = critic = _refusing_engine()
    for model_type, kind in (("language_model", engine), ("value_model", critic)):
        EngineRegistry.register(model_type=model_type, backend=STRATEGY, device=DEVICES)(kind)


def _refusing_engine() -> type:
    from verl.workers.engine.base import BaseEngine

    class RefusingEngine(BaseEngine):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise_failures()

    return RefusingEngine


load()
