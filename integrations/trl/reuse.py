"""The prompt once per optimizer step: micro-batches that hold a piece of a group reuse its prompt.

TRL's micro-batches stay as they are, rows, losses, normalisers, metrics and gathers included. The rows of a prompt have
been brought side by side (:mod:`.regroup`), so a group that is larger than a micro-batch lies in consecutive ones. The
first of them forwards the prompt, whose graph is kept; each of them forwards its completions against the prompt's keys and
values; the backward of the last one goes on through the prompt
(:class:`~prefix_grouper_plugins.modeling.prompt_cache.PromptCache`). At any time a micro-batch of ``b`` rows has each of its
prompts once and its completions, so it never holds more tokens than the ``b`` padded rows of the stock trainer.

In passes without gradients (old-policy and reference log-probs) the chunks of a call do the same among themselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from prefix_grouper_plugins.batch import prompt_group
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows, Scores
from prefix_grouper_plugins.integrations.trl.losses import why_rows_stay
from prefix_grouper_plugins.integrations.trl.regroup import MicroBatch
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling import transformers_model
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache, why_not_reuse

# Every process makes the same gradient synchronisation in these, however many forwards come before it.
_KINDS = {DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU}


def prompt_keys(prompt_ids: Tensor, prompt_mask: Tensor, completion_mask: Tensor) -> list[Hashable]:
    """For each row what it has in common with the rows of its prompt, padding included; None without a completion.

    A prompt of one token has nothing to reuse: its last token is forwarded with each completion.
    """
    ids = prompt_ids.masked_fill(prompt_mask == 0, -1).cpu()
    scored, lengths = completion_mask.any(1).tolist(), prompt_mask.sum(1).tolist()
    return [
        (prompt_group(None, row) if length > 1 else object()) if any_scored else None
        for row, any_scored, length in zip(ids, scored, lengths, strict=True)
    ]


class PromptReuse:
    """Which prompts are open between the micro-batches of one optimizer step.

    Args:
        trainer: a trainer with :class:`PrefixGrouperMixin`.
        forward: runs rows as one packed row.
    """

    def __init__(self, trainer: Any, forward: PackedForward) -> None:
        self._trainer, self._forward = trainer, forward
        self._open: dict[Hashable, PromptCache] = {}
        self._closing: list[PromptCache] = []
        self._later: Counter[Hashable] | None = None  # rows of each prompt in later micro-batches of the step

    def why_not(self, model: Any, *, update: bool = True) -> str | None:
        """Why micro-batches do not reuse prompts; None if they do.

        Args:
            model: that is forwarded.
            update: for the update, where rows must be free to change their micro-batch.
        """
        trainer = self._trainer
        if trainer.accelerator.distributed_type not in _KINDS:
            kind = trainer.accelerator.distributed_type.value
            return f"under {kind} every process has to make the same number of forwards"
        config = transformers_model(model).config
        if config.get_text_config(decoder=True) is not config:
            return "the model takes images"
        if update and trainer._option("prefix_grouper_regroup") == "none":
            return "prefix_grouper_regroup='none' leaves TRL's shuffle alone"
        if update and (reason := why_rows_stay(trainer)) is not None:
            return reason
        if update and self.window() == 1:
            args = self._trainer.args
            return (
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} and "
                f"steps_per_generation={args.steps_per_generation} have no common factor"
            )
        base = transformers_model(model)  # asked before every micro-batch, so what enabling has found is used again
        known = (anatomy for anatomy in trainer.gate.anatomies if anatomy.base is base)
        return why_not_reuse(model, next(known, None))

    # ----------------------------------------------------------------------------------------------------- the update

    def window(self) -> int:
        """Consecutive micro-batches that certainly lie in one optimizer step."""
        args = self._trainer.args
        return math.gcd(args.gradient_accumulation_steps, args.steps_per_generation)

    def enter(self, micro_batches: list[MicroBatch], number: int) -> None:
        """A micro-batch is about to be trained on.

        Args:
            micro_batches: of the generation batch.
            number: of the micro-batch among them.
        """
        self._later = None
        if self.why_not(self._trainer.model) is not None:
            return
        window = self.window()
        end = number - number % window + window
        if self._trainer.accelerator.sync_gradients:  # the optimizer steps after this one, whatever comes
            end = number + 1
        later = (
            key
            for batch in micro_batches[number + 1 : end]
            for key in prompt_keys(batch["prompt_ids"], batch["prompt_mask"], batch["completion_mask"])
        )
        self._later = Counter(key for key in later if key is not None)

    def leave(self) -> None:
        """The backward of a micro-batch has run.

        Raises:
            RuntimeError: the gradient of a prompt would be missing from the optimizer step.
        """
        unfinished = [cache for cache in self._closing if not cache.is_closed]
        if self._trainer.accelerator.sync_gradients:
            unfinished += self._open.values()
            self._open = {}
        self._closing, self._later = [], None
        if unfinished:
            raise RuntimeError(
                f"{len(unfinished)} prompt(s) that micro-batches share have not got their gradient: a micro-batch was not "
                "scored, or its log-probs do not reach the loss. Set prefix_grouper_regroup='none'"
            )

    def score_update(self, model: Any, rows: Rows, *, entropy: bool) -> tuple[Scores, list[Counts]] | None:
        """Scores of the micro-batch that was entered; None if none of its prompts goes beyond it."""
        if self._later is None or not torch.is_grad_enabled():
            return None
        return self._score(model, rows, self._open, self._later, entropy)

    # --------------------------------------------------------------------------------------- passes without gradients

    def score_chunks(
        self, model: Any, chunks: list[Rows], *, entropy: bool
    ) -> Iterable[tuple[Scores, list[Counts]] | None]:
        """For each chunk of a call its scores, or None if none of its prompts goes beyond it."""
        if len(chunks) < 2 or torch.is_grad_enabled() or self.why_not(model, update=False) is not None:
            return [None] * len(chunks)
        keys = [self._keys(chunk) for chunk in chunks]
        opened: dict[Hashable, PromptCache] = {}
        later = Counter(key for of_chunk in keys for key in of_chunk if key is not None)
        found = []
        for chunk, of_chunk in zip(chunks, keys, strict=True):
            later -= Counter(key for key in of_chunk if key is not None)
            found.append(self._score(model, chunk, opened, later, entropy))
        return found

    def score_apart(self, model: Any, rows: Rows, *, entropy: bool) -> Scores:
        """Scores of rows whose prompts are all forwarded apart from their completions, as where micro-batches share them.

        For comparisons. No prompt stays open, and one backward goes through prompts and completions.
        """
        keys = self._keys(rows)
        own: list[Hashable] = [key for key in dict.fromkeys(keys) if isinstance(key, tuple)]
        if not own:
            return self._forward.score(model, rows, entropy=entropy, aux_loss=False)[0]
        return self._score_pieces(model, rows, keys, own, {}, Counter(), [], entropy)[0]

    # -------------------------------------------------------------------------------------------------------- forward

    def _score(
        self,
        model: Any,
        rows: Rows,
        opened: dict[Hashable, PromptCache],
        later: Counter[Hashable],
        entropy: bool,
    ) -> tuple[Scores, list[Counts]] | None:
        keys = self._keys(rows)
        shared = [key for key in dict.fromkeys(keys) if key is not None and (key in opened or later[key])]
        if not shared:
            return None
        return self._score_pieces(model, rows, keys, shared, opened, later, self._closing, entropy)

    def _score_pieces(
        self,
        model: Any,
        rows: Rows,
        keys: list[Hashable],
        shared: list[Hashable],
        opened: dict[Hashable, PromptCache],
        later: Counter[Hashable],
        closing: list[PromptCache],
        entropy: bool,
    ) -> tuple[Scores, list[Counts]]:
        """Scores of rows whose prompts in ``shared`` go through caches: those that are ``opened``, or new ones.

        A prompt without ``later`` rows goes from ``opened`` to ``closing``.
        """
        logps: Tensor | None = None
        entropies: Tensor | None = None
        counts = []
        for members, key in self._pieces(keys, shared):
            piece = rows.take(members)
            if key is None:
                (values, more, _), count = self._forward.score(model, piece, entropy=entropy, aux_loss=False)
            else:
                cache, is_last = opened.get(key), not later[key]
                (values, more), count, cache = self._forward.score_part(model, piece, cache, is_last, entropy=entropy)
                opened[key] = cache
                if is_last:
                    closing.append(opened.pop(key))
            counts.append(count)
            place = torch.tensor(members, device=values.device)
            logps = _placed(logps, values, place, len(rows))
            entropies = None if more is None else _placed(entropies, more, place, len(rows))
        assert logps is not None
        return (logps, entropies, None), counts

    @staticmethod
    def _pieces(keys: list[Hashable], shared: list[Hashable]) -> list[tuple[list[int], Hashable]]:
        """Rows that are forwarded together: those of each prompt in ``shared``, and all that have completions else."""
        pieces = [([row for row, own in enumerate(keys) if own == key], key) for key in shared]
        others = [row for row, own in enumerate(keys) if own is not None and own not in shared]
        return [*pieces, (others, None)] if others else pieces  # type: ignore[list-item]

    @staticmethod
    def _keys(rows: Rows) -> list[Hashable]:
        prompts, prompt_mask, _, completion_mask = rows.blocks
        return prompt_keys(prompts, prompt_mask, completion_mask)


def _placed(total: Tensor | None, values: Tensor, place: Tensor, count: int) -> Tensor:
    """``values [N, C]`` as the rows ``place`` of ``[count, C]``, added to ``total``. Differentiable."""
    rows = values.new_zeros((count, values.shape[1])).index_copy(0, place, values)
    return rows if total is None else total + rows
