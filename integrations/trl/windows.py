"""Which micro-batches of a generation batch certainly lie in one optimizer step.

TRL counts micro-batches (``_step``) on through all trainings of a trainer, and generates by that count. Trainer begins to count those of
an optimizer step anew with each epoch. So steps begin at multiples of what both have in common, until a training stops inside a step,
by an exception or a callback, and the next one goes on: then they begin that many micro-batches later.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any


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
        offset: the number of a micro-batch with which optimizer steps begin, modulo :attr:`size`.
        is_inside: whether an optimizer step has begun and has not ended.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.offset, self.is_inside = 0, False

    @property
    def size(self) -> int:
        """Consecutive micro-batches that certainly lie in one optimizer step, if the first of them is one with which steps begin."""
        args = self._trainer.args
        return math.gcd(args.gradient_accumulation_steps, args.steps_per_generation)

    def all(self) -> list[range]:
        """Those of a generation batch."""
        return windows(self._trainer.args.steps_per_generation, self.size, self.offset)

    def of(self, number: int) -> range:
        """The one that holds a micro-batch, by its number in the generation batch."""
        size = self.size
        start = number - (number - self.offset) % size
        return range(max(start, 0), min(start + size, self._trainer.args.steps_per_generation))

    def begin_step(self) -> bool:
        """An optimizer step begins with the next micro-batch. Whether windows are others than before."""
        before, self.is_inside = self.offset, True
        self.offset = self._trainer._step % self.size
        return self.offset != before

    def end_step(self) -> None:
        self.is_inside = False
