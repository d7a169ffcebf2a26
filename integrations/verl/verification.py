"""The engine against itself: verl's own path and the shared one on the same rows, which have to agree.

The first micro-batch of a model class that no test has compared, and, by the option ``verify``, whole updates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from prefix_grouper_plugins.integrations.verl.planning import rows_within
from prefix_grouper_plugins.integrations.verl.vision.dummy_image import add_dummy_images
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.metrics import SharingMeter
from prefix_grouper_plugins.modeling import Anatomy, transformers_model
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.self_check import on_any_rank
from prefix_grouper_plugins.modeling.self_check.gradients import (
    check_gradients,
    gradient_difference,
    local_gradients,
)
from prefix_grouper_plugins.modeling.self_check.isolation import untouched, without_dropout
from prefix_grouper_plugins.modeling.self_check.layers import where_paths_part
from prefix_grouper_plugins.modeling.self_check.leak import leak_one_key
from prefix_grouper_plugins.modeling.self_check.schedule import Schedule
from prefix_grouper_plugins.sharing import SharingGate

_ORDINARY = "the ordinary half of the verification"


def why_no_reference(anatomy: Anatomy) -> str | None:
    """Why verl's own path under Ulysses is no reference for a model; None if it is.

    verl exchanges the pieces of a row around transformers' flash attention. Other implementations see one piece alone.
    """
    others = {layer.implementation for layer in anatomy.attention_layers if "flash" not in layer.implementation}
    if not others:
        return None
    return (
        f"with attn_implementation={min(others)} verl's own path under Ulysses lets no token see those of another rank, so it "
        "is wrong, and prefix_grouper.verify has nothing to compare with: install flash-attn and set "
        "attn_implementation=flash_attention_2"
    )


class ComparesPaths:
    """A part of :class:`.engine.PrefixGrouperEngine`."""

    # Of the engine.
    gate: SharingGate
    sharing: SharingMeter
    module: Any
    _run: Callable[..., dict[str, Any]]
    _packed: Callable[..., Any]
    _plan: Callable[..., Any]
    _limits: Callable[..., Any]
    _why_not_reuse: Callable[..., str | None]
    _gradient_sync_context: Callable[..., Any]
    _autocast_dtype: torch.dtype
    _verify_when: Schedule
    _updates: int
    _placeholders: Any
    _model_type: str
    forward_step: Callable[..., Any]
    optimizer_zero_grad: Callable[[], None]
    get_data_parallel_group: Callable[[], Any]

    _score = "log_probs"  # the output of the model that a first batch is compared by
    _forward_last = False  # whether the model's output at the last token of a row is read
    _leaks = _leaked = False
    _compares = False  # whether all is packed that can be, for a comparison, even where it does not pay

    @property
    def _waits_for_towers(self) -> bool:
        """Whether a vision tower runs on the ranks with images only, and others have to wait."""
        has_others = dist.get_world_size(self.get_data_parallel_group()) > 1
        return bool(self._placeholders) and not known_of(self._model_type).verls_forward and has_others

    @contextmanager
    def _comparing(self, reason: str | None) -> Iterator[None]:
        """Forwards in here are not counted; with a ``reason`` they take the ordinary path, else all are packed that can be."""
        sharing, self.sharing = self.sharing, SharingMeter(warn=False)
        before, self.gate.reason = self.gate.reason, reason
        self._compares = True
        try:
            yield
        finally:
            self._compares = False
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
                found.append(model_output[self._score].values()[None])
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
        mask[:, offsets[1:] - 1] = self._forward_last  # else nothing follows it
        self.gate.first_batch(
            self.module,
            lambda _: score("the ordinary half of the comparison"),
            {} if reason is not None else {"packed": lambda _: score(None)},
            mask,
            backward,
            scores=self._score.replace("_", "-"),
        )

    def _one_micro_batch(self, data: TensorDict) -> TensorDict:
        """Rows of ``data`` that the memory of one micro-batch suffices for on the ordinary path too, to be scored. A collective."""
        group, lengths = self.get_data_parallel_group(), data["input_ids"].offsets().diff().tolist()
        plan, limits = self._plan(data, group, self._why_not_reuse(data, None, forward_only=True)), self._limits(data)
        rows = list(range(len(lengths))) if plan is None else plan.micro_batches[0]
        micro_batches = [tu.index_select_tensor_dict(data, rows_within(rows, lengths, limits))]
        if self._waits_for_towers:
            add_dummy_images(micro_batches, self._placeholders, group)
        micro_batch = micro_batches[0]
        tu.assign_non_tensor(micro_batch, distillation_use_topk=False, distillation_only=False)
        return micro_batch

    def _verify(self, data: TensorDict, loss_function: Callable[..., Any] | None) -> None:
        """Compare loss and gradients of this update on the ordinary path and on the shared one, and with a leak.

        The leak of one key is the negative control: its size says what the comparison would have noticed.

        Raises:
            RuntimeError: they differ by more than rounding explains.
        """
        base, start = transformers_model(self.module) or self.module, time.perf_counter()
        try:
            with untouched(base, torch.device(get_device_name())), without_dropout():
                loss, ordinary = self._whole_update(data, loss_function, _ORDINARY)
                self.optimizer_zero_grad()
                ours, _ = self._whole_update(data, loss_function, self.gate.reason)
                try:
                    difference = check_gradients(self.module, ordinary, self._autocast_dtype)
                except RuntimeError as error:  # on all ranks
                    raise RuntimeError(f"{error}. {self._where_it_starts(data)}") from None
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

    def _where_it_starts(self, data: TensorDict) -> str:
        """The decoder layer in which the two paths of a micro-batch begin to differ, in words. A collective: three forwards."""
        micro_batch = self._one_micro_batch(data)

        def forward(reason: str | None) -> None:
            with self._comparing(reason):
                self.forward_step(micro_batch, lambda **_: (torch.zeros(()), {}), forward_only=True)

        anatomy = Anatomy(self.module)
        found = where_paths_part(anatomy, lambda: forward(_ORDINARY), lambda: forward(None), self._autocast_dtype)
        if found is None:
            return "The layer in which that starts could not be found"
        if found.layer is None:
            return f"In a forward of one micro-batch {found}, so it starts in a backward pass or in other rows"
        return f"In a forward of one micro-batch {found}"

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
        leaking = leak_one_key(layout) if self._leaks else None
        if leaking is None:
            return layout
        self._leaked = True
        return leaking
