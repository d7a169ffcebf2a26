"""Whether a run asks for sharing, and what keeps it from starting: known without importing anything heavy."""

from __future__ import annotations

import logging
from typing import Any

STRATEGY = "prefix_grouper"  # the name under which verl finds the engine
ASK_WORKERS = "prefix_grouper_why_rows_stay"  # method of verl's workers, added by `worker.py` and called by the driver
ENGINE_TARGET = "prefix_grouper_plugins.integrations.verl.PrefixGrouperEngineConfig"

# Hooks that could not be set up. verl swallows the errors of plugins, so they wait here for a run that needs them.
failures: list[Exception] = []


def is_asked_for(config: Any) -> bool:
    """Whether ``config`` (``actor_rollout_ref``) asks for sharing, in one of the three ways: ``model_engine`` or
    ``actor.strategy`` is ``prefix_grouper``, or verl's own ``actor.use_prefix_grouper`` is set."""
    actor = config.get("actor")
    if actor is None:  # a worker of another kind
        return False
    engine = actor.get("fsdp_config") or {}
    return (
        actor.strategy == STRATEGY or engine.get("_target_") == ENGINE_TARGET or bool(actor.get("use_prefix_grouper"))
    )


def is_asked_for_critic(config: Any) -> bool:
    """Whether the critic of ``config``, a trainer's whole one, asks for sharing by itself."""
    return (config.get("critic") or {}).get("strategy") == STRATEGY


def show_what_is_decided() -> None:
    """Let our messages of level INFO through to the terminal, where verl's processes show warnings only.

    A level that somebody has set for the logger ``prefix_grouper_plugins`` stays.
    """
    logger = logging.getLogger("prefix_grouper_plugins")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def raise_failures() -> None:
    """Stop a run that asks for sharing where the plugin is broken.

    Raises:
        RuntimeError: with the first reason, which says what can be done.
    """
    if failures:
        raise RuntimeError(f"prefix grouper cannot run: {failures[0]}") from failures[0]
