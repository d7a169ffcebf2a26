"""Watches a training run: says that sharing is on, adds the counts of all processes up, and sees whether updates share.

TRL calls a callback on every process at the same points, so the collectives in here line up.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from prefix_grouper_plugins.integrations.trl.losses import SCORING, own_code, who_stands_in_front
from prefix_grouper_plugins.metrics import Counts, SharingCounts
from prefix_grouper_plugins.token_budget import remark_on_ordinary


class SharingWatch(TrainerCallback):
    """One for each trainer that shares.

    Args:
        trainer: the trainer.
        ours: the class that shares its forwards.
    """

    def __init__(self, trainer: Any, ours: type) -> None:
        self._trainer, self._ours = trainer, ours
        self._seen_update = False
        self._of_step = SharingCounts()  # of micro-batches that have ended; an evaluation may come before the next

    def end_micro_batch(self) -> None:
        """A micro-batch of the update has got its gradient."""
        self._of_step += self._trainer.sharing.take()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what will be shared, by the settings that hold now: they may have changed since the trainer was built."""
        trainer = self._trainer
        trainer.begin_training()
        self._of_step = SharingCounts()
        trainer.sharing.take()
        if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
            trainer.gate.warn(
                f"no parameter of {type(trainer.accelerator.unwrap_model(trainer.model)).__name__} requires a gradient, so "
                "training changes nothing: load the adapter with is_trainable=True, or unfreeze what should learn"
            )
        if trainer.gate.reason is not None:
            return
        limits = trainer.warn_of_limits()
        line = trainer.gate.announce(trainer.expected_sharing(), limits)
        state.log_history.append({"prefix_grouper": line, "epoch": state.epoch or 0.0, "step": state.global_step})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last one may have ended inside an optimizer step. After the last one of all the step is left out."""
        self._trainer.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        self._trainer.step_windows.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No gradient may be missing."""
        self._trainer.check_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        trainer, counts = self._trainer, self._of_step
        self._of_step = SharingCounts()
        trainer.step_windows.end_step()
        counts += trainer.sharing.take()  # of micro-batches whose training_step is not ours
        if not counts.update.forwards:
            trainer.sharing.count_fallback(trainer.gate.reason or self._why_update_is_not_shared())
            counts += trainer.sharing.take()
        update = self._log("train", counts)
        if not self._seen_update and (remark := self._what_is_not_shared(update)) and not trainer.limits():
            trainer.gate.warn(remark)
        self._seen_update = True

    @staticmethod
    def _what_is_not_shared(update: Counts) -> str | None:
        """What to say where settings do not limit the sharing, of the first update, as counted on all processes."""
        if (remark := remark_on_ordinary(update.ordinary, update.forwards)) is not None:
            return remark
        if update.packed and update.rows_per_group == 1.0:
            return (
                "no two rows of a micro-batch had equal prompts in the first update, so only what rows begin alike with was "
                f"shared there ({update.token_ratio:.0%} of the tokens were forwarded): rows share a whole prompt if its "
                "token ids and their padding are equal"
            )
        return None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each batch of an evaluation."""
        self._log("eval", self._trainer.sharing.take())

    def _log(self, mode: str, counts: SharingCounts) -> Counts:
        """Put what all processes have counted into TRL's own metrics, which reach every logger and the progress bar.

        Args:
            mode: ``"train"`` or ``"eval"``.
            counts: of this process.

        Returns:
            the counts of the update.
        """
        trainer = self._trainer
        counts = counts.summed(trainer.accelerator.device)
        trainer.sharing.warn_of(counts)
        for name, value in counts.metrics(share=True).items():
            trainer._metrics[mode][name].append(value)
        return counts.update

    def _why_update_is_not_shared(self) -> str:
        """Why an optimizer step has gone past the shared forward."""
        trainer = self._trainer
        if (owner := who_stands_in_front(trainer, self._ours, SCORING)) is not None:
            return (
                f"{owner} replaces {SCORING} and does not call the shared one: call super().{SCORING}(...), or do not set the "
                "method on the trainer"
            )
        loss = (
            own_code(trainer, "_compute_loss") or own_code(trainer, "compute_loss") or "something in the training step"
        )
        return f"{loss} forwards the model by itself: take log-probs from self.{SCORING}(...), which shares prompts"
