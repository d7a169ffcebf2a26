"""Hooks in verl's driver: rows of a group go to one rank, and our metrics keep their names.

verl deals the rows of a training batch out to its data-parallel ranks by length, which scatters every group. After it
has, :func:`new_order` deals them out again, group by group. Where verl's own assignment of rows to optimizer steps follows
from the order in which responses arrive, from their lengths or from a shuffle, it protects nothing, and ``regroup=auto``
brings whole groups into one step. Every step has as many rows as verl gives it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from omegaconf import OmegaConf

from prefix_grouper_plugins.integrations.verl.batch_sizes import sizes_by_names, sizes_by_tokens
from prefix_grouper_plugins.integrations.verl.losses import why_actor_rows_stay, why_aggregation_keeps_rows
from prefix_grouper_plugins.integrations.verl.switch import ASK_WORKERS, is_asked_for, show_what_is_decided
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.micro_batches import RowSize
from prefix_grouper_plugins.settings import SHARE, VERL_REGROUP
from prefix_grouper_plugins.step_order import forwarded_share, regrouped_order

_PREFIX = "prefix_grouper/"
_SAID = "_prefix_grouper_said"  # attribute of a trainer
_REMEDY = (
    "; actor_rollout_ref.actor.fsdp_config.prefix_grouper.regroup=group brings every group together, at the price of other "
    "rows in an optimizer step than without sharing"
)


# ------------------------------------------------------------------------------------------------------- verl's driver


def install_v1(module: ModuleType) -> None:
    """Hook into ``verl.trainer.ppo.v1.trainer_base``."""
    trainer = module.PPOTrainer
    stock_balance, stock_update, stock_critic = trainer._balance_batch, trainer._update_actor, trainer._update_critic

    @functools.wraps(stock_balance)
    def _balance_batch(
        self: Any, batch: Any, metrics: dict[str, Any], logging_prefix: str = "global_seqlen", **kwargs: Any
    ) -> Any:
        batch = stock_balance(self, batch, metrics, logging_prefix=logging_prefix, **kwargs)
        if not is_asked_for(self.config.actor_rollout_ref):
            return batch
        dp_size = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        lengths = [(tag["prompt_len"], tag["seq_len"]) for tag in batch.tags]
        sizes = sizes_by_names(batch.keys, lengths, _share(self))
        verls = _runs(self, "_update_actor", _update_actor) and _runs(self, "_update_critic", stock_critic)
        metrics.update(_regroup(self, sizes, dp_size, batch.reorder, logging_prefix, steps_are_verls=verls))
        return batch

    @functools.wraps(stock_update)
    def _update_actor(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = stock_update(self, batch, metrics)
        _restore_names(metrics)
        return batch

    trainer._balance_batch, trainer._update_actor = _balance_batch, _update_actor


def install_v0(module: ModuleType) -> None:
    """Hook into ``verl.trainer.ppo.ray_trainer``."""
    trainer = module.RayPPOTrainer
    stock_balance, stock_update, stock_critic = trainer._balance_batch, trainer._update_actor, trainer._update_critic

    @functools.wraps(stock_balance)
    def _balance_batch(
        self: Any, batch: Any, metrics: dict[str, Any], logging_prefix: str = "global_seqlen", **kwargs: Any
    ) -> None:
        # verl's own handling of the flag refuses batches that do not divide evenly; ours comes afterwards.
        flag = getattr(self, "use_prefix_grouper", False)  # trainers that derive from this one may lack it
        self.use_prefix_grouper = False
        try:
            stock_balance(self, batch, metrics, logging_prefix=logging_prefix, **kwargs)
        finally:
            self.use_prefix_grouper = flag
        if not is_asked_for(self.config.actor_rollout_ref) or "uid" not in batch.non_tensor_batch:
            return
        width = batch.batch["prompts"].shape[1]
        uids, tokens = (
            map(str, batch.non_tensor_batch["uid"]),
            (batch.batch["input_ids"], batch.batch["attention_mask"]),
        )
        sizes = sizes_by_tokens(list(uids), *tokens, width, _share(self))
        dp_size = self._get_dp_size(self.actor_rollout_wg, "actor")
        verls = _runs(self, "_update_actor", _update_actor) and _runs(self, "_update_critic", stock_critic)
        facts = {"steps_are_verls": verls, "steps_are_fixed": bool(kwargs.get("keep_minibatch"))}

        def reorder(order: list[int]) -> None:
            batch.reorder(torch.tensor(order))

        metrics.update(_regroup(self, sizes, dp_size, reorder, logging_prefix, **facts))

    @functools.wraps(stock_update)
    def _update_actor(self: Any, batch: Any) -> Any:
        output = stock_update(self, batch)
        _restore_names(output.meta_info["metrics"])
        return output

    trainer._balance_batch, trainer._update_actor = _balance_batch, _update_actor


def _share(trainer: Any) -> str:
    """``prefix_grouper.share``."""
    given = OmegaConf.select(trainer.config.actor_rollout_ref.actor, "fsdp_config.prefix_grouper.share")
    return str(given or SHARE.default)


def _runs(trainer: Any, name: str, function: Callable[..., Any]) -> bool:
    """Whether the method of this trainer is ``function``, which neither a subclass nor a patch has replaced."""
    return getattr(getattr(trainer, name), "__func__", None) is function


def _regroup(
    trainer: Any, sizes: Sequence[RowSize], ranks: int, reorder: Callable[[list[int]], None], prefix: str, **facts: bool
) -> dict[str, int]:
    """Bring the rows of a training batch into their new order, if any; the metrics that this changes."""
    order = new_order(trainer, sizes, ranks, **facts)
    if order is None:
        return {}
    reorder(order)
    return _balance(order, sizes, ranks, prefix)


def new_order(
    trainer: Any, sizes: Sequence[RowSize], ranks: int, *, steps_are_verls: bool = True, steps_are_fixed: bool = False
) -> list[int] | None:
    """The order of a training batch, None where it stays as verl made it.

    Args:
        trainer: verl's, or one that derives from it.
        sizes: rows in verl's order.
        ranks: data-parallel ranks.
        steps_are_verls: whether this trainer cuts a batch into optimizer steps by the code of verl's that we know.
        steps_are_fixed: whether the caller has assigned rows to optimizer steps, instead of verl by the order in which
            responses arrive or by their lengths.
    """
    regroup = OmegaConf.select(trainer.config.actor_rollout_ref.actor, "fsdp_config.prefix_grouper.regroup")
    regroup = regroup or VERL_REGROUP.default
    if regroup == "none" or len(sizes) % ranks:
        return None
    if regroup != "group" and (reason := _why_rows_stay(trainer)):
        _warn_once(f"{reason}, so the rows of a training batch stay in verl's order")
        return None
    steps = _optimizer_steps(trainer, len(sizes), ranks) if steps_are_verls else None
    shuffles = _shuffles(trainer)
    across = regroup == "group" or (regroup == "auto" and (shuffles or not steps_are_fixed))
    if not across and steps is None:
        _warn_once("this trainer makes optimizer steps in its own way, so rows are not moved" + _REMEDY)
        return None
    if not across and shuffles and steps != 1:
        _warn_once("verl shuffles the rows of each rank over the optimizer steps, so rows are not moved" + _REMEDY)
        return None
    order = regrouped_order(sizes, ranks, steps or 1, across_steps=across)
    _say_what_was_decided(trainer, regroup, across, sizes, ranks, steps)
    return order


def _optimizer_steps(trainer: Any, rows: int, ranks: int) -> int | None:
    """Optimizer steps that verl cuts a training batch into, None where it refuses the batch, or cuts it in its own way."""
    config = trainer.config
    mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size
    if trainer.use_critic:  # whose optimizer steps have rows of their own
        mini_batch = math.gcd(mini_batch, config.critic.ppo_mini_batch_size)
    share = mini_batch * config.actor_rollout_ref.rollout.n
    return rows // share if rows % share == 0 and share % ranks == 0 else None


def _shuffles(trainer: Any) -> bool:
    """Whether a worker shuffles its rows before it cuts them into optimizer steps."""
    config = trainer.config
    return bool(config.actor_rollout_ref.actor.shuffle or (trainer.use_critic and config.critic.shuffle))


def _why_rows_stay(trainer: Any) -> str | None:
    """Why the losses of actor or critic allow no other order: by the config, and by what the workers run."""
    config = trainer.config
    if reason := why_actor_rows_stay(config.actor_rollout_ref.actor, config.get("distillation")):
        return reason
    groups = [trainer.actor_rollout_wg]
    if trainer.use_critic:
        groups.append(getattr(trainer, "critic_wg", None))
        if reason := why_aggregation_keeps_rows(config.critic):
            return reason
    asked = (getattr(workers, ASK_WORKERS, None) for workers in groups)
    return next((reason for ask in asked if ask is not None for reason in ask() if reason), None)


def _say_what_was_decided(
    trainer: Any, regroup: str, across: bool, sizes: Sequence[RowSize], ranks: int, steps: int | None
) -> None:
    """One line for each trainer: where rows of a group come together, and what that saves."""
    if getattr(trainer, _SAID, False):
        return
    setattr(trainer, _SAID, True)
    show_what_is_decided()
    if steps is None:
        where = (
            f"regroup={regroup}: this trainer makes optimizer steps in its own way, so groups lie whole on each rank"
        )
        logger.info("prefix grouper: %s", where)
        return
    shares = [
        forwarded_share(regrouped_order(sizes, ranks, steps, across_steps=whole), sizes, ranks, steps)
        for whole in (True, False)
    ]
    update = f"of the tokens of this training batch, the update forwards {shares[not across]:.0%}"
    if steps == 1:
        where = f"regroup={regroup}: a training batch is one optimizer step, and all of its groups are whole; {update}"
    elif across:
        where = (
            f"regroup={regroup}: each of the {steps} optimizer steps of a training batch gets whole groups, where verl would "
            f"assign rows by their lengths and the order of their arrival; {update}, with regroup=exact {shares[1]:.0%}"
        )
    else:
        where = (
            f"regroup={regroup}: each of the {steps} optimizer steps of a training batch keeps its rows; {update}, with "
            f"regroup=group {shares[0]:.0%}"
        )
    shares_less = not across and shares[0] < shares[1]
    logger.log(logging.WARNING if shares_less else logging.INFO, "prefix grouper: %s", where)


def _balance(order: Sequence[int], sizes: Sequence[RowSize], ranks: int, prefix: str) -> dict[str, int]:
    """verl's figures of how even the ranks' shares are, of the new order: row tokens, as verl counts them."""
    tokens = torch.tensor([sizes[i].prompt + sizes[i].response for i in order]).view(ranks, -1).sum(1).tolist()
    return {f"{prefix}/balanced_min": min(tokens), f"{prefix}/balanced_max": max(tokens)}


@functools.cache
def _warn_once(what: str) -> None:
    logger.warning("prefix grouper: %s", what)


def _restore_names(metrics: dict[str, Any]) -> None:
    """``actor/prefix_grouper/...``, as verl files what its actor reports, to ``prefix_grouper/...``."""
    for name in [name for name in metrics if name.startswith(f"actor/{_PREFIX}")]:
        metrics[name.removeprefix("actor/")] = metrics.pop(name)
