"""The prompt once per optimizer step under FSDP2, where every process has to make the same forwards.

A layer's parameters are gathered from all processes for each forward and backward. So before an optimizer step, and before a
call that scores several chunks without gradients, processes tell each other how many tokens their rows have, and each works
out the plan of all (`matched_forwards`): how many micro-batches the next forward takes, as many as fit on each process; how
many prompts are forwarded before it, and when they close; and how many forwards score its rows. Where a process has fewer
than another, it forwards a single token in its place.

Whether micro-batches share anything is decided the same way: where one process may not, none does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

from prefix_grouper_plugins.integrations.trl.forward import (
    PieceScores,
    Rows,
    Scores,
    ScoringCall,
    joined_blocks,
    joined_scores,
)
from prefix_grouper_plugins.integrations.trl.regroup import MicroBatch
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse
from prefix_grouper_plugins.integrations.trl.row_tokens import tokens_of_rows
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling import is_multimodal, transformers_model
from prefix_grouper_plugins.modeling.model_state import ModelState
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.prompt_reuse import MatchedForwards, OpenPrompts
from prefix_grouper_plugins.modeling.scores_ahead import ScoresAhead
from prefix_grouper_plugins.token_budget import MatchedForward, Most, RowsOfProcess, RowTokens, matched_forwards

_REMEDY = "prefix_grouper_regroup='none'"
_SPLIT_ROWS = ("tp_size", "cp_size", "sp_size")  # of accelerate's parallelism


def is_fsdp2(accelerator: Any) -> bool:
    """Whether accelerate shards the model by FSDP2."""
    return accelerator.distributed_type == DistributedType.FSDP and bool(getattr(accelerator, "is_fsdp2", False))


class _Told(NamedTuple):
    """What a process tells the others.

    Attributes:
        reason: why its micro-batches, or chunks, share nothing with each other; None if they may.
        stays_open: whether its prompts may stay open.
        rows: that it forwards.
        is_of_settings: whether the reason is one that the log says before the first step.
    """

    reason: str | None
    stays_open: bool
    rows: RowsOfProcess
    is_of_settings: bool = False


class _Agreed:
    """The forwards of some micro-batches or chunks, on which processes have agreed.

    Args:
        model: the root of the sharded model.
        plan: the forwards.
        rows: of this process, named as in ``plan``.
        stays_open: whether prompts stay open.
        device: of token ids.
    """

    def __init__(
        self,
        model: Any,
        plan: Sequence[MatchedForward],
        rows: Sequence[Sequence[RowTokens]],
        stays_open: bool,
        device: torch.device,
    ) -> None:
        self.plan, self.rows, self.stays_open = plan, rows, stays_open
        self.matched = MatchedForwards(model, [forward.prompts for forward in plan], device)
        self._process = dist.get_rank() if dist.is_initialized() else 0

    def tokens(self, number: int) -> list[RowTokens]:
        """Of the rows that a forward takes on this process."""
        return [row for micro_batch in self.plan[number].micro_batches for row in self.rows[micro_batch]]

    def shared(self, number: int) -> dict[Any, int]:
        """The prompts of this process that go through a cache in a forward, and when they close."""
        return dict(self.plan[number].shared[self._process])

    def is_ordinary(self, number: int) -> bool:
        """Whether a forward is one of the rows of one micro-batch on this process, as without reuse."""
        forward = self.plan[number]
        is_one = len(forward.micro_batches) == forward.num_parts == 1
        return is_one and not forward.prompts and not self.shared(number) and not self.matched.closes(number)

    def forward_of(self, micro_batch: int) -> int | None:
        """The number of the forward whose first micro-batch is ``micro_batch``, counted from 0."""
        starts = (number for number, forward in enumerate(self.plan) if forward.micro_batches.start == micro_batch)
        return next(starts, None)

    def expected(self, number: int) -> Iterator[Any]:
        """The prompts of the rows that come after a forward."""
        later = self.rows[self.plan[number].micro_batches.stop :] if self.stays_open else []
        return (row.prompt for rows in later for row in rows)


class ShardedReuse(PromptReuse):
    """:class:`~prefix_grouper_plugins.integrations.trl.reuse.PromptReuse` with forwards that are matched among processes."""

    _agreed: _Agreed | None = None

    def forget(self) -> None:
        super().forget()
        if self._agreed is not None:
            self._agreed.matched.forget()
        self._agreed = None
        # The micro-batches for which processes were asked, by number, and the generation batch that they are of.
        self._asked = range(0)
        self._asked_of: list[MicroBatch] | None = None
        self._several = False  # whether several backwards reach the layers in that of the rows ahead

    def _why_not_of_its_kind(self, model: Any) -> str | None:
        if is_multimodal(transformers_model(model).config):
            return "under FSDP every process runs the vision tower in each micro-batch"
        parallelism = getattr(self._trainer.accelerator, "parallelism_config", None)
        if any((getattr(parallelism, name, None) or 1) > 1 for name in _SPLIT_ROWS):
            return "tensor, context and sequence parallelism split rows among processes"
        return None

    def _is_ruled_out(self, model: Any, *, update: bool) -> bool:
        """Whether nothing is shared, for a reason that every process has: none asks the others."""
        if self._why_not_of_its_kind(model) is not None:
            return True
        return update and (
            self._trainer._option("prefix_grouper_regroup") == "none" or self._trainer.step_windows.size == 1
        )

    # ---------------------------------------------------------------------------------------------------- agreeing

    def _agree(self, model: Any, told: _Told, device: torch.device) -> _Agreed | None:
        """The forwards of all processes; None where one of them shares nothing. A collective."""
        of_all = _gathered(told)
        reasons = dict.fromkeys(own.reason for own in of_all)
        if (reason := next(filter(None, reasons), None)) is not None:
            if len(reasons) > 1 or not told.is_of_settings:
                self._trainer.gate.warn(f"micro-batches share nothing with each other: {reason}")
            return None
        stays_open = all(own.stays_open for own in of_all)
        plan = matched_forwards([own.rows for own in of_all], self._trainer.num_generations, stays_open=stays_open)
        return _Agreed(model, plan, told.rows.micro_batches, stays_open, device)

    def _tell(self, model: Any, rows: RowsOfProcess, columns: int, *, update: bool) -> _Told:
        if (reason := self.why_not_ahead(model, update=update)) is not None:
            return _Told(reason, False, rows, is_of_settings=True)
        reason = self._trainer.why_not_columns(model, columns)
        if reason is None and not isinstance(model, FSDPModule):
            reason = f"{type(model).__name__} hides what FSDP2 has sharded"
        return _Told(reason, reason is None and self.why_not(model, update=update) is None, rows)

    def _layers_to_recompute(self, model: Any) -> list[nn.Module]:
        return []  # each forward of a layer is a collective

    def reuses_prompts(self, model: Any) -> bool:
        return self._agreed is not None and self._agreed.stays_open

    def takes_rows_ahead(self, model: Any) -> bool:
        return self._agreed is not None and super().takes_rows_ahead(model)

    def reuses_prompts_everywhere(self, model: Any, shares: bool) -> bool:
        return all(_gathered(super().reuses_prompts_everywhere(model, shares)))

    # ---------------------------------------------------------------------------------------------------- the update

    def enter(self, micro_batches: list[MicroBatch], number: int) -> None:
        """A micro-batch is about to be trained on. A collective at the first one of a window."""
        super().enter(micro_batches, number)
        model = self._trainer.model_wrapped
        is_asked = micro_batches is self._asked_of and number in self._asked[1:]
        if self._is_ruled_out(model, update=True):
            self._agreed, self._asked_of = None, None
        elif not is_asked:
            self._asked_of, self._asked = micro_batches, range(number, self._trainer.step_windows.of(number).stop)
            self._agreed = self._agree_on(model, micro_batches)
        if self._agreed is None:
            self._coming = range(0)

    def _agree_on(self, model: Any, micro_batches: list[MicroBatch]) -> _Agreed | None:
        """The forwards of the micro-batches for which processes are asked."""
        prompts, scored = (micro_batches[self._asked.start][name] for name in ("prompt_ids", "completion_ids"))
        columns = prompts.shape[1] + scored.shape[1]
        tokens = _renamed([self._tokens[number] for number in self._asked]) if self._coming else []
        most = self.most(columns * len(prompts), scored.numel())
        rows = RowsOfProcess(tokens, most)
        told = self._tell(model, rows, columns, update=True)
        if told.reason is None and not self._coming:
            told = told._replace(reason="the rows of a process cannot be forwarded together")
        return self._agree(model, told, prompts.device)

    def score_update(self, model: Any, rows: Rows, *, entropy: bool) -> tuple[Scores, list[Counts]] | None:
        if not self._coming or not torch.is_grad_enabled() or self._coming[0] == self._scored:
            return None
        agreed, number = self._agreed, self._coming[0]
        assert agreed is not None
        self._scored = number
        self._check_model()
        if self._ahead is not None:
            self._check_rows(rows, number)
            return self._next_ahead(agreed, self._ahead, number)
        place = self._place(agreed, number)
        if agreed.is_ordinary(place):
            return None
        self._check_rows(rows, number)
        taken = agreed.plan[place].micro_batches
        joint = [rows, *map(self._rows_of, range(number + 1, number + len(taken)))]
        is_alone = len(taken) == 1
        self._prompts.expect(agreed.expected(place))
        (logps, entropies, _), counts = self._score_matched(
            agreed, place, model, joint, self._prompts, entropy, is_alone and self._synchronizes
        )
        if not is_alone:
            self._ahead, self._ahead_end = ScoresAhead(logps, entropies, list(map(len, joint))), number + len(taken)
            logps, entropies = self._ahead.take()
        if self.is_open and self._model_state is None:
            self._model_state = ModelState(self._trainer.model)
        return (logps, entropies, None), counts

    def _next_ahead(self, agreed: _Agreed, ahead: ScoresAhead, number: int) -> tuple[Scores, list[Counts]]:
        """Scores of a micro-batch whose rows were forwarded with those of an earlier one."""
        ahead.skip(number - self._ahead_end + ahead.num_left)
        logps, entropies = ahead.take(last=self._trainer.accelerator.sync_gradients)
        if not ahead.num_left and self._several and self._synchronizes:
            agreed.matched.defer()
        return (logps, entropies, None), []

    @property
    def _synchronizes(self) -> bool:
        """Whether gradients are reduced over processes in this micro-batch."""
        accelerator = self._trainer.accelerator
        each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return bool(accelerator.sync_gradients or each)

    def _check_rows(self, rows: Rows, number: int) -> None:
        """
        Raises:
            RuntimeError: they are not those of the micro-batch, for which processes have planned.
        """
        if not self._are_of(rows, number):
            raise RuntimeError(
                "the loss scores other rows than those of its micro-batch, for which all processes have planned: set "
                f"{_REMEDY}"
            )

    def _place(self, agreed: _Agreed, number: int) -> int:
        """
        Raises:
            RuntimeError: another micro-batch than this one was to be forwarded next.
        """
        if (place := agreed.forward_of(number - self._asked.start)) is None:
            raise RuntimeError(f"a micro-batch was left out, for which all processes have planned: set {_REMEDY}")
        return place

    def stop_sharing(self, reason: str, call: ScoringCall) -> None:
        super().stop_sharing(reason, call)
        trainer = self._trainer
        if trainer.gate.reason is not None or call.aux_loss:
            return
        if trainer._makes_inputs or not trainer.model.training:
            num_chunks = len(list(range(0, len(call.input_ids), call.batch_size or len(call.input_ids))))
            if self._asks_of_chunks(call.model, num_chunks):
                self._agree(call.model, _Told(reason, False, RowsOfProcess([], Most(0))), call.input_ids.device)
            return
        agreed = self._agreed
        if agreed is None or not self._coming or self._coming[0] == self._scored:
            return
        if not agreed.is_ordinary(self._place(agreed, self._coming[0])):
            raise RuntimeError(
                f"processes have planned forwards that micro-batches share, and sharing has become impossible: {reason}. "
                f"Set {_REMEDY}"
            )

    # --------------------------------------------------------------------------------------- passes without gradients

    def _asks_of_chunks(self, model: Any, num_chunks: int) -> bool:
        return num_chunks > 1 and not torch.is_grad_enabled() and not self._is_ruled_out(model, update=False)

    def score_chunks(
        self, model: Any, chunks: list[Rows], *, entropy: bool
    ) -> Iterator[tuple[Scores, list[Counts]] | None]:
        """As in the base class, one after the other, so that forwards of chunks that share nothing keep their place."""
        agreed = self._agree_on_chunks(model, chunks) if self._asks_of_chunks(model, len(chunks)) else None
        if agreed is None:
            yield from [None] * len(chunks)
            return
        prompts = OpenPrompts()
        for place, forward in enumerate(agreed.plan):
            if agreed.is_ordinary(place):
                yield None
                continue
            joint = [chunks[number] for number in forward.micro_batches]
            prompts.expect(agreed.expected(place))
            (logps, entropies, _), counts = self._score_matched(agreed, place, model, joint, prompts, entropy)
            ahead = ScoresAhead(logps, entropies, list(map(len, joint)))
            for first in (True, *[False] * (len(joint) - 1)):
                yield (*ahead.take(), None), counts if first else []

    def _agree_on_chunks(self, model: Any, chunks: list[Rows]) -> _Agreed | None:
        on_host, images = joined_blocks([chunk.on_host for chunk in chunks]), [chunk.images for chunk in chunks]
        tokens = _renamed(self._tokens_of(model, on_host, images))
        first = chunks[0]
        most = self.most(first.input_ids.numel(), len(first) * first.num_scored)
        rows = RowsOfProcess(tokens, most)
        told = self._tell(model, rows, first.input_ids.shape[1], update=False)
        return self._agree(model, told, first.input_ids.device)

    # ----------------------------------------------------------------------------------------------------- comparisons

    def score_apart(self, model: Any, rows: Rows, *, entropy: bool) -> Scores:
        tokens = _renamed([tokens_of_rows(model, rows.on_host, rows.images)])
        # A prompt of one token has nothing to share.
        own = dict.fromkeys((row.prompt for row in tokens[0] if row.prompt is not None and row.prompt_tokens), 0)
        others = {row.prompt for row in tokens[0]} - {None, *own}
        of_all = _gathered((own, max(1, len(own) + bool(others))))
        prompts = [0] * max(len(shared) for shared, _ in of_all)
        forward = MatchedForward(range(1), prompts, [shared for shared, _ in of_all], max(n for _, n in of_all))
        agreed = _Agreed(model, [forward], tokens, False, rows.input_ids.device)
        return self._score_matched(agreed, 0, model, [rows], OpenPrompts(), entropy)[0]

    # -------------------------------------------------------------------------------------------------------- forward

    def _score_matched(
        self,
        agreed: _Agreed,
        place: int,
        model: Any,
        joint: Sequence[Rows],
        prompts: OpenPrompts,
        entropy: bool,
        synchronizes: bool = False,
    ) -> tuple[Scores, list[Counts]]:
        """Scores of the rows of forward ``place``, with as many forwards as on every other process.

        ``synchronizes``: whether gradients are reduced over processes in the backward of the micro-batch that runs.
        """
        rows = Rows.join(joint) if len(joint) > 1 else joint[0]
        tokens, num_parts = agreed.tokens(place), agreed.plan[place].num_parts
        counts = self._open(agreed, place, model, rows, prompts)
        shared = list(agreed.shared(place))
        parts = self._pieces(tokens, shared) if shared else [(list(range(len(rows))), None)]
        found: list[PieceScores] = []
        for members, key in parts:
            (values, more), count = self._score_piece(model, rows.take(members), key, prompts, entropy)
            counts.append(count)
            found.append((members, values, more))
        for _ in range(num_parts - len(parts)):
            (zeros, more, _), count = self._forward.nothing_to_score(model, rows[:1], entropy=entropy)
            counts.append(Counts(tokens_forwarded=count.tokens_forwarded))
            found.append(([0], zeros, more))
        logps, entropies = joined_scores(found, len(rows))
        self._several = num_parts > 1 or agreed.matched.closes(place)
        first = found[0][1] if num_parts > 1 else None
        (logps,) = agreed.matched.attach(place, [logps], synchronizes=synchronizes, first=first)
        return (logps, entropies, None), counts

    def _open(self, agreed: _Agreed, place: int, model: Any, rows: Rows, prompts: OpenPrompts) -> list[Counts]:
        """Forward the prompts that begin with forward ``place`` on any process; counts of what was forwarded here."""
        shared, counts = agreed.shared(place), list[Counts]()
        keys = [row.prompt for row in agreed.tokens(place)]
        new = sorted((key for key in shared if prompts.cache(key) is None), key=lambda key: shared[key])

        def run(key: Any) -> PromptCache:
            cache, count = self._forward.prompt(model, rows.take([n for n, own in enumerate(keys) if own == key]))
            counts.append(count)
            return cache

        with self._trainer.accelerator.autocast():
            opened, added = agreed.matched.forward(place, [(shared[key], functools.partial(run, key)) for key in new])
        for key, cache in zip(new, opened, strict=True):
            prompts.begin(key, cache)
        return [*counts, Counts(tokens_forwarded=added)] if added else counts


def _gathered(told: Any) -> list[Any]:
    """What each process tells, by its rank. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [told]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, told)
    return found


def _renamed(micro_batches: Sequence[Sequence[RowTokens]]) -> list[list[RowTokens]]:
    """The rows, with numbers for the names of what they share: token ids are not sent."""
    names: dict[Any, int] = {}

    def renamed(row: RowTokens) -> RowTokens:
        levels = tuple((names.setdefault(name, len(names)), tokens) for name, tokens in row.levels)
        prompt = None if row.prompt is None else names.setdefault(row.prompt, len(names))
        return row._replace(prompt=prompt, levels=levels)

    return [list(map(renamed, rows)) for rows in micro_batches]
