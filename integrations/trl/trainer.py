"""GRPO and RLOO trainers of TRL that forward each prompt of a micro-batch once.

Two methods of the stock trainer are overridden: the one that runs the model
(``_get_per_token_logps_and_entropies``: old-policy, reference and policy passes all go through it) and the one that
hands out micro-batches (``_prepare_inputs``: rows of one prompt are brought together again). Rewards, losses, clipping,
KL, entropy, vLLM, metrics and checkpoints are TRL's own.

What differs between TRL releases is taken from the installed one by inspection: since 1.15 the model carries a fused
head that scores pre-shifted labels, before that the logits of the completion positions are taken; since 1.7 the method
returns the router loss as a third value.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import trl
import trl.trainer.utils as trl_utils
from accelerate.utils import DistributedType
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperArguments
from prefix_grouper_plugins.integrations.trl.images import DummyImageRow, RowsOfImages, why_not_share
from prefix_grouper_plugins.integrations.trl.regroup import regroup, rows_mix_freely, window_size
from prefix_grouper_plugins.integrations.trl.router_loss import capture_router_logits, load_balancing_loss
from prefix_grouper_plugins.metrics import Counts, SharingMeter, logger
from prefix_grouper_plugins.modeling import (
    UnsupportedModelError,
    check_support,
    disable_prefix_grouper,
    numbers_padded_columns,
    on_all_ranks,
    packed_inputs,
    row_limit,
    transformers_model,
    without_prefix_grouper,
)
from prefix_grouper_plugins.modeling.images import ImageRows
from prefix_grouper_plugins.sharing import enable_prefix_grouper, reasons_after, run_self_check, self_check_pending

_HAS_FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")  # TRL >= 1.15
# Parameters are cut into shards when training begins, and until then some processes hold none.
_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
_DEFAULTS = {option.name: option.default for option in fields(PrefixGrouperArguments)} | {"use_prefix_grouper": True}

Scores = tuple[Tensor, Tensor | None, Tensor | None]  # log-probs [B, C], entropies [B, C], router loss []


def _setting_reasons(args: Any) -> list[str]:
    """Settings under which the installed TRL reads more than the log-probs of real completion tokens."""
    reasons = []
    if hasattr(GRPOTrainer, "compute_liger_loss") and getattr(args, "use_liger_kernel", False):
        reasons.append("use_liger_kernel computes its loss past the shared forward in TRL < 1.14: upgrade or unset it")
    if getattr(args, "loss_type", None) == "luspo" and Version(trl.__version__) < Version("1.10"):
        reasons.append("the luspo loss averages over padding too in TRL < 1.10: upgrade or choose another loss_type")
    if (alpha := getattr(args, "neftune_noise_alpha", None)) is not None:
        reasons.append(
            f"neftune_noise_alpha={alpha} adds noise to embeddings by the length of a forward, which is that of all rows "
            "when they are packed: unset it"
        )
    return reasons


def _overridden(cls: type) -> list[str]:
    """Whether a subclass has a scoring method of its own, past which nothing is shared."""
    owner = next(base for base in cls.__mro__ if "_get_per_token_logps_and_entropies" in vars(base))
    if owner is PrefixGrouperMixin:
        return []
    return [
        f"{owner.__name__} overrides _get_per_token_logps_and_entropies, so only what it hands on to super() is shared"
    ]


class PrefixGrouperMixin:
    """Put before :class:`trl.GRPOTrainer`, :class:`trl.RLOOTrainer` or a subclass of theirs.

    Settings are the fields of
    :class:`~prefix_grouper_plugins.integrations.trl.config.PrefixGrouperArguments`; with a stock config their defaults
    hold. ``trainer.sharing`` is a :class:`~prefix_grouper_plugins.metrics.SharingMeter` of all forwards so far.

    Raises:
        UnsupportedModelError: on construction, when the model or a setting cannot be shared exactly and
            ``prefix_grouper_on_unsupported`` is ``error``.
    """

    built = 0  # trainers made in this process; the launcher warns when a script made none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PrefixGrouperMixin.built += 1
        self._is_main = self.accelerator.is_main_process
        self.sharing = SharingMeter(warn=self._is_main)
        self._dummy_image_row = DummyImageRow(enabled=self.accelerator.num_processes > 1, warn=self._is_main)
        self._shares = bool(self._option("use_prefix_grouper"))
        self._standing_reason: str | None = None
        self._row_limits: dict[Any, tuple[int, str] | None] = {}  # what enable_prefix_grouper fixed, so it stays
        if self._shares:
            self._enable_models()

    def _option(self, name: str) -> Any:
        return getattr(self.args, name, _DEFAULTS[name])

    # ------------------------------------------------------------------------------------------------ before training

    def _enable_models(self) -> None:
        models = [self.model] + ([self.ref_model] if self.ref_model is not None else [])
        reports = [check_support(model) for model in models]
        wanted = self._option("prefix_grouper_self_check")
        found = [
            reason
            for report in reports
            for reason in report.reasons + report.left_padding_reasons + (() if wanted else report.unverified)
        ]
        reasons = [*dict.fromkeys(found), *_setting_reasons(self.args)]
        if not reasons:
            for model in models:
                enable_prefix_grouper(
                    model, backend=self._option("prefix_grouper_backend"), self_check="later" if wanted else False
                )
            if wanted and self.accelerator.distributed_type not in _SHARDED:
                reasons = [reason for model in models for reason in self._prove(model)]
        if reasons:
            self._cannot_share(reasons)
            return
        remarks = [*reports[0].notes, *self._outlook(), *_overridden(type(self))]
        if remarks and self._is_main:
            logger.warning("prefix grouper: %s", "; ".join(remarks))

    def _prove(self, model: Any) -> tuple[str, ...]:
        """Compare a tiny packed forward of ``model`` with its rows; why it cannot be shared. Every process calls it."""
        with self.accelerator.autocast():
            result = on_all_ranks(run_self_check(model), self.accelerator.device)
        reasons = reasons_after(check_support(model), result)
        if not reasons and self._is_main:
            logger.log(logging.INFO if result.passed else logging.WARNING, "prefix grouper: %s", result)
        return reasons

    def _cannot_share(self, reasons: Sequence[str]) -> None:
        """Stop, or take the stock path from here on."""
        if self._option("prefix_grouper_on_unsupported") == "error":
            raise UnsupportedModelError(
                f"prefix grouper cannot run {type(self.model).__name__} exactly: {'; '.join(reasons)}. Change that, or "
                "set prefix_grouper_on_unsupported='fallback' to train on the stock path"
            )
        self._standing_reason = "; ".join(reasons)
        for model in (self.model, self.ref_model):
            if model is not None:
                disable_prefix_grouper(model)

    def _window(self) -> int:
        mix_freely = rows_mix_freely(self.args) and not getattr(self, "aux_loss_enabled", False)
        return window_size(self.args, self._option("prefix_grouper_regroup"), mix_freely)

    def _outlook(self) -> list[str]:
        """What keeps rows of a prompt from meeting in one micro-batch, with the remedy."""
        rows, group, slices = (
            self.args.per_device_train_batch_size,
            self.num_generations,
            self.args.steps_per_generation,
        )
        if rows < group:
            shared = "nothing is shared in the update" if rows == 1 else f"only {rows} of {group} rows share a prompt"
            return [
                f"per_device_train_batch_size={rows} is smaller than num_generations={group}, so {shared}: raise it to "
                f"{group} and lower gradient_accumulation_steps, or set prefix_grouper_rebatch=true"
            ]
        if slices > 1 and self._window() < slices and rows * slices > group:
            return [
                f"rows of a prompt stay scattered over the {slices} micro-batches of a generation batch where moving "
                "them could change the result (loss_type, entropy terms, router loss, or steps_per_generation beyond "
                "gradient_accumulation_steps): prefix_grouper_regroup='group' moves them all the same"
            ]
        return []

    # -------------------------------------------------------------------------------------------------------- batches

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Stock inputs; a fresh generation batch is first regrouped, which keeps TRL's use of the random state."""
        before, step = self._buffered_inputs, self._step
        inputs = super()._prepare_inputs(generation_batch)
        if not self._shares or self._standing_reason or not self.model.training or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regroup(self._buffered_inputs, self._window())
        self._dummy_image_row.choose(self.model, self._buffered_inputs)
        return self._buffered_inputs[step % self.args.steps_per_generation]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Stock generation, with the model's own attention names: paged generation derives others from them."""
        with without_prefix_grouper(self.model):
            return super()._generate_single_turn(*args, **kwargs)

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
        """Log-probs of the last ``logits_to_keep`` tokens of ``input_ids [B, P + C]``, as the stock method gives them.

        Rows are cut into the stock method's chunks, so that every process makes the same number of forwards.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        if model.training and batch_size is None and self._standing_reason is None:  # the passes after regrouping
            more = self._dummy_image_row.add_to(model, input_ids, attention_mask, logits_to_keep, given)
            if more is not None:
                found = self._scores(model, *more[:2], logits_to_keep, None, compute_entropy, more[2])
                return tuple(None if values is None else values[:-1] for values in found)
        return self._scores(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, given)

    def _scores(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        compute_entropy: bool,
        given: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        """:meth:`_get_per_token_logps_and_entropies` of rows with all their images; ``given`` are its other arguments."""
        waits = (
            self._shares and self._standing_reason is None and self_check_pending(model)
        )  # it was to be sharded first
        if waits and (reasons := self._prove(model)):
            self._cannot_share(reasons)
        reason = self._reason_not_to_share(model, input_ids.shape[1], given)
        if reason is not None:
            if self._shares:
                self.sharing.count_fallback(reason)
                self._log_sharing()
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **given,
            )
        images, aux_loss = RowsOfImages(given, len(input_ids)), given.get("compute_aux_loss", False)
        size = batch_size or len(input_ids)
        scores = [
            self._score(
                model,
                input_ids[start : start + size],
                attention_mask[start : start + size],
                logits_to_keep,
                compute_entropy,
                aux_loss,
                images[start : start + size],
            )
            for start in range(0, len(input_ids), size)
        ]
        logps, entropies, router_losses = zip(*scores, strict=True)
        result = (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(router_losses).mean() if router_losses[0] is not None else None,
        )
        return result[: self._return_arity()]

    def _return_arity(self) -> int:
        """3 where the stock method takes ``compute_aux_loss`` and returns the router loss (TRL >= 1.7), else 2."""
        stock = super()._get_per_token_logps_and_entropies
        return 3 if "compute_aux_loss" in inspect.signature(stock).parameters else 2

    def _reason_not_to_share(self, model: Any, columns: int, given: dict[str, Any]) -> str | None:
        if not self._shares:
            return "use_prefix_grouper is off"
        if self._standing_reason is not None:
            return self._standing_reason
        limit = self._row_limit(model)
        if limit is not None and columns >= limit[0]:  # the stock path numbers padded columns too
            return f"the rows have {columns} columns, and from {limit[0]} on rope_type {limit[1]!r} turns a whole batch"
        return why_not_share(model, given)

    def _row_limit(self, model: Any) -> tuple[int, str] | None:
        """`row_limit`, which walks all modules, worked out once for each model."""
        base = transformers_model(model)
        if base not in self._row_limits:
            self._row_limits[base] = row_limit(base)
        return self._row_limits[base]

    def _score(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool,
        compute_aux_loss: bool,
        images: RowsOfImages,
    ) -> Scores:
        """One chunk of rows, packed into one row and brought back."""
        if not attention_mask[:, -logits_to_keep:].any() and not compute_aux_loss:
            # Every completion is masked. The stock method yields zeros that are still connected to the model.
            self.sharing.count_fallback("every completion of a micro-batch is masked")
            self._log_sharing()
            stock = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, compute_entropy=compute_entropy, **images.arguments()
            )
            return stock[0], stock[1], None
        blocks = (
            input_ids[:, :-logits_to_keep],
            attention_mask[:, :-logits_to_keep],
            input_ids[:, -logits_to_keep:],
            attention_mask[:, -logits_to_keep:],
        )
        rows = images.image_rows(model, blocks)
        batch = GroupedBatch(
            *blocks,
            keys=None if rows is None else rows.keys,
            padded_positions=numbers_padded_columns(model),  # TRL passes no position_ids
            forward_last=compute_aux_loss,
        )
        with capture_router_logits(model, enabled=compute_aux_loss) as router_logits:
            logps, entropies = self._forward_packed(model, batch, rows, compute_entropy)
        loss = load_balancing_loss(model, router_logits, batch.layout.rows_per_position) if compute_aux_loss else None
        self.sharing.count_packed(
            Counts(
                tokens_forwarded=batch.layout.num_tokens,
                row_tokens=batch.num_row_tokens,
                rows=batch.num_rows,
                groups=batch.num_groups,
            )
        )
        self._log_sharing()
        return batch.scatter(logps), batch.scatter(entropies) if entropies is not None else None, loss

    def _forward_packed(
        self, model: Any, batch: GroupedBatch, rows: ImageRows | None, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies ``[N]`` of the completion tokens, by the head that the installed TRL uses."""
        if rows is None:
            inputs = packed_inputs(batch.layout, batch.input_ids, batch.position_ids)
        else:
            inputs = rows.packed_inputs(batch)
        if hasattr(self.accelerator.unwrap_model(model).config.get_text_config(), "output_router_logits"):
            inputs["output_router_logits"] = False  # else the model's config could ask for a loss over packed tokens
        if _HAS_FUSED_HEAD:
            with self.accelerator.autocast():
                output = model(**inputs, shift_labels=batch.labels[None], fused_lm_head=True)
            entropies = output.entropy[0, batch.positions] if compute_entropy else None
            return output.log_probs[0, batch.positions], entropies
        logits = model(**inputs, logits_to_keep=batch.positions).logits[0] / self.temperature
        logps = trl_utils.selective_log_softmax(logits, batch.labels[batch.positions])
        if not compute_entropy:
            return logps, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(self, "_entropy_bonus_enabled", False)):
            return logps, trl_utils.entropy_from_logits(logits)

    def _log_sharing(self) -> None:
        """Into the trainer's own logs, so that they reach TensorBoard, W&B, trackio and the progress bar alike."""
        mode = "train" if self.model.training else "eval"
        for name, value in self.sharing.take().metrics(share=True).items():
            self._metrics[mode][name].append(value)


class PrefixGrouperGRPOTrainer(PrefixGrouperMixin, GRPOTrainer):
    """:class:`trl.GRPOTrainer` that encodes each prompt of a micro-batch once. Takes the same arguments."""


class PrefixGrouperRLOOTrainer(PrefixGrouperMixin, RLOOTrainer):
    """:class:`trl.RLOOTrainer` that encodes each prompt of a micro-batch once. Takes the same arguments."""
