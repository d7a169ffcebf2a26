"""Hooks in verl's driver: rows of a group go to one rank, and our metrics keep their names.

verl deals the rows of a training batch out to its data-parallel ranks by length, which scatters every group. After it
has, :func:`regrouped_order` deals them out again, group by group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from omegaconf import OmegaConf

from prefix_grouper_plugins.integrations.verl.switch import is_asked_for
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens, rows_by_group

_PREFIX = "prefix_grouper/"


def regrouped_order(sizes: Sequence[RowSize], ranks: int, steps: int, *, across_steps: bool = False) -> list[int]:
    """An order of the rows in which each group lies on one rank, if the ranks' equal shares allow it.

    Row ``i`` is on rank ``i // (len(sizes) / ranks)``, and rank by rank the rows are cut into one share for each
    optimizer step. A step sees the same rows before and after; only with ``across_steps`` do groups that were scattered
    over several steps come together in one.

    Args:
        sizes: the rows in the present order.
        ranks: data-parallel ranks.
        steps: optimizer steps that the batch is cut into.
        across_steps: see above.

    Returns:
        indices into ``sizes``: a permutation, which balances packed tokens over the ranks of each step.

    Raises:
        ValueError: the rows cannot be shared out evenly.
    """
    share, rest = divmod(len(sizes), ranks * steps)
    if rest:
        raise ValueError(f"{len(sizes)} rows cannot be shared out to {ranks} ranks in {steps} steps evenly")
    rows = torch.arange(len(sizes)).view(ranks, steps, share).transpose(0, 1).flatten(1)  # [steps, rows of a step]
    if across_steps:
        whole = [row for group in rows_by_group(sizes, range(len(sizes))) for row in group]
        rows = torch.tensor(whole).view(steps, -1)
    dealt = [_deal(step, sizes, ranks) for step in rows.tolist()]
    return [row for rank in range(ranks) for step in dealt for row in step[rank]]


def _deal(rows: Sequence[int], sizes: Sequence[RowSize], ranks: int) -> list[list[int]]:
    """Share ``rows`` out to ``ranks`` in equal numbers: heavy groups first, each to the rank with the least load that
    has room for all of it, and piecemeal where none has."""
    room = len(rows) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks

    def load_of(group: Sequence[int]) -> int:
        return packed_tokens(sizes[i] for i in group)

    waiting = sorted(rows_by_group(sizes, rows), key=load_of)
    while waiting:
        group = waiting.pop()
        able = [rank for rank in range(ranks) if room - len(hands[rank]) >= len(group)]
        rank = min(able, key=lambda r: loads[r]) if able else max(range(ranks), key=lambda r: room - len(hands[r]))
        kept = group[: room - len(hands[rank])]
        hands[rank] += kept
        loads[rank] += load_of(kept)
        if group[len(kept) :]:
            waiting.append(group[len(kept) :])
    return hands


# ------------------------------------------------------------------------------------------------------- verl's driver


def install_v1(module: ModuleType) -> None:
    """Hook into ``verl.trainer.ppo.v1.trainer_base``."""
    trainer = module.PPOTrainer
    stock_balance, stock_update = trainer._balance_batch, trainer._update_actor

    @functools.wraps(stock_balance)
    def _balance_batch(
        self: Any, batch: Any, metrics: dict[str, Any], logging_prefix: str = "global_seqlen", **kwargs: Any
    ) -> Any:
        batch = stock_balance(self, batch, metrics, logging_prefix=logging_prefix, **kwargs)
        if not is_asked_for(self.config.actor_rollout_ref):
            return batch
        dp_size = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        # keys are uid_session_turn
        uids = [key.rsplit("_", 2)[0] for key in batch.keys]
        sizes = [
            RowSize((uid, tag["prompt_len"]), tag["prompt_len"], tag["seq_len"] - tag["prompt_len"])
            for uid, tag in zip(uids, batch.tags, strict=True)
        ]
        metrics.update(_regroup(self, sizes, dp_size, batch.reorder, logging_prefix))
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
    stock_balance, stock_update = trainer._balance_batch, trainer._update_actor

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
        mask = batch.batch["attention_mask"]
        prompts, responses = mask[:, :width].sum(1).tolist(), mask[:, width:].sum(1).tolist()
        sizes = [
            RowSize((uid, prompt), prompt, response)
            for uid, prompt, response in zip(batch.non_tensor_batch["uid"], prompts, responses, strict=True)
        ]
        dp_size = self._get_dp_size(self.actor_rollout_wg, "actor")
        metrics.update(_regroup(self, sizes, dp_size, lambda order: batch.reorder(torch.tensor(order)), logging_prefix))

    @functools.wraps(stock_update)
    def _update_actor(self: Any, batch: Any) -> Any:
        output = stock_update(self, batch)
        _restore_names(output.meta_info["metrics"])
        return output

    trainer._balance_batch, trainer._update_actor = _balance_batch, _update_actor


def _regroup(
    trainer: Any, sizes: Sequence[RowSize], ranks: int, reorder: Callable[[list[int]], None], prefix: str
) -> dict[str, int]:
    """Bring the rows of a training batch into their new order, if any; the metrics that this changes."""
    order = _new_order(trainer, sizes, ranks)
    if order is None:
        return {}
    reorder(order)
    return _balance(order, sizes, ranks, prefix)


def _new_order(trainer: Any, sizes: Sequence[RowSize], ranks: int) -> list[int] | None:
    """The order of a training batch, None where it stays as verl made it."""
    config = trainer.config
    actor = config.actor_rollout_ref.actor
    regroup = OmegaConf.select(actor, "fsdp_config.prefix_grouper.regroup") or "exact"
    if regroup == "none":
        return None
    mini_batch, shuffles = actor.ppo_mini_batch_size, actor.shuffle
    if trainer.use_critic:  # whose optimizer steps keep their rows too
        mini_batch = math.gcd(mini_batch, config.critic.ppo_mini_batch_size)
        shuffles = shuffles or config.critic.shuffle
    steps = max(len(sizes) // (mini_batch * config.actor_rollout_ref.rollout.n), 1)
    if len(sizes) % (ranks * steps):
        return None  # verl refuses such a batch, or cuts it in its own way
    scattered = steps > 1 and regroup == "exact"
    if scattered and shuffles:
        _warn_once("verl shuffles the rows of each rank over the optimizer steps, so rows are not moved")
        return None
    order = regrouped_order(sizes, ranks, steps, across_steps=regroup == "group")
    if scattered and _splits_groups(order, sizes, ranks, steps):
        _warn_once(
            f"verl cuts a training batch into {steps} optimizer steps by length, so rows of one prompt stand in several "
            "of them and share less"
        )
    return order


def _balance(order: Sequence[int], sizes: Sequence[RowSize], ranks: int, prefix: str) -> dict[str, int]:
    """verl's figures of how even the ranks' shares are, of the new order: row tokens, as verl counts them."""
    tokens = torch.tensor([sizes[i].prompt + sizes[i].response for i in order]).view(ranks, -1).sum(1).tolist()
    return {f"{prefix}/balanced_min": min(tokens), f"{prefix}/balanced_max": max(tokens)}


def _splits_groups(order: Sequence[int], sizes: Sequence[RowSize], ranks: int, steps: int) -> bool:
    """Whether some group's rows stand in several optimizer steps."""
    share = len(order) // (ranks * steps)
    step_of: dict[Hashable, set[int]] = {}
    for place, row in enumerate(order):
        step_of.setdefault(sizes[row].group, set()).add(place // share % steps)
    return any(len(found) > 1 for found in step_of.values())


@functools.cache
def _warn_once(what: str) -> None:
    logger.warning(
        "prefix grouper: %s; actor_rollout_ref.actor.fsdp_config.prefix_grouper.regroup=group brings every group "
        "together, at the price of other rows in an optimizer step than without sharing",
        what,
    )


def _restore_names(metrics: dict[str, Any]) -> None:
    """``actor/prefix_grouper/...``, as verl files what its actor reports, to ``prefix_grouper/...``."""
    for name in [name for name in metrics if name.startswith(f"actor/{_PREFIX}")]:
        metrics[name.removeprefix("actor/")] = metrics.pop(name)
