"""Which micro-batches of a generation batch certainly lie in one optimizer step.

TRL counts micro-batches (``_step``) on through all trainings of a trainer, and generates by that count. Trainer counts those of an
epoch, and steps after each multiple of ``gradient_accumulation_steps``. Where a training stops inside a step, by an exception or a
callback, and the next one goes on, the two counts part: steps then begin that many micro-batches later in the generation batch.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any


def window_size(args: Any) -> int:
    """Consecutive micro-batches that certainly lie in one optimizer step, if the first of them is one with which steps begin."""
    return math.gcd(args.gradient_accumulation_steps, args.steps_per_generation)


def windows(count: int, size: int, offset: int = 0) -> list[range]:
    """All micro-batches of a generation batch by their numbers, cut where optimizer steps may begin.

    Args:
        count: micro-batches of the generation batch.
        size: of a window, a divisor of ``count``; the first and the last are smaller where ``offset`` is none of its multiples.
        offset: the number of a micro-batch with which a window begins.
    """
    starts = sorted({0, *range(offset % size, count, size)})
    return [range(start, end) for start, end in pairwise([*starts, count])]


class StepWindows:
    """The windows of a trainer, as its optimizer steps begin.

    Args:
        trainer: a ``GRPOTrainer``.

    Attributes:
        is_inside: whether an optimizer step has begun in this training and has not ended.
        was_stopped: whether one had in the training before, and no micro-batch of this one has come yet.
        keeps_gradients: whether micro-batches have run since the last one in which gradients were reduced over processes.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._epoch_began = 0  # in TRL's count
        self.is_inside = self.was_stopped = self.keeps_gradients = False

    @property
    def size(self) -> int:
        """See :func:`window_size`."""
        return window_size(self._trainer.args)

    @property
    def offset(self) -> int:
        """The number of a micro-batch with which optimizer steps begin, modulo :attr:`size`."""
        return self._epoch_began % self.size

    def all(self) -> list[range]:
        """Those of a generation batch."""
        return windows(self._trainer.args.steps_per_generation, self.size, self.offset)

    def of(self, number: int) -> range:
        """The one that holds a micro-batch, by its number in the generation batch."""
        return next(window for window in self.all() if number in window)

    def begin_training(self) -> None:
        self.was_stopped, self.is_inside = self.was_stopped or self.is_inside, False

    def begin_epoch(self) -> None:
        self._epoch_began = self._trainer._step

    def begin_step(self) -> None:
        """An optimizer step begins with the next micro-batch, as far as Trainer says so."""
        self.is_inside, now = True, self._trainer._step
        if (now - self._epoch_began) % self._trainer.args.gradient_accumulation_steps:  # it has skipped some, to resume
            self._epoch_began = now

    def end_step(self) -> None:
        self.is_inside = False
