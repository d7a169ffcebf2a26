"""Hooks in verl's workers: the config that they start from, their order of rows, and FLOPs of what was forwarded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from omegaconf import open_dict
from tensordict import TensorDict
from torch.utils.data import Sampler
from verl.utils import tensordict_utils as tu

from prefix_grouper_plugins.integrations.verl.config import adopt
from prefix_grouper_plugins.integrations.verl.losses import why_rows_stay
from prefix_grouper_plugins.integrations.verl.micro_batch import mend_positions, row_sizes
from prefix_grouper_plugins.integrations.verl.switch import ASK_WORKERS, STRATEGY
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.micro_batches import rows_by_group


class ForwardedFlops:
    """verl's FLOPs counter, which counts every copy of a prompt, corrected by what the engine forwarded.

    verl's estimate is ``a * tokens + b * (sum of squared row lengths)`` for a model; two probes tell ``a`` and ``b``.
    """

    def __init__(self, counter: Any, engine: Any) -> None:
        self._counter, self._engine = counter, engine

    def estimate_flops(self, batch_seqlens: list[int], delta_time: float, **kwargs: Any) -> tuple[float, float]:
        """As verl's: estimated TFLOPS, and those that the device promises."""
        estimated, promised = self._counter.estimate_flops(batch_seqlens, delta_time, **kwargs)
        return estimated * self._share(self._engine.forwarded), promised

    def _share(self, forwarded: Counts) -> float:
        one, two = (self._counter.estimate_flops([length], 1.0)[0] for length in (1, 2))
        by_square = (two - 2 * one) / 2
        by_token = one - by_square
        rows = by_token * forwarded.row_tokens + by_square * forwarded.row_squares
        return (by_token * forwarded.tokens_forwarded + by_square * forwarded.squares) / rows if rows else 1.0


class WholeGroups(Sampler[int]):
    """Rows group by group, the groups in a new random order at each iteration.

    For :class:`torch.utils.data.DataLoader` in place of its shuffle, which would scatter groups over optimizer steps.

    Args:
        groups: rows of each group.
        generator: draws the orders.
    """

    def __init__(self, groups: Sequence[Sequence[int]], generator: torch.Generator) -> None:
        self._groups, self._generator = groups, generator

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __iter__(self) -> Iterator[int]:
        for group in torch.randperm(len(self._groups), generator=self._generator).tolist():
            yield from self._groups[group]


def install(module: ModuleType) -> None:
    """Hook into ``verl.workers.engine_workers``."""
    _adopt_config_first(module.ActorRolloutRefWorker)
    _follow_engine(module.TrainingWorker, module)
    _shuffle_whole_groups(module.TrainingWorker)
    _answer_driver(module)


def install_separate(module: ModuleType) -> None:
    """Hook into ``verl.experimental.separation.engine_workers``, which saves and restores weights by the strategy."""
    worker = module.DetachActorWorker
    for name in ("_get_strategy_handlers", "restore_model_from_cpu"):
        setattr(worker, name, _with_strategy_of_sharding(getattr(worker, name)))


def _with_strategy_of_sharding(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a worker that reads the actor's strategy, to tell FSDP2 from FSDP1."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        actor = self.config.actor
        if actor.strategy != STRATEGY:
            return stock(self, *args, **kwargs)
        with open_dict(actor):
            actor.strategy = actor.fsdp_config.prefix_grouper.sharding
            try:
                return stock(self, *args, **kwargs)
            finally:
                actor.strategy = STRATEGY

    return method


def _answer_driver(module: ModuleType) -> None:
    """Let the driver ask the workers of actor and critic whether the losses that they run let rows move."""

    def of_training_worker(self: Any) -> str | None:
        return why_rows_stay(self.loss_fn)

    def of_actor(self: Any) -> str | None:
        return None if self.actor is None else why_rows_stay(self.actor.loss_fn)

    for worker, method in ((module.TrainingWorker, of_training_worker), (module.ActorRolloutRefWorker, of_actor)):
        method.__name__ = ASK_WORKERS
        setattr(worker, ASK_WORKERS, module.register(dispatch_mode=module.Dispatch.ONE_TO_ALL)(method))


def _shuffle_whole_groups(worker: type) -> None:
    """Where verl would shuffle rows over optimizer steps, and rows may change theirs, shuffle groups."""
    stock = worker.train_mini_batch  # type: ignore[attr-defined]

    @functools.wraps(stock)
    def train_mini_batch(self: Any, data: TensorDict) -> Any:
        may_move = getattr(self.engine, "may_change_steps", None)
        if may_move is not None and may_move(self.loss_fn) and "uid" in data:
            loading = dict(tu.get(data, key="dataloader_kwargs", default={}) or {})
            if loading.pop("shuffle", False):
                seed = tu.get(data, key="seed", default=42) + self.engine.get_data_parallel_rank()
                uids = map(str, tu.get(data, "uid"))
                sizes = [replace(size, group=uid) for size, uid in zip(row_sizes(data), uids, strict=True)]
                groups = rows_by_group(sizes, range(len(sizes)))
                loading["sampler"] = WholeGroups(groups, torch.Generator().manual_seed(seed))
                tu.assign_non_tensor(data, dataloader_kwargs=loading)
        return stock(self, data)

    worker.train_mini_batch = train_mini_batch  # type: ignore[attr-defined]


def _adopt_config_first(worker: type) -> None:
    """For programs that do not validate their config with verl's function, where :mod:`.plugin` adopts it."""
    stock = worker.__init__  # type: ignore[misc]

    @functools.wraps(stock)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        adopt(config)
        stock(self, config, *args, **kwargs)

    worker.__init__ = __init__  # type: ignore[misc]


def _follow_engine(worker: type, module: ModuleType) -> None:
    """In workers that run our engine: count what it forwards, and mend positions before rows are selected."""
    stock = worker.__init__  # type: ignore[misc]

    @functools.wraps(stock)
    def __init__(self: Any, config: Any) -> None:
        stock(self, config)
        if not isinstance(getattr(self.engine, "forwarded", None), Counts):
            return
        if self.flops_counter is not None:
            self.flops_counter = ForwardedFlops(self.flops_counter, self.engine)
        module.maybe_fix_3d_position_ids = _mending(module.maybe_fix_3d_position_ids)  # type: ignore[attr-defined]

    worker.__init__ = __init__  # type: ignore[misc]


@functools.cache
def _mending(stock: Callable[[TensorDict], None]) -> Callable[[TensorDict], None]:
    @functools.wraps(stock)
    def maybe_fix_3d_position_ids(data: TensorDict) -> None:
        if "position_ids" in data and "input_ids" in data:
            mend_positions(data)
        stock(data)

    return maybe_fix_3d_position_ids
