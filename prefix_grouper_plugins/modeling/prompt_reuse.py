"""Prompts that stay open between the micro-batches of one optimizer step: which, until when, and alike on every process.

A trainer asks :class:`OpenPrompts` for the cache of each prompt of a micro-batch, and at the end of a step whether every
prompt has got its gradient. Where parameters are sharded (FSDP2), every process has to make the same forwards and backwards
in the same order, and a prompt is one more of both: :class:`MatchedForwards`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins.modeling.prompt_cache import PromptCache, decoder


class OpenPrompts:
    """The prompts that are open, by a key that rows of one prompt have in common."""

    def __init__(self) -> None:
        self._open: dict[Hashable, PromptCache] = {}
        self._closing: list[PromptCache] = []
        self._later: Counter[Hashable] = Counter()

    @property
    def open(self) -> Mapping[Hashable, PromptCache]:
        """Those that later micro-batches hold, by their keys."""
        return self._open

    @property
    def is_unfinished(self) -> bool:
        """Whether some prompt has not got its gradient: it is open, or the backward of its last micro-batch has not come."""
        return bool(self._open) or any(not cache.is_closed for cache in self._closing)

    def expect(self, keys: Iterable[Hashable]) -> None:
        """Say what comes after the micro-batch that is about to run.

        Args:
            keys: of the rows in later micro-batches that can reuse a prompt, in any order; None is left out.
        """
        self._later = Counter(key for key in keys if key is not None)

    def of(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of ``keys``, of the rows of this micro-batch, whose prompts other micro-batches hold too, each once."""
        return [key for key in dict.fromkeys(keys) if key is not None and (key in self._open or self._later[key])]

    def cache(self, key: Hashable) -> PromptCache | None:
        """The cache of the prompt ``key``; None where it has to be forwarded first."""
        return self._open.get(key)

    def begin(self, key: Hashable, cache: PromptCache) -> None:
        """``cache`` has been forwarded, before the rows of this micro-batch that hold the prompt ``key``."""
        self._open[key] = cache

    def is_last(self, key: Hashable) -> bool:
        """Whether this micro-batch is the last one that holds the prompt ``key``."""
        return not self._later[key]

    def keep(self, key: Hashable, cache: PromptCache) -> None:
        """Keep ``cache`` open until the last micro-batch that holds ``key`` has run."""
        if not self.is_last(key):
            self._open[key] = cache
            return
        self._open.pop(key, None)
        if not cache.is_closed:  # without gradients it is, and its memory is needed
            self._closing.append(cache)

    def leave(self, *, step_ends: bool, remedy: str, unfinished: int = 0) -> None:
        """The backward of a micro-batch has run.

        Args:
            step_ends: whether the optimizer steps next, so that no prompt may be open any longer.
            remedy: the end of the message.
            unfinished: other forwards that micro-batches share and that lack their gradient.

        Raises:
            RuntimeError: a gradient would be missing from the optimizer step.
        """
        unfinished += sum(not cache.is_closed for cache in self._closing)
        if step_ends:
            unfinished += len(self._open)
            self._open = {}
        self._closing, self._later = [], Counter()
        if unfinished:
            raise RuntimeError(
                f"{unfinished} forward(s) that micro-batches share have not got their gradient: a micro-batch was not "
                f"scored, or its log-probs do not reach the loss. {remedy}"
            )


class MatchedForwards:
    """Forwards of prompts under FSDP2, as many on every process, in one order.

    Where another process forwards a prompt and this one does not, this one forwards a single token, whose backward sends
    zeros. Its backward comes in the micro-batch in which that of the other's prompt does: FSDP2 gathers the next layer's
    parameters ahead by the order of the forwards, so the order has to be the same too.

    Args:
        model: the root of the sharded model.
        ends: for each micro-batch, when the prompts that some process forwards in it close, as numbers of micro-batches;
            the same on every process. A number comes as often as the process has such prompts that has most.
        device: of token ids.
    """

    def __init__(self, model: nn.Module, ends: Sequence[Collection[int]], device: torch.device) -> None:
        self._model, self._device = model, device
        self._ends = [sorted(of_one) for of_one in ends]
        self._closing: dict[int, list[PromptCache]] = {}
        self._is_deferred = False

    def forward(
        self, number: int, own: Sequence[tuple[int, Callable[[], PromptCache]]]
    ) -> tuple[list[PromptCache], int]:
        """The forwards of prompts that come before that of micro-batch ``number``.

        Args:
            number: of the micro-batch.
            own: for each prompt that this process forwards here, when it closes, one of ``ends[number]``, and what forwards
                it. Those that close first come first.

        Returns:
            this process's prompts, and how many single tokens were forwarded for those of others.
        """
        found, added, left = [], 0, list(own)
        for end in self._ends[number]:
            if left and left[0][0] == end:
                cache = left.pop(0)[1]()
                found.append(cache)
            else:
                cache, added = PromptCache.of_one_token(self._model, self._device), added + 1
            self._closing.setdefault(end, []).append(cache)
        assert not left
        return found, added

    def closes(self, number: int) -> bool:
        """Whether prompts close in micro-batch ``number`` on any process."""
        return number in self._closing

    def attach(
        self, number: int, values: Sequence[Tensor], *, synchronizes: bool, first: Tensor | None = None
    ) -> Sequence[Tensor]:
        """``values``, computed in micro-batch ``number``, whose backward runs through the prompts that close in it.

        Args:
            number: of the micro-batch.
            values: those that may enter the loss.
            synchronizes: see :meth:`defer`, which is called if so and several backwards reach the layers.
            first: of ``values``, what the first of several forwards has computed.
        """
        closing = self._closing.pop(number, [])
        if closing:  # what was forwarded first comes last
            closing[0].when_reached(self._synchronize)
        elif first is not None and first.requires_grad:
            first.register_hook(lambda _: self._synchronize())
        if synchronizes and (closing or first is not None):
            self.defer()
        for cache in closing:
            values = cache.attach(*values)
        return values

    def defer(self) -> None:
        """Gradients of layers are reduced over the processes in the backward that comes, after which the optimizer steps.

        They are so once, in the last backward that reaches a layer, as without reuse.
        """
        self._is_deferred = True
        self._synchronize_layers(False)

    def forget(self) -> None:
        """The backward that was to come does not: a training was stopped."""
        self._closing = {}
        self._synchronize()

    def _synchronize(self) -> None:
        if self._is_deferred:
            self._is_deferred = False
            self._synchronize_layers(True)

    def _synchronize_layers(self, synchronizes: bool) -> None:
        """Of decoder layers alone, which every backward reaches: a head, say, is not part of a prompt's."""
        for module in decoder(self._model).modules():
            if isinstance(module, FSDPModule) and isinstance(module, GradientCheckpointingLayer):
                module.set_requires_gradient_sync(synchronizes, recurse=False)


def matched_ends(ends: Sequence[Sequence[int]]) -> list[set[int]]:
    """For :class:`MatchedForwards`, from what each process has.

    Args:
        ends: for each process and micro-batch, when the prompt that it forwards there closes; -1 where it forwards none.
    """
    return [{end for end in of_all if end >= 0} for of_all in zip(*ends, strict=True)]
