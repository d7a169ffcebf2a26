"""The engine: verl's FSDP engine with each prompt of a micro-batch laid out once.

Re-pack, then delegate. A micro-batch becomes one packed row (:mod:`.micro_batch`), which verl's own code then takes for a
micro-batch of a single row: removal of padding, Ulysses slices, fused kernels, entropy, temperature and the loss are
verl's, unchanged. Two things are ours: the attention, which meets the layout in every layer, and the labels, since in a
packed row the token that follows in the text is not always the next one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import verl.workers.engine.fsdp.transformer_impl as fsdp
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import pad
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.ulysses import ulysses_pad_and_slice_inputs

from prefix_grouper_plugins.integrations.verl.config import SHARDINGS, PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.losses import why_rows_stay
from prefix_grouper_plugins.integrations.verl.micro_batch import PackedMicroBatch, mend_positions, row_sizes
from prefix_grouper_plugins.integrations.verl.planning import (
    Limits,
    Plan,
    plan_on_all_ranks,
    rows_together,
    rows_within,
    why_groups_are_cut,
)
from prefix_grouper_plugins.integrations.verl.reuse import PromptReuse, autocast, why_not_reuse, why_not_reuse_rows
from prefix_grouper_plugins.integrations.verl.switch import STRATEGY, raise_failures, show_what_is_decided
from prefix_grouper_plugins.integrations.verl.vision.dummy_image import add_dummy_images
from prefix_grouper_plugins.integrations.verl.vision.images import (
    TOKEN_TYPES,
    joined,
    placeholder_ids,
    row_inputs,
    why_not_share,
)
from prefix_grouper_plugins.integrations.verl.vision.model_patches import (
    fit_to_packed_rows,
    has_verls_forward,
    leaves_images_out,
    lost_attention,
    numbered_rows,
    remember_attention,
)
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.metrics import (
    OLD_LOG_PROB,
    REF_LOG_PROB,
    UPDATE,
    Counts,
    SharingCounts,
    SharingMeter,
)
from prefix_grouper_plugins.modeling import (
    Anatomy,
    ShardedLayout,
    layout_inputs,
    transformers_model,
    without_router_loss,
)
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.self_check import on_any_rank
from prefix_grouper_plugins.modeling.self_check.gradients import (
    check_gradients,
    gradient_difference,
    local_gradients,
)
from prefix_grouper_plugins.modeling.self_check.isolation import untouched, without_dropout
from prefix_grouper_plugins.modeling.self_check.leak import leak_one_key
from prefix_grouper_plugins.modeling.self_check.schedule import Schedule
from prefix_grouper_plugins.sharing import SharingGate

_NO_SELF_CHECK_UNDER_ULYSSES = (
    "no self-check: Ulysses cuts rows into pieces, and the few tokens of the check are too short for that; "
    "prefix_grouper.verify=first compares the first update"
)


_NOTHING_TO_REUSE = "another rank's rows cannot, or the prompts have one token, which is forwarded with each response"


def _not_reused(notice: str, reason: str) -> str:
    return f"{notice} (its parts do not reuse one forward of it: {reason})"


def gate_of(options: PrefixGrouperOptions, ulysses: bool, is_main: bool = True) -> SharingGate:
    """The gate of an engine with ``options``. Under Ulysses no process has whole rows for a self-check."""

    def refusal(reasons: str) -> str:
        return (
            f"{reasons}. To train without sharing, leave model_engine=prefix_grouper out or set "
            "actor_rollout_ref.actor.fsdp_config.prefix_grouper.on_unsupported=fallback"
        )

    return SharingGate(
        backend=options.backend,
        self_check=options.self_check and not ulysses,
        on_unsupported=options.on_unsupported,
        refusal=refusal,
        is_main=is_main,
    )


class PrefixGrouperEngine(fsdp.FSDPEngineWithLMHead):
    """:class:`verl.workers.engine.fsdp.FSDPEngineWithLMHead` that forwards every prompt of a micro-batch once.

    Takes the same arguments. ``engine_config`` is a
    :class:`~prefix_grouper_plugins.integrations.verl.PrefixGrouperEngineConfig`; with verl's own FSDP engine config the
    defaults of its settings hold.

    Attributes:
        gate (`SharingGate`): whether the model is shared, and why not.
        sharing (`SharingMeter`): all forwards so far, on this rank.
        forwarded (`Counts`): the last :meth:`forward_backward_batch`, over all data-parallel ranks.

    Raises:
        UnsupportedModelError: on initialization, when the model cannot be shared exactly and
            ``prefix_grouper.on_unsupported`` is ``error``.
    """

    # verl drops the metrics of old and reference log-probs, so their counts are logged with the next update, which another
    # engine of the same process (actor and reference policy are two) may make.
    _log_prob_counts: ClassVar[SharingCounts] = SharingCounts()

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        raise_failures()
        show_what_is_decided()
        self.options: PrefixGrouperOptions = getattr(engine_config, "prefix_grouper", None) or PrefixGrouperOptions()
        if engine_config.strategy not in SHARDINGS:
            # verl has chosen this class by now, and from here on reads the strategy to tell FSDP2 from FSDP1.
            object.__setattr__(engine_config, "strategy", self.options.sharding)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.gate = gate_of(self.options, self.use_ulysses_sp, is_main=self.rank == 0)
        self.sharing = self.gate.meter
        self.forwarded = Counts()
        self._pass = UPDATE
        self._announced = False
        self._cut: set[str] = set()  # passes whose groups are cut, of which one line of the log tells
        self._reuse: PromptReuse | None = None  # of the call that runs
        self._without_adapter = False
        self._placeholders = placeholder_ids(self.model_config.hf_config)
        self._model_type = self.model_config.hf_config.model_type
        self._verify_when = Schedule("off" if engine_config.forward_only else self.options.verify)
        self._updates = 0
        self._leaks = self._leaked = False

    # ----------------------------------------------------------------------------------------------------- the model

    def _build_module(self) -> nn.Module:
        """verl's, which patches model classes, with attention that packed rows can use."""
        remember_attention(self.model_config.hf_config)
        module = super()._build_module()
        fit_to_packed_rows(module)
        return module  # type: ignore[no-any-return]

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Enable sharing on the finished model, adapters included, before verl wraps it."""
        if self.options.self_check and self.use_ulysses_sp:
            self.gate.warn(_NO_SELF_CHECK_UNDER_ULYSSES)
        self.gate.enable([module], [*lost_attention(module), *self._why_not_by_this_engine(module)])
        for note in self.gate.reports[0].notes:
            self.gate.warn(note)
        return super()._build_fsdp_module(module)

    def _self_check(self) -> None:
        """Before the first batch, on all ranks, as FSDP demands, and under autocast, as verl's forwards are."""
        device = torch.device(get_device_name())
        with autocast(device, self._autocast_dtype), numbered_rows(self.module):
            self.gate.self_check(self.module, device)

    def _announce(self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool) -> None:
        """One line with the first batch, the actor's first update, that says what this engine shares."""
        only_scores = self.engine_config.forward_only
        if self._announced or (forward_only and not only_scores) or self._why_not_share(data) is not None:
            return
        self._announced = True
        sizes = row_sizes(data, self._placeholders, self._min_level)
        limit = Limits.of(data, self._pass, self.ulysses_sequence_parallel_size)
        together, group = rows_together(sizes, limit)
        stay, cut = self._why_rows_stay(loss_function, data), why_groups_are_cut(sizes, limit)
        reason = stay or self._why_not_reuse(data, loss_function, forward_only)
        limits = [*self.gate.reports[0].notes, stay]
        if cut is not None and reason is not None:
            limits.append(cut if stay else _not_reused(cut, reason))
        reuses = " and reuse one forward of it" if cut and not reason else ""
        self.gate.announce(
            f"the {'reference policy' if only_scores else 'actor'}'s micro-batches ({limit}) hold up to {together} of the "
            f"{group} rows of a prompt{reuses}, {'rows stay where verl puts them' if stay else 'rows are regrouped'} "
            f"(regroup={self.options.regroup})",
            [text for text in limits if text is not None],
        )

    def _why_not_by_this_engine(self, module: nn.Module) -> list[str]:
        """Why this engine cannot share on a model that can be shared elsewhere."""
        reasons = self._why_not_with_images(module) if self._sees_images(module) else []
        if self.use_ulysses_sp and Anatomy(module).mixers:
            reasons.append(
                "layers that run on whole rows cannot be shared under Ulysses, which leaves each process a piece of them"
            )
        return reasons

    def _sees_images(self, module: nn.Module) -> bool:
        return hasattr(getattr(transformers_model(module), "config", None), "vision_config")

    @property
    def _min_level(self) -> int | None:
        """Tokens of the shortest level of responses that is shared; None where prompts are shared alone."""
        return self.gate.min_level(self.options.share, get_device_name())

    @property
    def _waits_for_towers(self) -> bool:
        """Whether a vision tower runs on the ranks with images only, and others have to wait."""
        has_others = dist.get_world_size(self.get_data_parallel_group()) > 1
        return bool(self._placeholders) and not known_of(self._model_type).verls_forward and has_others

    def _why_not_with_images(self, module: nn.Module) -> list[str]:
        kind, reasons = self._model_type, []
        if leaves_images_out(module):
            reasons.append(f"verl's fused kernels leave the images of {kind} out of the forward")
        elif has_verls_forward(module) and not known_of(kind).compared_in_verl:
            reasons.append(f"verl has a forward of its own for {kind}, which no test has compared with packed rows")
        if self.use_ulysses_sp and not known_of(kind).verls_forward:
            reasons.append(f"verl does not cut the rows of {kind} for Ulysses, as it does for the families it knows")
        return reasons

    # ----------------------------------------------------------------------------------------------------- the batch

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """verl's, with micro-batches that keep groups whole and count each prompt once.

        Adds ``prefix_grouper/*`` to the metrics.
        """
        if self.gate.needs_self_check(self.module):
            self._self_check()
        self._name_sharding(loss_function)
        self._pass = self._pass_of(forward_only)
        mend_positions(data)
        self._announce(data, loss_function, forward_only)
        with torch.set_grad_enabled(not forward_only):
            if self.gate.needs_first_batch(self.module):
                self._compare_first_batch(data, forward_only)
        if not forward_only:
            if self._verify_when.is_due(self._updates):
                self._verify(data, loss_function)
            self._updates += 1
        self.sharing.take()
        output = self._run(data, loss_function, forward_only)
        counts = self.sharing.take().summed(get_device_name(), self.get_data_parallel_group())
        self.sharing.warn_of(counts)
        self.forwarded = counts.total
        counts += PrefixGrouperEngine._log_prob_counts
        PrefixGrouperEngine._log_prob_counts = counts if forward_only else SharingCounts()
        metrics = counts.metrics()
        # verl collects metrics as one list from each rank
        output["metrics"].update({name: [value] for name, value in metrics.items()})
        return output

    def _pass_of(self, forward_only: bool) -> str:
        """What verl runs this engine for."""
        if not forward_only:
            return UPDATE
        return REF_LOG_PROB if self.engine_config.forward_only or self._without_adapter else OLD_LOG_PROB

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """verl's, in which it computes the log-probs of a reference policy that is the actor without its adapter."""
        self._without_adapter = True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._without_adapter = False

    def _name_sharding(self, loss_function: Any) -> None:
        """Losses of verl that choose their code by the actor's strategy (top-k distillation) know fsdp and fsdp2 only."""
        config = getattr(loss_function, "keywords", {}).get("config")
        if getattr(config, "strategy", None) == STRATEGY:
            object.__setattr__(config, "strategy", self.engine_config.strategy)

    def _run(self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool) -> dict[str, Any]:
        dynamic = tu.get_non_tensor_data(data, "use_dynamic_bsz", True)
        try:
            with self._planning(loss_function, forward_only):
                output = super().forward_backward_batch(data, loss_function, forward_only=forward_only)
            if self._reuse is not None:
                self._reuse.leave()
            return output  # type: ignore[no-any-return]
        finally:
            self._reuse = None
            tu.assign_non_tensor(data, use_dynamic_bsz=dynamic)  # see _planning

    @contextmanager
    def _planning(self, loss_function: Callable[..., Any] | None, forward_only: bool) -> Iterator[None]:
        """Let verl's batch loop cut micro-batches by our plan: it looks the function up in its module."""
        stock = fsdp.prepare_micro_batches

        def planned(data: TensorDict, dp_group: Any = None, **kwargs: Any) -> tuple[list[TensorDict], Any]:
            plan = None
            if self._may_move_rows(loss_function, data):
                plan = self._plan(data, dp_group, self._why_not_reuse(data, loss_function, forward_only))
            if plan is None:
                micro_batches, order = stock(data=data, dp_group=dp_group, **kwargs)
            else:
                tu.assign_non_tensor(data, use_dynamic_bsz=True)  # verl restores the order of rows only then
                order = plan.micro_batches
                micro_batches = [tu.index_select_tensor_dict(data, rows) for rows in order]
                self._reuse = self._reuse_by(plan)
            if self._waits_for_towers:
                add_dummy_images(micro_batches, self._placeholders, dp_group)
            return micro_batches, order

        fsdp.prepare_micro_batches = planned
        try:
            yield
        finally:
            fsdp.prepare_micro_batches = stock

    def _may_move_rows(self, loss_function: Callable[..., Any] | None, data: TensorDict) -> bool:
        """Whether rows may go to another micro-batch than verl would put them in."""
        reason = self._why_rows_stay(loss_function, data)
        if reason is not None and self.options.regroup != "none":
            self.gate.warn(f"{reason}, so rows stay where verl puts them and share less")
        return reason is None

    def _why_rows_stay(self, loss_function: Callable[..., Any] | None, data: TensorDict) -> str | None:
        if self.options.regroup == "group":
            return None
        if self.options.regroup == "none":
            return "prefix_grouper.regroup=none"
        knows_global_batch = tu.get_non_tensor_data(data, "global_batch_size", None) is not None
        return why_rows_stay(loss_function, knows_global_batch=knows_global_batch)

    def may_change_steps(self, loss_function: Callable[..., Any] | None) -> bool:
        """Whether rows that verl would shuffle over the optimizer steps may come to others, group by group."""
        if self.options.regroup == "auto":
            return why_rows_stay(loss_function) is None
        return self.options.regroup == "group"

    def _plan(self, data: TensorDict, dp_group: Any, why_not_reuse: str | None) -> Plan | None:
        """The micro-batches, as many on every data-parallel rank; None where some rank cannot share."""
        # A reference policy that is the actor without its adapter has the limits of the actor's own log-probs.
        options = OLD_LOG_PROB if self._without_adapter else self._pass
        limits = Limits.of(data, options, self.ulysses_sequence_parallel_size)
        sizes = None if self._why_not_share(data) else row_sizes(data, self._placeholders, self._min_level)
        longest = int(data["input_ids"].offsets().diff().max())
        plan = plan_on_all_ranks(sizes, longest, limits, dp_group, reuses=why_not_reuse is None)
        repeats = plan is not None and not plan.runs
        if sizes and repeats and self._pass not in self._cut and (notice := why_groups_are_cut(sizes, limits)):
            self._cut.add(self._pass)
            self.gate.warn(f"{self._pass}: {_not_reused(notice, why_not_reuse or _NOTHING_TO_REUSE)}")
        return plan

    def _why_not_reuse(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> str | None:
        """Why parts of a group do not reuse its prompt."""
        return why_not_reuse(self, loss_function, gradients=not forward_only) or why_not_reuse_rows(data)

    def _reuse_by(self, plan: Plan) -> PromptReuse | None:
        if not any(plan.ends) and not plan.runs:
            return None
        context = functools.partial(autocast, torch.device(get_device_name()), self._autocast_dtype)
        defers = getattr(self.engine_config, "use_no_sync_for_gradient_accumulation", True)
        return PromptReuse(self.module, plan, context, syncs_always=not defers)

    def _why_not_share(self, data: TensorDict) -> str | None:
        """Why rows of ``data`` go the ordinary way, None where they are shared."""
        if self.gate.reason is not None:
            return self.gate.reason
        if tu.get_non_tensor_data(data, "distillation_use_topk", False):
            return "top-k distillation reads logits at every row's own positions"
        if isinstance(data["temperature"], Tensor):
            return "each row has a temperature of its own"
        if "prompts" not in data:
            return "the batch does not say where prompts end (`prompts` is missing)"
        inputs = row_inputs(data)
        if not any(inputs):  # text: nothing to wait for the device for
            return None
        lengths = data["input_ids"].offsets().diff().tolist()
        return why_not_share(inputs, lengths, self._placeholders, self._model_type)

    # ----------------------------------------------------------------------------------------------- one micro-batch

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's, for the packed row; the ordinary ones where a micro-batch cannot be shared."""
        reason, packed = self._packed(micro_batch)
        if packed is None:
            if self._reuse is not None:
                self._reuse.refuse(str(reason))
            lengths = micro_batch["input_ids"].offsets().diff().tolist()
            self.sharing.count_fallback(str(reason), lengths, during=self._pass)
            return self._ordinary_inputs(micro_batch)
        if packed.some_share_nothing:
            self.gate.warn("rows with an image in the response, or at the very end of the prompt, share nothing")
        if self._reuse is not None:
            packed = self._reuse.enter(packed)
        self.sharing.count_packed(packed.counts, during=self._pass)
        inputs, output_args = super().prepare_model_inputs(packed.surrogate)
        width = packed.layout.num_given + packed.num_tokens
        layout = self._leaking_layout(packed.layout) if self._leaks else packed.layout
        layout = layout.pad_to(width + output_args.get("pad_size", 0))
        labels = pad(packed.labels, (0, layout.num_padding))
        travelling: PrefixLayout | ShardedLayout = layout
        if self.use_ulysses_sp:
            labels = ulysses_pad_and_slice_inputs(labels[None], sp_size=self.ulysses_sequence_parallel_size)[0][0]
            travelling = ShardedLayout(layout, self.ulysses_parallel_group)
        output_args["input_ids_rmpad_rolled"] = labels
        if tu.get_non_tensor_data(micro_batch, "use_fused_kernels", False):
            inputs["shift_labels"] = labels[None]
        for lengths in ("cu_seqlens", "cu_seqlens_cpu"):  # for verl's gated delta nets: those of one long row
            inputs.pop(lengths, None)
        inputs.update(packed.images)
        inputs.update(packed.token_inputs(self._model_type, layout))
        inputs.update(layout_inputs(travelling, labels.device))
        inputs.update(without_router_loss(self.module))  # verl's losses do not read it
        output_args["packed"] = packed
        return inputs, output_args

    def _packed(self, micro_batch: TensorDict) -> tuple[str | None, PackedMicroBatch | None]:
        """Why ``micro_batch`` takes the ordinary path, or else its packed row."""
        if (reason := self._why_not_share(micro_batch)) is not None:
            return reason, None
        packed = PackedMicroBatch(micro_batch, self._placeholders, self._min_level)
        reason = packed.reason_not_to_share
        return (None, packed) if reason is None else (reason, None)

    def _ordinary_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's, of rows with images that it may not be able to concatenate."""
        images = row_inputs(micro_batch)
        if not any(images) or known_of(self._model_type).verls_forward:
            return super().prepare_model_inputs(micro_batch)  # type: ignore[no-any-return]
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        if why_not_share(images, lengths, self._placeholders, self._model_type) is not None:
            return super().prepare_model_inputs(micro_batch)  # type: ignore[no-any-return]
        padded = not tu.get_non_tensor_data(micro_batch, "use_remove_padding", True)
        inputs, output_args = super().prepare_model_inputs(joined(micro_batch, lengths, padded))
        if TOKEN_TYPES in inputs:
            types = inputs[TOKEN_TYPES].to(inputs["input_ids"].device)
            inputs[TOKEN_TYPES] = pad(types, (0, inputs["input_ids"].shape[1] - types.shape[1]))
        return inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """verl's of the packed row, spread over the rows of ``micro_batch``: nested ``[rows, L_i]``, zero at the end."""
        packed = output_args.pop("packed", None)
        if packed is None:
            return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)  # type: ignore[no-any-return]
        outputs = super().prepare_model_outputs(output, output_args, packed.surrogate, logits_processor_func)
        values = {name: nested.values() for name, nested in outputs.items()}
        if self._reuse is not None:
            values = self._reuse.outputs(packed, values)
        return {name: packed.unpack(name, of_tokens) for name, of_tokens in values.items()}

    # -------------------------------------------------------------------------------------------------- verification

    @contextmanager
    def _comparing(self, reason: str | None) -> Iterator[None]:
        """Forwards in here are not counted; with a ``reason`` they take the ordinary path."""
        sharing, self.sharing = self.sharing, SharingMeter(warn=False)
        before, self.gate.reason = self.gate.reason, reason
        try:
            yield
        finally:
            self.gate.reason, self.sharing = before, sharing

    def _compare_first_batch(self, data: TensorDict, forward_only: bool) -> None:
        """For a model class that no test has compared: forward a first micro-batch on both paths.

        Every rank comes here with its first update, and with the first log-prob pass before that, whose results the update
        would use. A rank whose rows take the ordinary path runs that twice, as a sharded model needs all ranks.
        """
        micro_batch = self._one_micro_batch(data)
        reason, _ = self._packed(micro_batch)

        def score(reason: str | None) -> Tensor:
            found: list[Tensor] = []

            def keep(model_output: dict[str, Tensor], **_: Any) -> tuple[Tensor, dict[str, Any]]:
                found.append(model_output["log_probs"].values()[None])
                return torch.zeros(()), {}

            with self._comparing(reason):
                self.forward_step(micro_batch, keep, forward_only=forward_only)
            return found[0]

        def backward(objective: Tensor) -> dict[str, Tensor]:
            with self._gradient_sync_context(is_last_micro_batch=True):
                objective.backward()
            gradients = local_gradients(self.module)
            self.optimizer_zero_grad()
            return gradients

        offsets = micro_batch["input_ids"].offsets().to(get_device_name())
        mask = torch.ones(1, int(offsets[-1]), dtype=torch.bool, device=offsets.device)
        mask[:, offsets[1:] - 1] = False  # nothing follows the last token of a row
        self.gate.first_batch(
            self.module,
            lambda _: score("the ordinary half of the comparison"),
            {} if reason is not None else {"packed": lambda _: score(None)},
            mask,
            backward,
        )

    def _one_micro_batch(self, data: TensorDict) -> TensorDict:
        """Rows of ``data`` that the memory of one micro-batch suffices for on the ordinary path too. A collective."""
        group, lengths = self.get_data_parallel_group(), data["input_ids"].offsets().diff().tolist()
        plan = self._plan(data, group, self._why_not_reuse(data, None, forward_only=True))
        limits = Limits.of(data, self._pass, self.ulysses_sequence_parallel_size)
        rows = list(range(len(lengths)))[: limits.max_rows] if plan is None else plan.micro_batches[0]
        micro_batches = [tu.index_select_tensor_dict(data, rows_within(rows, lengths, limits.max_tokens))]
        if self._waits_for_towers:
            add_dummy_images(micro_batches, self._placeholders, group)
        return micro_batches[0]

    def _verify(self, data: TensorDict, loss_function: Callable[..., Any] | None) -> None:
        """Compare loss and gradients of this update on the ordinary path and on the shared one, and with a leak.

        The leak of one key is the negative control: its size says what the comparison would have noticed.

        Raises:
            RuntimeError: they differ by more than rounding explains.
        """
        base, start = transformers_model(self.module) or self.module, time.perf_counter()
        try:
            with untouched(base, torch.device(get_device_name())), without_dropout():
                loss, ordinary = self._whole_update(data, loss_function, "the ordinary half of the verification")
                self.optimizer_zero_grad()
                ours, _ = self._whole_update(data, loss_function, self.gate.reason)
                difference = check_gradients(self.module, ordinary, self._autocast_dtype)
                self.optimizer_zero_grad()
                leak = self._difference_of_a_leak(data, loss_function, ordinary)
        finally:
            self.optimizer_zero_grad()
        if difference == 0:  # every advantage is zero, so this update would prove nothing
            return
        self._verify_when.done()
        control = "no two rows are side by side, so no key could be leaked to see what an error would do"
        if leak is not None:
            control = f"a leak of one key would have shown as {leak:.1e} in gradients"
        self.gate.warn(
            f"verified: the gradients of update {self._updates}, shared and ordinary, differ by {difference:.1e}, the loss on "
            f"rank 0 by {abs(ours - loss):.1e} ({time.perf_counter() - start:.2f} s); {control}"
        )

    def _whole_update(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, reason: str | None
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of all micro-batches; with a ``reason`` on the ordinary path."""
        torch.manual_seed(0)
        with self._comparing(reason):
            output = self._run(data, loss_function, forward_only=False)
        return sum(output["loss"]), local_gradients(self.module)

    def _difference_of_a_leak(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, ordinary: dict[str, Tensor]
    ) -> float | None:
        """How far gradients are from the ``ordinary`` ones where each micro-batch leaks a key; None where none could."""
        self._leaks, self._leaked = True, False
        try:
            self._whole_update(data, loss_function, self.gate.reason)
        finally:
            self._leaks = False
        difference = gradient_difference(self.module, ordinary)  # which all ranks take part in
        return difference if on_any_rank(self._leaked, torch.device(get_device_name())) else None

    def _leaking_layout(self, layout: PrefixLayout) -> PrefixLayout:
        if (leaking := leak_one_key(layout)) is None:
            return layout
        self._leaked = True
        return leaking
