"""Log-probs of several micro-batches from one forward, handed out to one micro-batch after the other.

A trainer computes a loss and runs a backward for each micro-batch. Each gets its log-probs as a leaf, whose gradient is
all that its backward computes. The log-probs of the last one hang on the forward, and its backward hands the gradients of
all of them on. So the forward has one backward, in which every row has the gradient of its own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _LastOfAll(torch.autograd.Function):
    """The rows ``own`` of ``scores``. The backward adds what the leaves of the other rows have got."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, own: slice, leaves: Sequence[tuple[slice, Tensor]], reached: Callable[[], None]
    ) -> Tensor:
        ctx.shape, ctx.own, ctx.leaves, ctx.reached, ctx.has_run = scores.shape, own, leaves, reached, False
        return scores[own].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.has_run:
            raise RuntimeError(
                "a second backward goes through rows that were forwarded with those of other micro-batches, which would count those "
                "twice: run one backward for each micro-batch, or set prefix_grouper_regroup='none'"
            )
        ctx.has_run = True
        total = gradient.new_zeros(ctx.shape)
        total[ctx.own] = gradient
        for rows, leaf in ctx.leaves:
            if leaf.grad is not None:
                total[rows] = leaf.grad
        ctx.reached()
        return total, None, None, None


class ScoresAhead:
    """Scores of the rows of several micro-batches.

    Args:
        logps: ``[B, C]``, from one forward.
        entropies: ``[B, C]`` or None. They take no part in the loss.
        sizes: rows of each micro-batch, ``B`` in all.
    """

    def __init__(self, logps: Tensor, entropies: Tensor | None, sizes: Sequence[int]) -> None:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._left = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._logps, self._entropies = logps, None if entropies is None else entropies.detach()
        self._leaves: list[tuple[slice, Tensor]] = []
        self._is_closed = not logps.requires_grad

    @property
    def num_left(self) -> int:
        """Micro-batches that have not got their scores."""
        return len(self._left)

    @property
    def is_closed(self) -> bool:
        """Whether the gradients of all micro-batches have been handed on, or there are none."""
        return self._is_closed

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` micro-batches, whose losses have not asked for scores: their rows get no gradient."""
        del self._left[:count]

    def take(self, *, last: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies of the next micro-batch.

        Args:
            last: whether no other comes after it, though there are scores for more: these get no gradient.
        """
        rows = self._left.pop(0)
        if last:
            self._left = []
        entropies = None if self._entropies is None else self._entropies[rows]
        if not self._logps.requires_grad:
            return self._logps[rows], entropies
        if self._left:
            leaf = self._logps[rows].detach().clone().requires_grad_()
            self._leaves.append((rows, leaf))
            return leaf, entropies
        return _LastOfAll.apply(self._logps, rows, self._leaves, self._close), entropies  # type: ignore[return-value]

    def _close(self) -> None:
        self._is_closed = True
