"""GRPO and RLOO trainers of TRL that forward each prompt of a micro-batch once.

One method of the stock trainer is overridden, that which runs the model (``_get_per_token_logps_and_entropies``: old-policy,
reference and policy passes all go through it, see :mod:`.forward`), and where TRL keeps its micro-batches
(``_buffered_inputs``) rows of one prompt are brought together again, see :mod:`.regroup`. Rewards, losses, clipping, KL, entropy,
vLLM, metrics and checkpoints are TRL's own. :mod:`.losses` says what is known of the loss, :mod:`.watch` looks at
what the run does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from prefix_grouper_plugins.batch import why_not_padded
from prefix_grouper_plugins.integrations.trl.checkpoints import check_checkpoint
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows, Scores, ScoringCall
from prefix_grouper_plugins.integrations.trl.generation import SharedGeneration
from prefix_grouper_plugins.integrations.trl.images import DummyImageRow
from prefix_grouper_plugins.integrations.trl.images import why_not_share as why_not_share_images
from prefix_grouper_plugins.integrations.trl.losses import (
    PARTS_OF_SCORING,
    SCORING,
    own_code,
    what_padding_changes,
    who_stands_in_front,
    why_rows_stay,
)
from prefix_grouper_plugins.integrations.trl.mixins import (
    SHARDED,
    is_reference,
    must_come_before_trainers,
    option,
    show_signature,
)
from prefix_grouper_plugins.integrations.trl.regroup import MicroBatch, Regrouped, regroup, regrouped_window
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse
from prefix_grouper_plugins.integrations.trl.sharded_reuse import ShardedReuse, is_fsdp2
from prefix_grouper_plugins.integrations.trl.verify import Verification
from prefix_grouper_plugins.integrations.trl.watch import SharingWatch
from prefix_grouper_plugins.integrations.trl.windows import StepWindows, windows
from prefix_grouper_plugins.metrics import OLD_LOG_PROB, REF_LOG_PROB, UPDATE, Counts
from prefix_grouper_plugins.modeling import row_limit, transformers_model, why_not_enabled, without_prefix_grouper
from prefix_grouper_plugins.sharing import SharingGate


class PrefixGrouperMixin:
    """Put before :class:`trl.GRPOTrainer`, :class:`trl.RLOOTrainer` or a subclass of theirs.

    Settings are the fields of
    :class:`~prefix_grouper_plugins.integrations.trl.config.PrefixGrouperArguments`; with a stock config their defaults
    hold.

    Attributes:
        gate (`SharingGate`): whether forwards are shared, and why not.
        sharing (`SharingMeter`): counts of all forwards so far, on this process.
        loss_is_sum_over_rows (`bool`): set it to True on a class with a loss of its own whose gradient does not depend on
            which rows are in one micro-batch. Until then ``prefix_grouper_regroup='exact'`` leaves its rows where TRL
            puts them.

    Raises:
        UnsupportedModelError: on construction, when the model or a setting cannot be shared exactly and
            ``prefix_grouper_on_unsupported`` is ``error``.
        ValueError: when a class is made, the mixin comes after the trainer that it should change.
    """

    # Of the trainer that comes after it among the bases.
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    num_generations: int
    add_callback: Callable[..., None]
    _metrics: Any
    _step: int
    _regrouped_inputs: list[MicroBatch] | None = None

    built = 0  # trainers made in this process; the launcher warns when a script made none
    loss_is_sum_over_rows = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        must_come_before_trainers(PrefixGrouperMixin, cls)
        show_signature(PrefixGrouperMixin, cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PrefixGrouperMixin.built += 1
        self.gate = SharingGate(
            backend=self._option("prefix_grouper_backend"),
            self_check=self._option("prefix_grouper_self_check"),
            on_unsupported=self._option("prefix_grouper_on_unsupported"),
            refusal=self._refusal,
            is_main=self.accelerator.is_main_process,
        )
        self.sharing = self.gate.meter
        self._shares = bool(self._option("use_prefix_grouper"))
        self.verification = Verification(self, self._option("prefix_grouper_verify"))
        self._packed_forward = PackedForward(self)
        self.step_windows = StepWindows(self)
        self._reuse = (ShardedReuse if is_fsdp2(self.accelerator) else PromptReuse)(self, self._packed_forward)
        self.dummy_image_row = DummyImageRow(
            enabled=self.accelerator.num_processes > 1, warn=self.accelerator.is_main_process
        )
        self.generation = SharedGeneration(warn=self.accelerator.is_main_process)
        self._divisor: int | None = None  # of the loss of the last micro-batch
        self._makes_inputs = False  # the old-policy and reference passes run while TRL makes the inputs of the update
        self._row_limits: dict[Any, tuple[int, str] | None] = {}  # what enabling fixed, so it stays
        self._watch = SharingWatch(self, PrefixGrouperMixin)
        if self._shares:
            self._enable_models()
            self.add_callback(self._watch)

    def _option(self, name: str) -> Any:
        return option(self.args, name)

    @property
    def min_level(self) -> int | None:
        """Tokens of the shortest level of completions that is shared; None where prompts are shared alone."""
        return self.gate.min_level(self._option("prefix_grouper_share"), self.accelerator.device.type)

    # ------------------------------------------------------------------------------------------------ before training

    def _refusal(self, reasons: str) -> str:
        return (
            f"prefix grouper cannot run {type(self.model).__name__} exactly: {reasons}. Change that, or set "
            "prefix_grouper_on_unsupported='fallback' to train on the stock path"
        )

    def _enable_models(self) -> None:
        models = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        self.gate.enable(models, why_not_share_settings(self), left_padding=True)
        for model in models:
            if self.gate.needs_self_check(model) and self.accelerator.distributed_type not in SHARDED:
                self._self_check(model)
        if self.gate.reason is None:
            self.warn_of_limits()

    def _self_check(self, model: Any) -> None:
        """Every process calls it at the same point."""
        with self.accelerator.autocast():
            self.gate.self_check(model, self.accelerator.device)

    def warn_of_limits(self) -> list[str]:
        """Warn of what keeps rows from sharing or results from being equal, each once; return it."""
        limits = [*self.gate.reports[0].notes, *self.limits()]
        if (padding := what_padding_changes(self)) is not None:
            limits.append(padding)
        if (owner := who_stands_in_front(self, PrefixGrouperMixin, SCORING)) is not None:
            limits.insert(0, f"{owner} overrides {SCORING}, so only what it hands on to super() is shared")
        self.gate.warn(*limits)
        return limits

    def limits(self) -> list[str]:
        """What keeps rows of a prompt from meeting in one micro-batch, with the remedy."""
        rows, group, slices = (
            self.args.per_device_train_batch_size,
            self.num_generations,
            self.args.steps_per_generation,
        )
        if rows < group:
            if (why := self._reuse.why_not(self.model)) is None:
                return []
            if self._reuse.why_not_ahead(self.model) is None:
                shared = f"only those rows share a prompt that fit into {self._reuse.bound(rows)}"
            else:
                shared = (
                    "nothing is shared in the update" if rows == 1 else f"only {rows} of {group} rows share a prompt"
                )
            return [
                f"per_device_train_batch_size={rows} is smaller than num_generations={group}, so {shared} ({why}): raise it "
                f"to {group} and lower gradient_accumulation_steps"
            ]
        scattered = slices > 1 and self._window() < slices and rows * slices > group
        if scattered and self._option("prefix_grouper_regroup") == "none":
            return [
                f"rows of a prompt stay scattered over the {slices} micro-batches of a generation batch, as "
                "prefix_grouper_regroup='none' asks for"
            ]
        if scattered:
            return [
                f"rows of a prompt stay scattered over the {slices} micro-batches of a generation batch "
                f"({self._why_scattered()}): prefix_grouper_regroup='group' moves them anyway"
            ]
        return []

    def _why_scattered(self) -> str:
        if (why := why_rows_stay(self)) is not None:
            return why
        return (
            f"steps_per_generation={self.args.steps_per_generation} goes beyond "
            f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}, and rows keep their optimizer step"
        )

    def expected_sharing(self) -> str:
        """What the sizes of batches let micro-batches of the update share."""
        rows, group = self.args.per_device_train_batch_size, self.num_generations
        window = self._window()
        moved = f"rows are regrouped over {window} micro-batches" if window > 1 else "rows stay in their micro-batch"
        together = (
            f"micro-batches of {rows} rows hold up to {min(rows, group)} of the {group} rows of a prompt, {moved}"
        )
        if rows % group == 0 or self._reuse.why_not(self.model) is not None:
            return together
        return f"{together}, and up to {min(rows * self.step_windows.size, group)} rows reuse one forward of the prompt"

    # -------------------------------------------------------------------------------------------------------- batches

    def _window(self) -> int:
        return regrouped_window(self.args, self._option("prefix_grouper_regroup"), why_rows_stay(self) is None)

    @property
    def _buffered_inputs(self) -> list[MicroBatch] | None:
        """TRL's micro-batches of the present generation batch, regrouped when it puts them here.

        What hands them out comes after (TRL's own ``_prepare_inputs``, and that of a subclass), and TRL's use of the random
        state comes before, so both are as they were.
        """
        return self._regrouped_inputs

    @_buffered_inputs.setter
    def _buffered_inputs(self, micro_batches: list[MicroBatch] | None) -> None:
        if micro_batches is not None and self._shares and self.gate.reason is None:
            before = self._regrouped_inputs
            if self._makes_inputs or not isinstance(before, Regrouped):
                self._exchange_rows(micro_batches, self._windows())
                return
            # A subclass has changed something about the rows, which lie where they lay.
            micro_batches = Regrouped(micro_batches, before.orders)
        self._regrouped_inputs = micro_batches

    def _exchange_rows(self, micro_batches: list[MicroBatch], over: list[range]) -> None:
        """Within each of the windows ``over``."""
        self._regrouped_inputs = regroup(micro_batches, over, self._option("prefix_grouper_share"))
        self.dummy_image_row.choose(self.model, self._regrouped_inputs)

    def _windows(self) -> list[range]:
        """Micro-batches of a generation batch that exchange rows, as optimizer steps begin now."""
        whole = self._option("prefix_grouper_regroup") == "group"
        return windows(self.args.steps_per_generation, self._window(), 0 if whole else self.step_windows.offset)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Stock inputs. Old-policy and reference passes run in here, the update does not."""
        if self.model.training:
            self._move_rows()
            self._check_weights_of_micro_batches()
        self._makes_inputs = True
        try:
            inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        finally:
            self._makes_inputs = False
        if self._shares and self.gate.reason is None and self.model.training and self._buffered_inputs is not None:
            self._reuse.enter(self._buffered_inputs, self._step % self.args.steps_per_generation)
        return inputs

    def begin_training(self) -> None:
        """Nothing is left of a training that was stopped inside an optimizer step.

        Raises:
            RuntimeError: something is, and rows have exchanged places.
        """
        kind, steps = self.accelerator.distributed_type, self.step_windows
        steps.begin_training()
        self._divisor = None
        kept = steps.was_stopped and steps.keeps_gradients and kind in SHARDED
        if kept and isinstance(self._buffered_inputs, Regrouped):
            raise RuntimeError(
                f"{kind.value} keeps the gradients of a training that was stopped inside an optimizer step, and adds them to those "
                "of the next one. They are of other rows than without sharing: load the model anew, or set "
                "prefix_grouper_regroup='none'"
            )
        self._reuse.forget()

    def begin_epoch(self) -> None:
        """
        Raises:
            RuntimeError: the one before was stopped amid micro-batches that belong together, and their gradients remain.
        """
        regrouped, number = self._buffered_inputs, self._step % self.args.steps_per_generation
        is_cut = isinstance(regrouped, Regrouped) and number not in (window.start for window in regrouped.orders)
        if self.step_windows.is_inside and (is_cut or self._reuse.is_open):
            raise RuntimeError(
                "an epoch was stopped inside an optimizer step, whose micro-batches share forwards or have exchanged rows: stop it "
                "between optimizer steps, in on_step_end say, or set prefix_grouper_regroup='none'"
            )
        self.step_windows.begin_epoch()

    def _move_rows(self) -> None:
        """Before a micro-batch: where optimizer steps begin elsewhere than when rows exchanged places, they do so anew.

        That is so when a training goes on that was stopped inside a step, and where settings have changed.

        Raises:
            ValueError: rows would have to come from, or go to, micro-batches that have run.
        """
        was_stopped, self.step_windows.was_stopped = self.step_windows.was_stopped, False
        regrouped, number = self._buffered_inputs, self._step % self.args.steps_per_generation
        if not isinstance(regrouped, Regrouped) or self._option("prefix_grouper_regroup") == "group":
            return
        over = list(regrouped.orders)
        coming = [range(max(window.start, number), window.stop) for window in self._windows() if window.stop > number]
        if not was_stopped and [range(max(w.start, number), w.stop) for w in over if w.stop > number] == coming:
            return
        if not was_stopped and number not in (window.start for window in over):
            reason = why_rows_stay(self) or f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}"
            raise ValueError(
                f"rows were regrouped over {len(over[0])} micro-batches, and may exchange them only over {self._window()} now "
                f"({reason}): change settings when a generation batch ends, or set prefix_grouper_regroup='none'"
            )
        done = [range(window.start, min(window.stop, number)) for window in over if window.start < number]
        self._exchange_rows(regrouped.undone(), [*done, *coming])

    def _check_weights_of_micro_batches(self) -> None:
        """
        Raises:
            ValueError: rows have gone to a micro-batch whose loss Trainer divides by another number than that of the one before.
        """
        regrouped, divisor = self._buffered_inputs, getattr(self, "current_gradient_accumulation_steps", None)
        before, self._divisor = self._divisor, divisor
        if not isinstance(regrouped, Regrouped) or self._option("prefix_grouper_regroup") == "group":
            return
        if before in (None, divisor) or self._step % self.args.steps_per_generation in (
            w.start for w in regrouped.orders
        ):
            return
        raise ValueError(
            f"micro-batches of one optimizer step, which have exchanged rows, would be divided by {before} and by {divisor}, since "
            "gradient_accumulation_steps has changed: change it once in a generation batch, or set prefix_grouper_regroup='none'"
        )

    def check_gradients(self) -> None:
        """
        Raises:
            RuntimeError: micro-batches of this optimizer step share a forward that has not got its gradient.
        """
        self._reuse.check_finished()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Stock training. A checkpoint that was not written to its end is an error that names one that was."""
        check_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stock training step. No optimizer step may follow before each prompt that was shared has its gradient."""
        self.step_windows.keeps_gradients = True
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.step_windows.keeps_gradients = not self.accelerator.sync_gradients
        self._reuse.leave()
        self._watch.end_micro_batch()
        return loss  # type: ignore[no-any-return]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock loss. Before it, with ``prefix_grouper_verify``, the micro-batch is compared on both paths."""
        if self._shares and self.model.training and self.verification.is_due():
            self.verification.run(model, lambda inner: self.compute_loss(inner, dict(inputs), *args, **kwargs))
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Stock generation, each distinct prompt prefilled once.

        With the model's own attention names: paged generation derives others from them.
        """
        with ExitStack() as stack:
            stack.enter_context(without_prefix_grouper(self.model))
            if self._shares and self.gate.reason is None and self._option("prefix_grouper_generation"):
                metrics = self._metrics["train" if self.model.training else "eval"]
                stack.enter_context(self.generation.sharing(self.model, metrics))
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    # -------------------------------------------------------------------------------------------------------- forward

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Log-probs of the last ``logits_to_keep`` tokens of ``input_ids [B, P + C]``, as the stock method gives them."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        call = ScoringCall(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, given)
        if not self.verification.runs:
            return self._scores_with_dummy_image(call)
        return self.verification.score(
            lambda: self._scores_with_dummy_image(call), lambda: self._zeros(call), call.scored_mask
        )

    def _zeros(self, call: ScoringCall) -> tuple[Tensor | None, ...]:
        """:meth:`_scores` of rows whose completions are masked: a forward of one token, which hardly needs memory."""
        (logps, entropies, _), _ = self._packed_forward.nothing_to_score(
            call.model, call.rows, entropy=call.compute_entropy
        )
        return (logps, entropies, logps.sum())[: self._return_arity()]

    def _scores_with_dummy_image(self, call: ScoringCall) -> tuple[Tensor | None, ...]:
        """:meth:`_scores`, with one row more where the vision tower would not run on this process."""
        shares = self._shares and (self.gate.reason is None or self.verification.runs)
        if shares and call.model.training and not self._makes_inputs and self._waits_for_tower(call):
            more = self.dummy_image_row.add_to(
                call.model, call.input_ids, call.attention_mask, call.logits_to_keep, call.given
            )
            if more is not None:
                ids, mask, given = more
                found = self._scores(call._replace(input_ids=ids, attention_mask=mask, batch_size=None, given=given))
                return tuple(None if values is None else values[:-1] for values in found)
        return self._scores(call)

    def _waits_for_tower(self, call: ScoringCall) -> bool:
        """Whether other processes wait in this micro-batch for the vision tower of this one, whose forward is the only one."""
        if self.accelerator.distributed_type in SHARDED:
            return True
        if not self.accelerator.sync_gradients or getattr(call.model, "find_unused_parameters", False):
            return False
        return not self._reuse.is_entered or self._why_not_share(call) is not None  # else `_reuse` sees to it

    def _scores(self, call: ScoringCall) -> tuple[Tensor | None, ...]:
        """:meth:`_get_per_token_logps_and_entropies` of rows with all their images."""
        model = call.model
        if self._shares and self.gate.needs_self_check(model):  # the model was to be sharded first
            self._self_check(model)
        if self._shares:
            with self.accelerator.autocast():  # which is a part of what was checked
                alone = self.accelerator.distributed_type not in SHARDED
                self.gate.check_changes(model, self.accelerator.device, alone=alone)
        rows, reason = None, self._why_not_share(call)
        if reason is None:  # masks of the user's own, or fewer tokens scored than the completions have
            rows = call.rows
            reason = why_not_padded(rows.on_host)
        if self._shares and self.gate.needs_first_batch(model):
            self._compare_first_batch(call, shares=reason is None)
            reason = reason or self.gate.reason
        if reason is not None:
            if self._shares:
                self._reuse.stop_sharing(reason, call)
                lengths = call.attention_mask.sum(1).tolist()
                self.sharing.count_fallback(reason, lengths, during=self._pass(model))
            return call.run(super()._get_per_token_logps_and_entropies)  # type: ignore[misc]
        assert rows is not None
        scores = []
        chunks = list(rows.chunks(call.batch_size))
        for chunk, found in zip(chunks, self._reused(call, chunks), strict=True):
            score, counts = self._score_apart(call, chunk) if found is None else found
            for count in counts:
                self.sharing.count_packed(count, during=self._pass(model))
            scores.append(score)
        logps, entropies, router_losses = zip(*scores, strict=True)
        result = (
            torch.cat(logps),
            torch.cat(entropies) if call.compute_entropy else None,
            torch.stack(router_losses).mean() if router_losses[0] is not None else None,
        )
        return result[: self._return_arity()]

    def _score_apart(self, call: ScoringCall, chunk: Rows) -> tuple[Scores, list[Counts]]:
        """Scores of a chunk that shares nothing with others, by the stock method where packing it does not pay.

        A comparison always packs, so that it has something to compare. Either way a process makes one forward.
        """
        model, packed, batch = call.model, self._packed_forward, None
        must_pack = self.verification.runs or call.has_images or call.aux_loss or not chunk.has_completions
        if not must_pack and (batch := packed.batch_worth_packing(model, chunk)) is None:
            self.sharing.count_rows(chunk.attention_mask.sum(1).tolist(), during=self._pass(model))
            ordinary = call._replace(input_ids=chunk.input_ids, attention_mask=chunk.attention_mask, batch_size=None)
            logps, entropies = ordinary.run(super()._get_per_token_logps_and_entropies)[:2]  # type: ignore[misc]
            return (logps, entropies, None), []
        scores, counts = packed.score(model, chunk, entropy=call.compute_entropy, aux_loss=call.aux_loss, batch=batch)
        return scores, [counts]

    def _compare_first_batch(self, call: ScoringCall, shares: bool) -> None:
        """For a model class that no test has compared: run one chunk of a batch on both paths.

        Every process comes here with its first batches, be they those of the old policy or of the update, also where its own
        rows take the stock path.

        Args:
            call: of the batch.
            shares: whether the rows of this process are shared.
        """
        stock = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        call = call._replace(compute_entropy=False)
        size = call.batch_size
        if size is not None and not call.has_images:  # images are not cut so easily: there all chunks are compared
            call = call._replace(input_ids=call.input_ids[:size], attention_mask=call.attention_mask[:size])
        shared: dict[str, Callable[[Any], Tensor]] = {}
        reuses = self._reuse.reuses_prompts_everywhere(call.model, shares)
        if shares:
            shared = self._shared_paths(list(call.rows.chunks(size)), reuses)
        self.gate.first_batch(
            call.model, lambda inner: call._replace(model=inner).run(stock)[0], shared, call.scored_mask
        )

    def _shared_paths(self, chunks: list[Rows], reuses: bool) -> dict[str, Callable[[Any], Tensor]]:
        """The ways in which rows of this trainer are forwarded, by name; each returns log-probs ``[B, C]``."""

        def packed(inner: Any) -> Tensor:
            scores = [self._packed_forward.score(inner, chunk, entropy=False, aux_loss=False)[0] for chunk in chunks]
            return torch.cat([logps for logps, *_ in scores])

        paths: dict[str, Callable[[Any], Tensor]] = {"packed": packed}
        if reuses:
            paths["prompts reused"] = lambda inner: torch.cat(
                [self._reuse.score_apart(inner, chunk, entropy=False)[0] for chunk in chunks]
            )
        return paths

    def _reused(self, call: ScoringCall, chunks: list[Rows]) -> Iterable[tuple[Scores, list[Counts]] | None]:
        """Scores of those ``chunks`` that share a prompt with other chunks or micro-batches; None for the others."""
        model, entropy = call.model, call.compute_entropy
        if call.aux_loss:
            return [None] * len(chunks)
        if (score := self.verification.score_reused) is not None:
            return [(score(model, chunk, entropy=entropy), [Counts(packed=1)]) for chunk in chunks]
        if self._makes_inputs or not self.model.training:
            return self._reuse.score_chunks(model, chunks, entropy=entropy)
        return [self._reuse.score_update(model, chunk, entropy=entropy) for chunk in chunks]

    def _return_arity(self) -> int:
        """3 where the stock method takes ``compute_aux_loss`` and returns the router loss (TRL >= 1.7), else 2."""
        stock = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        return 3 if "compute_aux_loss" in inspect.signature(stock).parameters else 2

    def _pass(self, model: Any) -> str:
        """Which pass a forward of ``model`` belongs to."""
        if not self._makes_inputs:
            return UPDATE
        return REF_LOG_PROB if model is self.ref_model or is_reference(model) else OLD_LOG_PROB

    def _why_not_share(self, call: ScoringCall) -> str | None:
        if not self._shares:
            return "use_prefix_grouper is off"
        if self.gate.reason is not None:
            return self.gate.reason
        if (reason := why_not_enabled(transformers_model(call.model))) is not None:  # a teacher, say
            return reason
        reason = self.why_not_columns(call.model, call.input_ids.shape[1])
        return why_not_share_images(call.model, call.given) if reason is None else reason

    def why_not_columns(self, model: Any, columns: int) -> str | None:
        """Why rows that are padded to ``columns`` are not shared; None if they are."""
        limit = self._row_limit(model)
        if limit is None or columns < limit[0]:  # the stock path numbers padded columns too
            return None
        return f"the rows have {columns} columns, and from {limit[0]} on rope_type {limit[1]!r} changes the angles of the whole batch"

    def _row_limit(self, model: Any) -> tuple[int, str] | None:
        """`row_limit`, which walks all modules, worked out once for each model."""
        base = transformers_model(model)
        if base not in self._row_limits:
            self._row_limits[base] = row_limit(base)
        return self._row_limits[base]


class PrefixGrouperGRPOTrainer(PrefixGrouperMixin, GRPOTrainer):  # type: ignore[misc]
    """:class:`trl.GRPOTrainer` that encodes each prompt of a micro-batch once. Takes the same arguments."""


class PrefixGrouperRLOOTrainer(PrefixGrouperMixin, RLOOTrainer):  # type: ignore[misc]
    """:class:`trl.RLOOTrainer` that encodes each prompt of a micro-batch once. Takes the same arguments."""


def why_not_share_settings(trainer: Any) -> list[str]:
    """Settings and code under which more is computed than TRL's log-probs of real completion tokens."""
    args, reasons = trainer.args, []
    if (scoring := own_code(trainer, SCORING, behind=PrefixGrouperMixin)) is not None:
        reasons.append(
            f"{scoring} is not TRL's own, so what it computes is not known: override it in a subclass of the shared trainer, "
            "where super() is the shared method"
        )
    for name in PARTS_OF_SCORING:
        if hasattr(GRPOTrainer, name) and (part := own_code(trainer, name)) is not None:
            reasons.append(
                f"{part} is not TRL's own, and the shared {SCORING} does not call it: override {SCORING} in a subclass of the "
                "shared trainer, where super() is the shared method"
            )
    if hasattr(GRPOTrainer, "compute_liger_loss") and getattr(args, "use_liger_kernel", False):
        reasons.append("use_liger_kernel computes its loss past the shared forward in TRL < 1.14: upgrade or unset it")
    if getattr(trainer, "loss_type", None) == "luspo" and Version(trl.__version__) < Version("1.10"):
        reasons.append("the luspo loss averages over padding too in TRL < 1.10: upgrade or choose another loss_type")
    if (alpha := getattr(args, "neftune_noise_alpha", None)) is not None:
        reasons.append(
            f"neftune_noise_alpha={alpha} adds noise to embeddings by the length of a forward, which is that of all rows "
            "when they are packed: unset it"
        )
    return reasons
