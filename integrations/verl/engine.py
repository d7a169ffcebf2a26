"""The engine: verl's FSDP engine with each prompt of a micro-batch laid out once.

Re-pack, then delegate. A micro-batch becomes one packed row (:mod:`.micro_batch`), which verl's own code then takes for a
micro-batch of a single row: removal of padding, Ulysses slices, fused kernels, entropy, temperature and the loss are
verl's, unchanged. Two things are ours: the attention, which meets the layout in every layer, and the labels, since in a
packed row the token that follows in the text is not always the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import pad
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.ulysses import ulysses_pad_and_slice_inputs

from prefix_grouper_plugins.integrations.verl.config import SETTINGS, SHARDINGS, PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.distillation import topk_outputs, uses_topk, why_not_topk
from prefix_grouper_plugins.integrations.verl.losses import why_rows_stay
from prefix_grouper_plugins.integrations.verl.micro_batch import (
    PackedMicroBatch,
    lengths_of_rows_apart,
    mend_positions,
    row_sizes,
    why_positions_jump,
)
from prefix_grouper_plugins.integrations.verl.planning import (
    Limits,
    Plan,
    plan_on_all_ranks,
    rows_together,
    tokens_of_rows,
    why_groups_are_cut,
    why_levels_are_repeated,
)
from prefix_grouper_plugins.integrations.verl.reuse import (
    PromptReuse,
    autocast,
    positions_differ,
    why_not_reuse,
    why_not_reuse_rows,
)
from prefix_grouper_plugins.integrations.verl.switch import STRATEGY, raise_failures, show_what_is_decided
from prefix_grouper_plugins.integrations.verl.verification import ComparesPaths, why_no_reference
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
)
from prefix_grouper_plugins.micro_batches import RowSize
from prefix_grouper_plugins.modeling import (
    Anatomy,
    ShardedLayout,
    layout_inputs,
    transformers_model,
    without_router_loss,
)
from prefix_grouper_plugins.modeling.gradient_hooks import hooked_weight
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.self_check.schedule import Schedule
from prefix_grouper_plugins.sharing import SharingGate
from prefix_grouper_plugins.token_budget import remark_on_ordinary

_NO_SELF_CHECK_UNDER_ULYSSES = (
    "no self-check: Ulysses cuts rows into pieces, and the few tokens of the check are too short for that; "
    "prefix_grouper.verify=first compares the first update"
)


_NOTHING_TO_REUSE = "another rank's rows cannot, or the prompts have one token, which is forwarded with each response"


def _not_reused(notice: str, reason: str) -> str:
    return f"{notice} (its parts do not reuse one forward of it: {reason})"


def gate_of(
    options: PrefixGrouperOptions, ulysses: bool, is_main: bool = True, settings: str = SETTINGS
) -> SharingGate:
    """The gate of an engine with ``options``, which ``settings`` are. Under Ulysses no process has whole rows to self-check."""

    def refusal(reasons: str) -> str:
        return (
            f"{reasons}. To train without sharing, leave model_engine=prefix_grouper out or set "
            f"{settings}.on_unsupported=fallback"
        )

    return SharingGate(
        backend=options.backend,
        self_check=options.self_check and not ulysses,
        on_unsupported=options.on_unsupported,
        refusal=refusal,
        is_main=is_main,
    )


class PrefixGrouperEngine(ComparesPaths, fsdp.FSDPEngineWithLMHead):
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
    unlogged: ClassVar[Any] = SimpleNamespace(counts=SharingCounts())
    settings = SETTINGS
    _positions_jump: str | None = None  # why no row of the call that runs is shared, by its positions

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        raise_failures()
        show_what_is_decided()
        self.options: PrefixGrouperOptions = getattr(engine_config, "prefix_grouper", None) or PrefixGrouperOptions()
        if engine_config.strategy not in SHARDINGS:
            # verl has chosen this class by now, and from here on reads the strategy to tell FSDP2 from FSDP1.
            object.__setattr__(engine_config, "strategy", self.options.sharding)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.gate = gate_of(self.options, self.use_ulysses_sp, self.rank == 0, self.settings)
        self.sharing = self.gate.meter
        self.forwarded = Counts()
        self._pass = UPDATE
        self._announced = False
        self._cut: set[str] = set()  # passes whose groups are cut, of which one line of the log tells
        self._reuse: PromptReuse | None = None  # of the call that runs
        self._rows_apart = False  # whether no two rows of the call that runs share anything
        self._max_tokens: int | None = None  # of its micro-batches, where they are planned here
        self._without_adapter = False
        self._placeholders = placeholder_ids(self.model_config.hf_config)
        self._model_type = self.model_config.hf_config.model_type
        self._verify_when = Schedule("off" if engine_config.forward_only else self.options.verify)
        self._updates = 0

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
        self.gate.say_what_differs()
        if self.use_ulysses_sp and (reason := why_no_reference(self.gate.anatomies[0])) is not None:
            self.gate.warn(reason)
            self._verify_when = Schedule("off")
        return super()._build_fsdp_module(module)

    def _check_model(self) -> None:
        """Before the first batch, and again where the model has changed.

        On all ranks, as FSDP demands, and under autocast, as verl's forwards are.
        """
        device = torch.device(get_device_name())
        with autocast(device, self._autocast_dtype), numbered_rows(self.module):
            if self.gate.needs_self_check(self.module):
                self.gate.self_check(self.module, device)
            self.gate.check_changes(self.module, device, alone=False)

    def _announce(self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool) -> None:
        """One line with the first batch, the actor's first update, that says what this engine shares."""
        only_scores = self.engine_config.forward_only
        if self._announced or (forward_only and not only_scores) or self._why_not_share(data) is not None:
            return
        self._announced = True
        sizes, limit = self._sizes(data), self._limits(data)
        stay = self._why_rows_stay(loss_function, data)
        together, group = rows_together(sizes, limit, stay=bool(stay))
        cut = why_groups_are_cut(sizes, limit, stay=bool(stay))
        reason = stay or self._why_not_reuse(data, loss_function, forward_only)
        limits = [*self.gate.reports[0].notes, stay]
        if cut is not None and reason is not None:
            limits.append(cut if stay else _not_reused(cut, reason))
        elif cut is not None and max(size.prompt + size.response for size in sizes) <= limit.max_tokens:
            limits.append(why_levels_are_repeated(sizes, limit, forward_last=self._forward_last))
        reuses = " and reuse one forward of it" if cut and not reason else ""
        self.gate.announce(
            f"the {self._role}'s micro-batches ({limit.setting if stay else limit}) hold up to {together} of the "
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

    @property
    def _role(self) -> str:
        return "reference policy" if self.engine_config.forward_only else "actor"

    def _sees_images(self, module: nn.Module) -> bool:
        return hasattr(getattr(transformers_model(module), "config", None), "vision_config")

    @property
    def _min_level(self) -> int | None:
        """Tokens of the shortest level of responses that is shared; None where prompts are shared alone."""
        return self.gate.min_level(self.options.share, get_device_name())

    def _why_not_with_images(self, module: nn.Module) -> list[str]:
        kind, reasons = self._model_type, []
        if leaves_images_out(module):
            reasons.append(f"verl's fused kernels leave the images of {kind} out of the forward")
        elif has_verls_forward(module) and not known_of(kind).compared_in_verl:
            reasons.append(f"verl has its own forward for {kind}, which no test has compared with packed rows")
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
        self._check_model()
        self._name_sharding(loss_function)
        self._pass = self._pass_of(forward_only)
        mend_positions(data)
        self._positions_jump = why_positions_jump(data)
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
        if not forward_only and self._updates == 1:
            update = counts.update
            if (remark := remark_on_ordinary(update.ordinary, update.forwards)) is not None:
                self.gate.warn(remark)
        counts += self.unlogged.counts
        self.unlogged.counts = counts if forward_only else SharingCounts()
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
            self._reuse, self._rows_apart, self._max_tokens = None, False, None
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
        reason = why_rows_stay(loss_function, knows_global_batch=knows_global_batch)
        if reason is None and loss_function is not None and (name := hooked_weight(self.module)) is not None:
            return f"a hook on {name} gets the gradient of each micro-batch"
        return reason

    def may_change_steps(self, loss_function: Callable[..., Any] | None) -> bool:
        """Whether rows that verl would shuffle over the optimizer steps may come to others, group by group."""
        if self.options.regroup == "auto":
            return why_rows_stay(loss_function) is None
        return self.options.regroup == "group"

    def _plan(self, data: TensorDict, dp_group: Any, why_not_reuse: str | None) -> Plan | None:
        """The micro-batches, as many on every data-parallel rank; None where some rank cannot share."""
        limits = self._limits(data)
        may_differ = why_not_reuse is not None  # rows that reuse prompts have been looked at
        shares = self._why_not_share(data) is None
        if shares and may_differ and positions_differ(data):
            shares = False
            self.gate.warn("rows of equal prompts number their tokens differently, so rows stay where verl puts them")
        sizes = self._sizes(data) if shares else None
        longest, reuses = int(data["input_ids"].offsets().diff().max()), why_not_reuse is None
        self._rows_apart = sizes is not None and not any(size.path for size in sizes)
        plan = plan_on_all_ranks(sizes, longest, limits, dp_group, reuses=reuses, forward_last=self._forward_last)
        self._max_tokens = None if plan is None else limits.max_tokens
        repeats = plan is not None and not plan.runs
        if sizes and repeats and self._pass not in self._cut and (notice := why_groups_are_cut(sizes, limits)):
            self._cut.add(self._pass)
            self.gate.warn(f"{self._pass}: {_not_reused(notice, why_not_reuse or _NOTHING_TO_REUSE)}")
        return plan

    def _limits(self, data: TensorDict) -> Limits:
        """Of a micro-batch of this pass."""
        return Limits.of(data, self._limited_as(data), self.ulysses_sequence_parallel_size)

    def _limited_as(self, data: TensorDict) -> str:
        """The pass whose limits hold for this one, see :meth:`Limits.of`."""
        # A reference policy that is the actor without its adapter has the limits of the actor's own log-probs.
        return OLD_LOG_PROB if self._without_adapter else self._pass

    def _sizes(self, data: TensorDict) -> list[RowSize]:
        return row_sizes(data, self._placeholders, self._min_level, forward_last=self._forward_last)

    def _why_not_reuse(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> str | None:
        """Why parts of a group do not reuse its prompt."""
        if uses_topk(data):
            return "top-k distillation reads logits"
        if tu.get_non_tensor_data(data, "return_model_output", False):
            return "return_model_output asks for log-probs of prompts"
        return why_not_reuse(self, loss_function, gradients=not forward_only) or why_not_reuse_rows(data)

    def _reuse_by(self, plan: Plan) -> PromptReuse | None:
        if not any(plan.ends) and not plan.runs:
            return None
        context = functools.partial(autocast, torch.device(get_device_name()), self._autocast_dtype)
        defers = getattr(self.engine_config, "use_no_sync_for_gradient_accumulation", True)
        return PromptReuse(self.module, plan, context, syncs_always=not defers, settings=self.settings)

    def _why_not_share(self, data: TensorDict) -> str | None:
        """Why rows of ``data`` go the ordinary way, None where they are shared."""
        if self.gate.reason is not None:
            return self.gate.reason
        if (reason := why_not_topk(data, ulysses=self.use_ulysses_sp)) is not None:
            return reason
        if isinstance(data["temperature"], Tensor):
            return "each row has its own temperature"
        if self._positions_jump is not None:
            return self._positions_jump
        if (reason := self._why_not_rows_so_long(data)) is not None:
            return reason
        if "prompts" not in data:
            return "the batch does not say where prompts end (`prompts` is missing)"
        inputs = row_inputs(data)
        if not any(inputs):  # text: nothing to wait for the device for
            return None
        lengths = data["input_ids"].offsets().diff().tolist()
        return why_not_share(inputs, lengths, self._placeholders, self._model_type)

    def _why_not_rows_so_long(self, data: TensorDict) -> str | None:
        limit = min((limit for anatomy in self.gate.anatomies for limit in anatomy.row_limits), default=None)
        longest = 0 if limit is None else int(data["input_ids"].offsets().diff().max())
        if limit is None or longest < limit.length:
            return None
        return f"a row has {longest} tokens, and from {limit.length} on rope_type {limit.kind!r} changes the angles of all rows of a batch"

    # ----------------------------------------------------------------------------------------------- one micro-batch

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        """verl's, for the packed row; the ordinary ones where a micro-batch cannot be shared."""
        if (apart := self._lengths_of_rows_apart(micro_batch)) is not None:
            self.sharing.count_rows(apart, during=self._pass)
            return self._ordinary_inputs(micro_batch)
        reason, packed = self._packed(micro_batch)
        if packed is None:
            if self._reuse is not None:
                self._reuse.refuse(str(reason))
            lengths = micro_batch["input_ids"].offsets().diff().tolist()
            self.sharing.count_fallback(str(reason), lengths, during=self._pass)
            return self._ordinary_inputs(micro_batch)
        if not self._packs_all(packed.row_lengths, micro_batch) and not packed.pays:
            self.sharing.count_rows(packed.row_lengths, during=self._pass)
            return self._ordinary_inputs(micro_batch)
        if packed.some_share_nothing:
            self.gate.warn("rows with an image in the response, or at the very end of the prompt, share nothing")
        if self._reuse is not None:
            packed = self._reuse.enter(packed)
        self.sharing.count_packed(packed.counts, during=self._pass)
        inputs, output_args = super().prepare_model_inputs(packed.surrogate)
        width = packed.layout.num_given + packed.num_tokens
        layout = self._leaking_layout(packed.layout)
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

    def _lengths_of_rows_apart(self, micro_batch: TensorDict) -> list[int] | None:
        """Tokens of rows that share nothing, where that is known before they are laid out, and that it does not pay to pack."""
        if not (self._rows_apart or len(micro_batch) == 1) or self._why_not_share(micro_batch) is not None:
            return None
        lengths = lengths_of_rows_apart(micro_batch, forward_last=self._forward_last)
        return None if lengths is None or self._packs_all(lengths, micro_batch) else lengths

    def _packs_all(self, lengths: list[int], micro_batch: TensorDict) -> bool:
        """Whether rows of ``lengths`` are packed even where it does not pay: verl's forward of them would be wrong, or too large."""
        if self._compares or self._reuse is not None:
            return True
        removes_padding = tu.get_non_tensor_data(micro_batch, "use_remove_padding", True)
        if self._max_tokens is not None and tokens_of_rows(lengths, removes_padding) > self._max_tokens:
            return True
        anatomy = self.gate.anatomies[0]
        if self.use_ulysses_sp:
            return why_no_reference(anatomy) is not None
        # In some layers that mix tokens in another way than attention, states leak from one row to the next in verl.
        return bool(anatomy.mixers) and removes_padding and len(lengths) > 1

    def _packed(self, micro_batch: TensorDict) -> tuple[str | None, PackedMicroBatch | None]:
        """Why ``micro_batch`` takes the ordinary path, or else its packed row."""
        if (reason := self._why_not_share(micro_batch)) is not None:
            return reason, None
        packed = PackedMicroBatch(micro_batch, self._placeholders, self._min_level, forward_last=self._forward_last)
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
        found = {name: packed.unpack(name, of_tokens) for name, of_tokens in values.items()}
        if uses_topk(micro_batch):
            found |= topk_outputs(output.logits, packed, micro_batch, logits_processor_func)
        return found
