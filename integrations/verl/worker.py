"""Hooks in verl's workers: the config that they start from, positions of images, and FLOPs of what was forwarded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from omegaconf import open_dict
from tensordict import TensorDict

from prefix_grouper_plugins.integrations.verl.config import adopt
from prefix_grouper_plugins.integrations.verl.micro_batch import mend_positions
from prefix_grouper_plugins.integrations.verl.switch import STRATEGY
from prefix_grouper_plugins.metrics import Counts


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


def install(module: ModuleType) -> None:
    """Hook into ``verl.workers.engine_workers``."""
    _adopt_config_first(module.ActorRolloutRefWorker)
    _follow_engine(module.TrainingWorker, module)


def install_separate(module: ModuleType) -> None:
    """Hook into ``verl.experimental.separation.engine_workers``, which picks its way of saving by the strategy."""
    worker = module.DetachActorWorker
    stock = worker._get_strategy_handlers

    @functools.wraps(stock)
    def _get_strategy_handlers(self: Any) -> Any:
        actor = self.config.actor
        if actor.strategy != STRATEGY:
            return stock(self)
        with open_dict(actor):
            actor.strategy = actor.fsdp_config.prefix_grouper.sharding
            try:
                return stock(self)
            finally:
                actor.strategy = STRATEGY

    worker._get_strategy_handlers = _get_strategy_handlers


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
