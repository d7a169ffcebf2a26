"""The option ``prefix_grouper_verify``: a real micro-batch on the stock path and on the shared one, before it is trained on.

The trainer's own ``compute_loss`` runs for each path, so that log-probs, loss and gradients are those of this run, whatever
class computes them. What it leaves behind (metrics, counters, random states, gradients) is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from prefix_grouper_plugins.metrics import SharingMeter
from prefix_grouper_plugins.modeling.self_check.gradients import local_gradients
from prefix_grouper_plugins.modeling.self_check.isolation import plain_attributes, restore_attributes
from prefix_grouper_plugins.modeling.self_check.micro_batch import Backward, Path, Scored, compare_micro_batch
from prefix_grouper_plugins.modeling.self_check.schedule import Schedule

Scores = tuple[Tensor | None, ...]  # as TRL's method returns them

_SYNC_OF_FSDP2 = "set_requires_gradient_sync"
_ORDINARY = "the stock half of the verification"


class Verification:
    """Compares micro-batches of the update on both paths.

    Args:
        trainer: a trainer with :class:`PrefixGrouperMixin`.
        when: the option's value.

    Attributes:
        runs (`bool`): whether a comparison is running, whose forwards are not those of the training.
        leaks (`bool`): whether packed forwards are to leak one key: the negative control.
        score_reused: scores rows as the update does where micro-batches share forwards; None where each has its own.
    """

    def __init__(self, trainer: Any, when: str) -> None:
        self._trainer, self._schedule = trainer, Schedule(when)
        self.runs = self.leaks = False
        self.score_reused: Callable[..., Any] | None = None
        self._scored: list[tuple[Tensor, Tensor]] = []
        self._has_leaked = self._out_of_memory = False

    def is_due(self) -> bool:
        """Whether the micro-batch that comes is to be verified: the first one of an optimizer step. Equal on all processes."""
        if self.runs or not self._schedule.is_on or self._trainer.gate.reason is not None:
            return False
        return self._schedule.is_due(self._trainer.state.global_step)

    def run(self, model: Any, loss_of: Callable[[Any], Tensor]) -> None:
        """Compare a micro-batch, and refuse to share where its paths differ. A collective.

        Args:
            model: as it is trained.
            loss_of: the loss of the micro-batch by a model, which scores its rows by the trainer's method.

        Raises:
            UnsupportedModelError: they differ by more than rounding explains, and ``on_unsupported`` is ``"error"``.
        """
        trainer, device = self._trainer, self._trainer.accelerator.device
        shared = {"packed": self._path(loss_of)}
        if trainer._reuse.reuses_prompts(trainer.model):
            shared["prompts reused"] = self._path(loss_of, score_reused=trainer._reuse.score_apart)
        if trainer._reuse.takes_rows_ahead(model):
            shared["rows ahead"] = self._path(loss_of, score_reused=trainer._reuse.score_with_rows_ahead)
        scaler = getattr(trainer.accelerator, "scaler", None)
        with self._unseen() as meter:
            result = compare_micro_batch(
                model,
                self._path(loss_of, ordinary=True),
                shared,
                device,
                leaking=self._path(loss_of, leaks=True),
                backward=_backward_of(trainer, model),
                scale=1.0 if scaler is None else scaler.get_scale(),
            )
        if not self._has_leaked:
            result = replace(result, leak=None)
        what = f"the first micro-batch of optimizer step {trainer.state.global_step}"
        if trainer.gate.verified(result, what, device, shared=meter.packed > 0):
            self._schedule.done()

    def score(self, score: Callable[[], Scores], without_rows: Callable[[], Scores], mask: Tensor) -> Scores:
        """What ``score`` returns, kept for the comparison; where memory does not suffice, zeros from then on.

        Processes go on together that way: the loss has collectives after its forward.

        Args:
            score: of the rows of a call: log-probs ``[B, C]`` and what comes with them.
            without_rows: zeros of the same shapes and dtypes.
            mask: ``[B, C]``, 1 where a token counts.
        """
        try:
            if self._out_of_memory:
                raise torch.OutOfMemoryError
            found = score()
        except torch.OutOfMemoryError:
            self._out_of_memory = True
            found = without_rows()
        assert found[0] is not None
        self._scored.append((found[0], mask))
        return found

    def leaked(self) -> None:
        """A packed forward has leaked a key."""
        self._has_leaked = True

    def _path(
        self,
        loss_of: Callable[[Any], Tensor],
        *,
        ordinary: bool = False,
        score_reused: Callable[..., Any] | None = None,
        leaks: bool = False,
    ) -> Path:
        trainer = self._trainer

        def path(model: Any) -> Scored:
            self._scored, self.score_reused, self.leaks, reason = [], score_reused, leaks, trainer.gate.reason
            if ordinary:
                trainer.gate.reason = _ORDINARY
            try:
                with _attributes_kept(trainer):
                    loss = loss_of(model)
            finally:
                self.score_reused, self.leaks = None, False
                if ordinary:
                    trainer.gate.reason = reason
            scored, self._scored = self._scored, []
            if self._out_of_memory:
                raise torch.OutOfMemoryError
            return Scored([values for values, _ in scored], [mask for _, mask in scored], loss)

        return path

    @contextmanager
    def _unseen(self) -> Iterator[SharingMeter]:
        """Forwards in here are counted apart, and none of them reuses a prompt that is open."""
        trainer, meter = self._trainer, SharingMeter(warn=False)
        with ExitStack() as stack:
            stack.callback(setattr, trainer, "sharing", trainer.sharing)
            stack.enter_context(trainer._reuse.paused())
            trainer.sharing, self.runs = meter, True
            self._has_leaked = self._out_of_memory = False
            stack.callback(setattr, self, "runs", False)
            yield meter


@contextmanager
def _attributes_kept(trainer: Any) -> Iterator[None]:
    """Afterwards metrics, counters and the like of ``trainer`` are as before."""
    before, metrics = plain_attributes(trainer), copy.deepcopy(trainer._metrics)
    try:
        yield
    finally:
        restore_attributes(trainer, before)
        for mode, values in metrics.items():  # dicts inside of a dict
            trainer._metrics[mode].clear()
            trainer._metrics[mode].update(values)


def _backward_of(trainer: Any, model: Any) -> Backward | None:
    """How the gradients of sharded parameters are had; None where ``torch.autograd.grad`` gives them, or nothing does.

    At the first micro-batch of an optimizer step nothing has been accumulated that this could disturb.
    """
    if trainer.accelerator.distributed_type != DistributedType.FSDP or not hasattr(model, _SYNC_OF_FSDP2):
        return None

    def backward(loss: Tensor) -> dict[str, Tensor]:
        set_sync = getattr(model, _SYNC_OF_FSDP2)
        set_sync(True)
        try:
            loss.backward()
            return local_gradients(model)
        finally:
            model.zero_grad(set_to_none=True)
            set_sync(trainer.accelerator.sync_gradients)

    return backward
