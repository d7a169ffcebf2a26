"""The prompt once per optimizer step: micro-batches that hold a piece of a group share one forward of its prompt.

TRL's micro-batches stay as they are, rows, losses, normalisers, metrics and gathers included. The rows of a prompt have
been brought side by side (:mod:`.regroup`), so a group that is larger than a micro-batch lies in consecutive ones. They
share in two ways, and neither holds more tokens than the ``b`` padded rows of a micro-batch in the stock trainer, or than
``prefix_grouper_max_tokens``:

- rows *ahead*: a forward takes the rows of the micro-batches that follow too, as many as fit into that number of tokens,
  and each micro-batch gets its log-probs from it (:class:`~prefix_grouper_plugins.modeling.scores_ahead.ScoresAhead`);
- an *open prompt*: where a group does not fit into one forward, the first one forwards the prompt, each forwards its
  completions against the prompt's keys and values, and the backward of the last one goes on through the prompt
  (:class:`~prefix_grouper_plugins.modeling.prompt_cache.PromptCache`). The prompt's graph is kept until then, or its layers run
  again, where that leaves room for so many more completions in a forward that it costs less.

In passes without gradients (old-policy and reference log-probs) the chunks of a call do the same among themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from prefix_grouper_plugins.batch import Blocks, blocks_on_host, why_not_padded
from prefix_grouper_plugins.integrations.trl.forward import (
    HAS_FUSED_HEAD,
    PackedForward,
    PieceScores,
    Rows,
    Scores,
    ScoringCall,
    joined_blocks,
    joined_scores,
)
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages, given_of, why_not_join
from prefix_grouper_plugins.integrations.trl.last_forward import row_besides, shows_images, unseen
from prefix_grouper_plugins.integrations.trl.losses import owner_of_the_loss, why_rows_stay
from prefix_grouper_plugins.integrations.trl.regroup import MicroBatch, blocks_of
from prefix_grouper_plugins.integrations.trl.row_tokens import tokens_of_rows, tokens_of_unknown, with_levels
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling import is_multimodal, transformers_model
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.model_state import ModelState
from prefix_grouper_plugins.modeling.prompt_reuse import OpenPrompts
from prefix_grouper_plugins.modeling.recomputation import recomputable_layers
from prefix_grouper_plugins.modeling.reuse_conditions import why_not_reuse
from prefix_grouper_plugins.modeling.scores_ahead import ScoresAhead
from prefix_grouper_plugins.token_budget import (
    Most,
    NextForward,
    RowTokens,
    cost_of_forward,
    forwarded_tokens,
    held_tokens,
    next_forward,
)

# Every process makes the same gradient synchronisation in these, however many forwards come before it.
_KINDS = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU}
_REMEDY = "prefix_grouper_regroup='none'"


class PromptReuse:
    """What micro-batches of one optimizer step share: prompts that are open, and scores that were computed ahead.

    Args:
        trainer: a trainer with :class:`PrefixGrouperMixin`.
        forward: runs rows as one packed row.
    """

    def __init__(self, trainer: Any, forward: PackedForward) -> None:
        self._trainer, self._forward = trainer, forward
        self._said_what_is_repeated = self._has_shared = False
        self.forget()

    def forget(self) -> None:
        """Begin anew: a training begins, and Trainer has dropped the gradients of one that was stopped inside an optimizer step."""
        self._prompts = OpenPrompts()
        self._ahead: ScoresAhead | None = None
        self._ahead_end = 0  # the number of the micro-batch behind those of which it has scores
        # The model that forwards which are not finished have run, and the models that later micro-batches have met.
        self._model_state: ModelState | None = None
        self._later_states: list[ModelState] = []
        self._micro_batches: list[MicroBatch] = []  # of the generation batch
        self._on_host: list[Blocks] = []  # their rows
        self._images: list[RowsOfImages] = []
        self._tokens: list[list[RowTokens]] = []
        # The micro-batch that was entered, and those that certainly follow in its optimizer step.
        self._coming = range(0)
        self._paused = range(0)  # the same, while a comparison runs
        # What holds for an optimizer step is asked once in it: whether micro-batches share forwards, and open prompts.
        self._shares: bool | None = None
        self._stays_open: bool | None = None
        self._recomputable: list[nn.Module] | None = None  # layers that may run again in the backward
        self._scored: int | None = None  # the micro-batch, of those, that has got its scores

    def why_not(self, model: Any, *, update: bool = True) -> str | None:
        """Why prompts do not stay open for later micro-batches; None if they do.

        Args:
            model: that is forwarded.
            update: for the update, where rows must be free to change their micro-batch.
        """
        if (reason := self.why_not_ahead(model, update=update)) is not None:
            return reason
        return why_not_reuse(model, self._anatomy(model))

    def why_not_ahead(self, model: Any, *, update: bool = True) -> str | None:
        """Why each micro-batch is forwarded by itself; None if a forward may take several. Arguments of :meth:`why_not`."""
        trainer = self._trainer
        if (reason := self._why_not_of_its_kind(model)) is not None:
            return reason
        if self._needs_towers(model) and self._may_leave_experts_out(model):
            return (
                "DDP may take experts that a dummy image does not meet for unused: set ddp_find_unused_parameters=False"
            )
        if update and trainer._option("prefix_grouper_regroup") == "none":
            return "prefix_grouper_regroup='none' leaves TRL's shuffle alone"
        if update and (reason := why_rows_stay(trainer)) is not None:
            return reason
        if update and self._trainer.step_windows.size == 1:
            sizes = (
                f"{name}={getattr(trainer.args, name)}"
                for name in ("gradient_accumulation_steps", "steps_per_generation")
            )
            return f"{' and '.join(sizes)} have no common factor"
        return None

    def _why_not_of_its_kind(self, model: Any) -> str | None:
        """Why the way in which processes train ``model`` together does not let each make its own forwards."""
        accelerator = self._trainer.accelerator
        kind = accelerator.distributed_type
        # Once accelerate has unwrapped the model for generation, only the compiled forward leads to DDP.
        if accelerator.num_processes > 1 and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            return "torch.compile of accelerate hides DDP, so forwards cannot be kept from synchronising"
        if kind in _KINDS and not isinstance(transformers_model(model), FSDPModule):
            if accelerator.num_processes == 1 or not accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):
                return None
            return (
                "under sync_each_batch=True every process has to make the same number of forwards in each micro-batch"
            )
        name = "FSDP2 past accelerate" if kind in _KINDS else kind.value
        remedy = ", on which they agree under FSDP2 of accelerate" if kind == DistributedType.FSDP else ""
        return f"under {name} every process has to make the same number of forwards{remedy}"

    def reuses_prompts(self, model: Any) -> bool:
        """Whether prompts stay open in the micro-batch of the update that was entered. The same on all processes."""
        return self.why_not(model) is None

    def reuses_prompts_everywhere(self, model: Any, shares: bool) -> bool:
        """Whether prompts may stay open, and rows of this process are shared; under FSDP2, of all. A collective there."""
        return shares and self.why_not(model, update=torch.is_grad_enabled()) is None

    # ----------------------------------------------------------------------------------------------------- the update

    def enter(self, micro_batches: list[MicroBatch], number: int) -> None:
        """A micro-batch is about to be trained on.

        Args:
            micro_batches: of the generation batch.
            number: of the micro-batch among them.

        Raises:
            RuntimeError: a forward of earlier micro-batches lacks its gradient.
        """
        self._coming = range(0)
        if (ahead := self._ahead) is not None:
            is_known = micro_batches is self._micro_batches
            if not is_known or number not in range(self._ahead_end - ahead.num_left, self._ahead_end):
                self.check_finished()
        if self._shares is None:
            reason = self.why_not_ahead(self._trainer.model)
            if reason is not None and self._has_shared:
                self._trainer.gate.warn(f"micro-batches share nothing with each other any longer: {reason}")
            self._shares = self._has_shared = reason is None
        if not self._shares:
            return
        if micro_batches is not self._micro_batches:
            self._count_rows(micro_batches)
        if not self._tokens:
            return
        end = self._trainer.step_windows.of(number).stop
        if self._trainer.accelerator.sync_gradients:  # the optimizer steps after this one, whatever comes
            end = number + 1
        self._coming, self._scored = range(number, end), None

    def _count_rows(self, micro_batches: list[MicroBatch]) -> None:
        """Read the rows of a generation batch from the device, all at once, and count their tokens."""
        self._micro_batches, self._tokens = micro_batches, []
        given = list(map(given_of, micro_batches))
        sizes = [len(batch["prompt_ids"]) for batch in micro_batches]
        on_host = blocks_on_host(*joined_blocks(list(map(blocks_of, micro_batches))))
        reason = why_not_join(self._trainer.model, given) or why_not_padded(on_host)
        if reason is not None:
            self._trainer.gate.warn(f"micro-batches share nothing with each other: {reason}")
            return
        self._on_host = list(zip(*(block.split(sizes) for block in on_host), strict=True))
        self._images = list(map(RowsOfImages, given, sizes))
        self._tokens = self._tokens_of(self._trainer.model, on_host, self._images)
        shown = any(map(shows_images, self._tokens))
        if shown and self._needs_towers(self._trainer.model) and not self._trainer.dummy_image_row.is_chosen:
            self._trainer.gate.warn(
                "micro-batches share nothing with each other: no row has its images in its prompt alone"
            )
            self._tokens = []
            return
        self._say_what_is_repeated()

    @property
    def is_entered(self) -> bool:
        """Whether the present micro-batch may share forwards, so that this object sees to the vision tower."""
        return bool(self._coming)

    def _needs_towers(self, model: Any) -> bool:
        """Whether other processes wait for this one's vision tower."""
        return self._trainer.accelerator.num_processes > 1 and is_multimodal(transformers_model(model).config)

    def _may_leave_experts_out(self, model: Any) -> bool:
        """Whether DDP may be asked to find unused parameters, of a model with experts."""
        anatomy = self._anatomy(model)
        may_find = getattr(self._trainer.args, "ddp_find_unused_parameters", None) is not False
        return may_find and (anatomy is None or anatomy.has_experts)

    def _tokens_of(self, model: Any, on_host: Blocks, images: Sequence[RowsOfImages]) -> list[list[RowTokens]]:
        """What each row adds to a packed forward, by micro-batches or chunks with the rows of ``images``."""
        tokens = tokens_of_rows(model, on_host, RowsOfImages.join(images))
        rows = iter(with_levels(tokens, on_host, self._trainer.min_level))
        return [[next(rows) for _ in range(len(part))] for part in images]

    def _say_what_is_repeated(self) -> None:
        """Once, with the first batch in which it is so: levels behind the prompt do not stay open."""
        levels = any(row.levels for rows in self._tokens for row in rows)
        if self._said_what_is_repeated or not levels or self.why_not(self._trainer.model) is not None:
            return
        apart = together = 0
        for window in self._trainer.step_windows.all():
            coming = self._tokens[window.start : window.stop]
            prompts, scored = (
                self._micro_batches[window.start][name].numel() for name in ("prompt_ids", "completion_ids")
            )
            most = self.most(prompts + scored, scored)
            cost = self._cost_of_forward(self._trainer.model)
            counted = forwarded_tokens(coming, most, self._trainer.num_generations, cost_of_forward=cost)
            apart, together = apart + counted[0], together + counted[1]
        if apart == together:
            return
        self._said_what_is_repeated = True
        total = sum(int(mask.sum()) for blocks in self._on_host for mask in (blocks[1], blocks[3]))
        self._trainer.gate.warn(
            "micro-batches reuse prompts, and what completions begin alike with is shared in each forward alone: of the tokens "
            f"of this batch {apart / total:.1%} are forwarded, {together / total:.1%} with whole groups in a micro-batch"
        )

    def leave(self) -> None:
        """The backward of a micro-batch has run.

        Raises:
            RuntimeError: a gradient would be missing from the optimizer step.
        """
        step_ends, self._coming = self._trainer.accelerator.sync_gradients, range(0)
        if step_ends:
            self._shares = self._stays_open = self._recomputable = None
        if self._ahead is not None and self._ahead.num_left and not step_ends:
            return
        ahead, self._ahead = self._ahead, None
        unfinished = int(ahead is not None and not ahead.is_closed)
        self._prompts.leave(step_ends=step_ends, remedy=f"Set {_REMEDY}", unfinished=unfinished)
        if not self._prompts.open:
            self._check_model(ends=True)

    def check_finished(self) -> None:
        """An optimizer step must not follow before all that micro-batches share has got its gradient.

        Raises:
            RuntimeError: a micro-batch has failed, or was left out, so that :meth:`leave` was not called for it.
        """
        if self._ahead is not None or self._prompts.is_unfinished:
            raise RuntimeError(
                "a forward that micro-batches share has not got its gradient, since one of them has failed or was not scored: "
                f"set {_REMEDY}"
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In here micro-batches share nothing with each other; what is open stays so."""
        self._paused, self._coming = self._coming, range(0)
        try:
            yield
        finally:
            self._coming, self._paused = self._paused, range(0)

    def score_update(self, model: Any, rows: Rows, *, entropy: bool) -> tuple[Scores, list[Counts]] | None:
        """Scores of the micro-batch that was entered; None if it shares nothing with others."""
        if not self._coming or not torch.is_grad_enabled():
            return None
        besides = self._row_besides(model, rows)
        if besides is None:
            return self._score_entered(model, rows, entropy)
        with unseen(model):
            found = self._score_entered(model, rows, entropy)
            if found is None:
                scores, count = self._forward.score(model, rows, entropy=entropy, aux_loss=False)
                found = scores, [count]
        (logps, entropies, aux), counts = found
        (zeros, _, _), more = self._forward.nothing_to_score(model, besides, entropy=False)
        return (logps + zeros[:1, :1], entropies, aux), [*counts, Counts(tokens_forwarded=more.tokens_forwarded)]

    def _row_besides(self, model: Any, rows: Rows) -> Rows | None:
        """What is forwarded after the rows of the micro-batch that was entered, see `row_besides`; None if nothing is."""
        accelerator, number = self._trainer.accelerator, self._coming[0]
        if not accelerator.sync_gradients or accelerator.num_processes == 1:
            return None
        first = self._trainer.step_windows.of(number).start
        window = [row for of_one in self._tokens[first : number + 1] for row in of_one]
        is_known = self._are_of(rows, number)
        tokens = self._tokens[number] if is_known else tokens_of_unknown(model, rows)
        ahead = self._ahead is not None and number != self._scored
        return row_besides(model, rows, tokens, window, self._trainer.dummy_image_row, ahead=ahead)

    def _score_entered(self, model: Any, rows: Rows, entropy: bool) -> tuple[Scores, list[Counts]] | None:
        number = self._coming[0]
        if number == self._scored:  # a loss that scores its rows twice
            return None
        self._scored = number
        self._check_model()
        if self._ahead is not None:
            return self._from_ahead(self._ahead, number, rows)
        if self._stays_open is None:
            self._stays_open = self.why_not(model) is None
        first, *later = self._coming
        is_known = self._are_of(rows, first)  # a loss of the user's own may score other rows
        tokens = self._tokens[first] if is_known else tokens_of_unknown(model, rows)
        coming = [tokens, *(self._tokens[number] for number in later)]
        may_join = is_known and not self._leaves_experts_out(model)
        cost = self._cost_of_forward(model)
        count, shared = self._plan(
            coming, rows, self._prompts, self._stays_open, may_join=may_join, cost_of_forward=cost
        )
        if count == 1:
            found = self._score(model, rows, tokens, shared, self._prompts, entropy)
        else:
            joint = [rows, *map(self._rows_of, later[: count - 1])]
            self._ahead, counts = self._score_joint(model, joint, coming[:count], shared, self._prompts, entropy)
            self._ahead_end = number + count
            found = (*self._ahead.take(), None), counts
        if self.is_open and self._model_state is None:
            self._model_state = ModelState(self._trainer.model)
        return found

    @property
    def is_open(self) -> bool:
        """Whether forwards of this optimizer step have not got their gradient, since other micro-batches share them."""
        return self._ahead is not None or bool(self._prompts.open)

    def stop_sharing(self, reason: str, call: ScoringCall) -> None:
        """The rows of ``call`` take the ordinary path, for ``reason``.

        Raises:
            RuntimeError: earlier ones of this optimizer step wait for them.
        """
        if self.is_open and torch.is_grad_enabled():  # not those of an evaluation
            raise RuntimeError(
                f"micro-batches of an optimizer step share forwards, and after some of them sharing has become impossible: {reason}. "
                f"Make such changes between optimizer steps, or set {_REMEDY}"
            )

    def _check_model(self, *, ends: bool = False) -> None:
        """See whether the model is the one that open forwards have run; with ``ends``, as they are finished, read values too.

        Raises:
            RuntimeError: it has changed, so scores or gradients are those of another model.
        """
        if (first := self._model_state) is None:
            return
        now = ModelState(self._trainer.model)
        self._later_states.append(now)
        reason = first.what_differs(now)
        if ends:
            reason = reason or next(filter(None, map(first.other_weights, self._later_states)), None)
            self._model_state, self._later_states = None, []
        if reason is not None:
            raise RuntimeError(
                f"micro-batches of an optimizer step share forwards, and between them {reason}: make such changes between "
                f"optimizer steps, or set {_REMEDY}"
            )

    def _anatomy(self, model: Any) -> Anatomy | None:
        """What enabling has found, since finding it walks the whole model."""
        base = transformers_model(model)
        return next((anatomy for anatomy in self._trainer.gate.anatomies if anatomy.base is base), None)

    def _layers_to_recompute(self, model: Any) -> list[nn.Module]:
        """Layers that may run again in the backward of a prompt; asked once in an optimizer step.

        A loss of the user's own may run them within settings that are over by then.
        """
        if not torch.is_grad_enabled():
            return []
        if self._recomputable is None:
            anatomy = None if owner_of_the_loss(self._trainer) else self._anatomy(model)
            self._recomputable = [] if anatomy is None else list(recomputable_layers(anatomy))
        return self._recomputable

    def _cost_of_forward(self, model: Any) -> int | None:
        """See `next_forward`."""
        return cost_of_forward(self._trainer.accelerator.device.type) if self._layers_to_recompute(model) else None

    def _leaves_experts_out(self, model: Any) -> bool:
        """Whether DDP takes experts that a forward of one token does not meet for unused; see :func:`row_besides`."""
        anatomy = self._anatomy(model)
        return bool(getattr(model, "find_unused_parameters", False)) and (anatomy is None or anatomy.has_experts)

    def _rows_of(self, number: int) -> Rows:
        return Rows.of_blocks(blocks_of(self._micro_batches[number]), self._on_host[number], self._images[number])

    def _are_of(self, rows: Rows, number: int) -> bool:
        """Whether ``rows`` are those of a micro-batch, by its number."""
        return rows.holds(self._on_host[number], self._images[number])

    def _from_ahead(self, ahead: ScoresAhead, number: int, rows: Rows) -> tuple[Scores, list[Counts]]:
        """Scores of micro-batch ``number``, whose rows were forwarded with those of an earlier one."""
        if not self._are_of(rows, number):
            raise RuntimeError(
                "the loss scores other rows than those of its micro-batch, which were forwarded with an earlier one: set "
                f"{_REMEDY}"
            )
        ahead.skip(number - self._ahead_end + ahead.num_left)
        logps, entropies = ahead.take(last=self._trainer.accelerator.sync_gradients)
        return (logps, entropies, None), []

    # --------------------------------------------------------------------------------------- passes without gradients

    def score_chunks(
        self, model: Any, chunks: list[Rows], *, entropy: bool
    ) -> Iterable[tuple[Scores, list[Counts]] | None]:
        """For each chunk of a call its scores, or None if it shares nothing with others."""
        if len(chunks) < 2 or torch.is_grad_enabled() or self.why_not_ahead(model, update=False) is not None:
            return [None] * len(chunks)
        stays_open = self.why_not(model, update=False) is None
        on_host, images = joined_blocks([chunk.on_host for chunk in chunks]), [chunk.images for chunk in chunks]
        tokens = self._tokens_of(model, on_host, images)
        prompts = OpenPrompts()
        found: list[tuple[Scores, list[Counts]] | None] = []
        while len(found) < len(chunks):
            start = len(found)
            count, shared = self._plan(tokens[start:], chunks[start], prompts, stays_open)
            taken = slice(start, start + count)
            if count == 1:
                found.append(self._score(model, chunks[start], tokens[start], shared, prompts, entropy))
                continue
            scores, counts = self._score_joint(model, chunks[taken], tokens[taken], shared, prompts, entropy)
            found += [((*scores.take(), None), counts if first else []) for first in (True, *[False] * (count - 1))]
        return found

    def score_apart(self, model: Any, rows: Rows, *, entropy: bool) -> Scores:
        """Scores of rows whose prompts are all forwarded apart from their completions, as where micro-batches share them.

        For comparisons. No prompt stays open, and one backward goes through prompts and completions.
        """
        tokens = tokens_of_rows(model, rows.on_host, rows.images)
        prompts = dict.fromkeys(row.prompt for row in tokens)
        recomputes = bool(self._layers_to_recompute(model))
        own: dict[Hashable, bool] = {key: recomputes for key in prompts if isinstance(key, tuple)}
        found = self._score(model, rows, tokens, own, OpenPrompts(), entropy)
        return found[0] if found else self._forward.score(model, rows, entropy=entropy, aux_loss=False)[0]

    def takes_rows_ahead(self, model: Any) -> bool:
        """Whether a micro-batch of the update may be forwarded with rows of later ones. The same on all processes."""
        smaller = self._trainer.args.per_device_train_batch_size < self._trainer.num_generations
        return smaller and self.why_not_ahead(model) is None and not self._leaves_experts_out(model)

    def score_with_rows_ahead(self, model: Any, rows: Rows, *, entropy: bool) -> Scores:
        """Scores of the micro-batch that was entered, from one forward with the rows of later ones that it takes.

        For comparisons. Nothing is kept for the later ones, and a backward goes through the whole forward at once.
        """
        joint = [rows]
        if self._paused and self._are_of(rows, self._paused[0]):
            count, _ = self._plan([self._tokens[number] for number in self._paused], rows, OpenPrompts(), False)
            joint += map(self._rows_of, self._paused[1:count])
        logps, entropies, aux = self._forward.score(model, Rows.join(joint), entropy=entropy, aux_loss=False)[0]
        return logps[: len(rows)], None if entropies is None else entropies[: len(rows)], aux

    # -------------------------------------------------------------------------------------------------------- planning

    def bound(self, rows: int) -> str:
        """What a forward of several micro-batches holds at most, in words, where micro-batches have ``rows`` rows."""
        of_what = "tokens" if HAS_FUSED_HEAD else "tokens and the logits"
        given = self._trainer._option("prefix_grouper_max_tokens")
        return f"the {of_what} of {rows} padded ones" if given == "auto" else f"prefix_grouper_max_tokens={given}"

    def most(self, padded: int, scored: int, images: int = 0) -> Most:
        """What a forward may hold: what a micro-batch of the stock trainer does, or as many times that as is set.

        Args:
            padded: tokens of that micro-batch.
            scored: those of completions among them.
            images: of its prompts.
        """
        given = self._trainer._option("prefix_grouper_max_tokens")
        tokens = padded if given == "auto" else int(given)
        scored, images = (-(-number * tokens // padded) for number in (scored, images))
        return Most(tokens, None if HAS_FUSED_HEAD else scored, images)

    def _plan(
        self,
        coming: Sequence[Sequence[RowTokens]],
        first: Rows,
        prompts: OpenPrompts,
        stays_open: bool,
        *,
        may_join: bool = True,
        cost_of_forward: int | None = None,
    ) -> NextForward:
        """What the next forward takes, see `next_forward`, by the size of ``first``, the first of ``coming``."""
        opened = {key: held_tokens(cache.num_tokens, cache.is_recomputed) for key, cache in prompts.open.items()}
        most = self.most(first.input_ids.numel(), len(first) * first.num_scored, sum(first.images.num_images))
        group = self._trainer.num_generations if may_join else 1
        taken = next_forward(coming, most, group, opened=opened, stays_open=stays_open, cost_of_forward=cost_of_forward)
        prompts.expect(row.prompt for rows in coming[taken.num_micro_batches :] for row in rows if stays_open)
        return taken

    # -------------------------------------------------------------------------------------------------------- forward

    def _score_joint(
        self,
        model: Any,
        parts: Sequence[Rows],
        tokens: Sequence[Sequence[RowTokens]],
        shared: Mapping[Hashable, bool],
        prompts: OpenPrompts,
        entropy: bool,
    ) -> tuple[ScoresAhead, list[Counts]]:
        """Scores of several micro-batches, or chunks, from one forward."""
        rows = Rows.join(parts)
        found = self._score(model, rows, [row for part in tokens for row in part], shared, prompts, entropy)
        if found is None:
            scores, count = self._forward.score(model, rows, entropy=entropy, aux_loss=False)
            found = scores, [count]
        (logps, entropies, _), counts = found
        return ScoresAhead(logps, entropies, [len(part) for part in parts]), counts

    def _score(
        self,
        model: Any,
        rows: Rows,
        tokens: Sequence[RowTokens],
        shared: Mapping[Hashable, bool],
        prompts: OpenPrompts,
        entropy: bool,
    ) -> tuple[Scores, list[Counts]] | None:
        """Scores of ``rows``, whose prompts in ``shared`` go through the caches of ``prompts``; None if there are none.

        ``shared`` says of those that are forwarded here whether their layers run again in the backward.
        """
        if not shared:
            return None
        found: list[PieceScores] = []
        counts = []
        pieces = self._pieces(tokens, shared)
        for number, (members, key) in enumerate(pieces, 1):
            with unseen(model) if number < len(pieces) else nullcontext():
                again = shared.get(key, False)
                (values, more), count = self._score_piece(model, rows.take(members), key, prompts, entropy, again)
            counts.append(count)
            found.append((members, values, more))
        return (*joined_scores(found, len(rows)), None), counts

    def _score_piece(
        self, model: Any, rows: Rows, key: Hashable, prompts: OpenPrompts, entropy: bool, recomputes: bool = False
    ) -> tuple[tuple[Tensor, Tensor | None], Counts]:
        """Log-probs and entropies of rows whose prompt, ``key``, goes through its cache; where it is None, of a packed row.

        ``recomputes``: whether layers of a prompt that is forwarded here run again in the backward.
        """
        if key is None:
            (logps, entropies, _), count = self._forward.score(model, rows, entropy=entropy, aux_loss=False)
            return (logps, entropies), count
        recompute = self._layers_to_recompute(model) if recomputes else ()
        scores, count, cache = self._forward.score_part(
            model, rows, prompts.cache(key), prompts.is_last(key), entropy=entropy, recompute=recompute
        )
        prompts.keep(key, cache)
        return scores, count

    @staticmethod
    def _pieces(tokens: Sequence[RowTokens], shared: Collection[Hashable]) -> list[tuple[list[int], Hashable]]:
        """Rows that are forwarded together: those of each prompt in ``shared``, and all that have completions else.

        The last of them has images if any has, see `row_besides`.
        """
        keys = [row.prompt for row in tokens]
        pieces = [([row for row, own in enumerate(keys) if own == key], key) for key in shared]
        others = [row for row, own in enumerate(keys) if own is not None and own not in shared]
        pieces += [(others, None)] if others else []  # type: ignore[list-item]
        return sorted(pieces, key=lambda piece: shows_images(tokens[row] for row in piece[0]))
