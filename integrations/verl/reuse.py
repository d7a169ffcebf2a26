"""The prompt once per optimizer step: micro-batches of one call that hold parts of a group reuse its prompt.

The plan (:mod:`.planning`) puts the parts of a group that is larger than a micro-batch one after the other. In an update
the prompt is forwarded before the first of them, and its backward comes with that of the last one; in between, its keys and
values are kept (:class:`~prefix_grouper_plugins.modeling.prompt_cache.PromptCache`). Without gradients the first part's own
forward, prompt included, leaves the keys and values behind.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from prefix_grouper_plugins.integrations.verl.losses import why_prompts_are_read
from prefix_grouper_plugins.integrations.verl.micro_batch import PackedMicroBatch, row_lengths
from prefix_grouper_plugins.integrations.verl.planning import Plan
from prefix_grouper_plugins.integrations.verl.vision.model_patches import has_verls_forward
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling import is_multimodal, reuse_conditions, transformers_model
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.prompt_reuse import MatchedForwards, OpenPrompts


def why_not_reuse(engine: Any, loss_function: Any, *, gradients: bool) -> str | None:
    """Why parts of a group do not reuse its prompt; None if they do, where rows may change their micro-batch.

    Args:
        engine: a :class:`~prefix_grouper_plugins.integrations.verl.PrefixGrouperEngine`.
        loss_function: as verl's engines take it.
        gradients: whether the pass has them.
    """
    if engine.use_ulysses_sp:
        return "Ulysses cuts rows into pieces"
    if mixers := engine.gate.anatomies[0].mixers:
        return f"{type(mixers[0][1]).__name__} mixes tokens past the attention interface"
    if engine.model_config.enable_activation_offload:
        return "enable_activation_offload moves activations in the order of whole forwards"
    if (reason := why_prompts_are_read(loss_function)) is not None:
        return reason
    if unverified := engine.gate.reports[0].unverified:
        return "; ".join(unverified)
    config = transformers_model(engine.module).config
    if is_multimodal(config) and not has_verls_forward(engine.module):
        return f"verl does not run the vision tower of {config.model_type} where a micro-batch has no images"
    with torch.set_grad_enabled(gradients):
        return reuse_conditions.why_not_reuse(engine.module, engine.gate.anatomies[0])


def why_not_reuse_rows(data: TensorDict) -> str | None:
    """Why rows of ``data``, which are shared, do not reuse prompts; None if they do."""
    if "prompts" not in data:  # and nothing is shared
        return None
    lengths, prompt_lengths = row_lengths(data)
    if any(length <= prompt for length, prompt in zip(lengths, prompt_lengths, strict=True)):
        return "a row has an empty response"
    if data["position_ids"].dim() == 3:
        return _why_positions_differ(data, prompt_lengths)
    return None if _count_from_0(data) else "rows have positions that do not count from 0"


def positions_differ(data: TensorDict) -> bool:
    """Whether rows of equal prompts number their tokens differently, so that micro-batches of them cannot be shared."""
    return (
        "prompts" in data and not _count_from_0(data) and _why_positions_differ(data, row_lengths(data)[1]) is not None
    )


def _count_from_0(data: TensorDict) -> bool:
    """Whether each row has positions 0, 1, 2 and so on."""
    positions, offsets = data["position_ids"], data["input_ids"].offsets()
    if positions.dim() == 3:
        return False
    counted = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(offsets.diff())
    return torch.equal(positions.values(), counted.to(positions.values()))


def _why_positions_differ(data: TensorDict, prompt_lengths: Sequence[int]) -> str | None:
    """Whether rows of equal prompts have unequal positions ``[L]`` or ``[4, L]`` there, so that parts would not be of one prompt."""
    ends = data["input_ids"].offsets().tolist()
    ids, positions = data["input_ids"].values().cpu(), data["position_ids"].values().cpu()
    found: dict[bytes, bytes] = {}
    for start, length in zip(ends, prompt_lengths, strict=False):
        prompt = slice(start, start + length)
        own = positions[..., prompt].numpy().tobytes()
        if found.setdefault(ids[prompt].numpy().tobytes(), own) != own:
            return "rows of equal prompts number their tokens differently"
    return None


class PromptReuse:
    """The micro-batches of one call, one after the other.

    Args:
        module: the model as verl has sharded it.
        plan: of the call.
        autocast: makes the context in which verl runs the model.
        syncs_always: whether gradients are reduced over the ranks in every micro-batch, and not in the last one alone.
        settings: where users set those of the engine.
    """

    def __init__(self, module: nn.Module, plan: Plan, autocast: Any, syncs_always: bool, settings: str) -> None:
        self._remedy = f"Set {settings}.regroup=none"
        self._module, self._plan, self._autocast, self._syncs_always = module, plan, autocast, syncs_always
        self._keys: list[int | None] = [None] * len(plan.micro_batches)  # the number of its run
        for number, (first, end) in enumerate(plan.runs):
            self._keys[first:end] = [number] * (end - first)
        self._prompts = OpenPrompts()
        self._matched: MatchedForwards | None = None
        self._outputs: dict[Hashable, dict[str, Tensor]] = {}
        self._number = -1

    def enter(self, packed: PackedMicroBatch) -> PackedMicroBatch:
        """The next micro-batch, about to be forwarded, as it is or without its prompt.

        Prompts that begin with it on any rank are forwarded in here.
        """
        self.leave(step_ends=False)
        self._number += 1
        self._prompts.expect(self._keys[self._number + 1 :])
        return self._enter_update(packed) if torch.is_grad_enabled() else self._enter_scoring(packed)

    def _enter_update(self, packed: PackedMicroBatch) -> PackedMicroBatch:
        device, key = packed.ids.device, self._keys[self._number]
        if self._matched is None:
            self._matched = MatchedForwards(self._module, self._plan.ends, device)
        own_end = self._plan.runs[key][1] - 1 if key is not None and self._prompts.cache(key) is None else None
        part = packed if key is None else packed.behind_prompt()
        length = part.layout.num_given

        def run() -> PromptCache:
            cache, prompt = PromptCache(), PrefixLayout.from_groups([length], [[1]], device=device)
            cache.run(self._module, prompt, packed.ids[:length], packed.positions[..., :length], packed.images)
            return cache

        with self._autocast():
            caches, added = self._matched.forward(self._number, [] if own_end is None else [(own_end, run)])
        part.counts += Counts(added)
        if key is None:
            return part
        if caches:
            part.counts += Counts(length, squares=length**2, groups=1, shared_1=-length)
        cache = caches[0] if caches else self._prompts.cache(key)
        assert cache is not None
        cache.prepare(part.layout, last=self._prompts.is_last(key))
        self._prompts.keep(key, cache)
        return part

    def _enter_scoring(self, packed: PackedMicroBatch) -> PackedMicroBatch:
        key = self._keys[self._number]
        if key is None:
            return packed
        part, cache = packed.behind_prompt(), self._prompts.cache(key)
        if cache is None:
            cache = PromptCache()
            cache.collect(packed.layout, part.layout.num_given)
            part = packed
        else:
            cache.prepare(part.layout, last=self._prompts.is_last(key))
            part = part.with_prompt_outputs(self._outputs[key])
        self._prompts.keep(key, cache)
        return part

    def refuse(self, reason: str) -> NoReturn:
        """A micro-batch of the plan cannot be packed, although the whole batch could.

        Raises:
            RuntimeError: always. Other ranks go on by the plan, and prompts would be missing.
        """
        raise RuntimeError(f"micro-batches reuse prompts, and one of them cannot be shared: {reason}. {self._remedy}")

    def outputs(self, packed: PackedMicroBatch, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """``values`` of the micro-batch that was entered, by name ``[T]``, whose backward reaches prompts that close with it."""
        if self._matched is not None:
            is_last = self._number == len(self._keys) - 1
            attached = self._matched.attach(
                self._number, list(values.values()), synchronizes=is_last or self._syncs_always
            )
            return dict(zip(values, attached, strict=True))
        key = self._keys[self._number]
        if key is not None and not packed.layout.num_given:
            length = packed.behind_prompt().layout.num_given
            self._outputs[key] = {name: value[:length] for name, value in values.items()}
        return values

    def leave(self, *, step_ends: bool = True) -> None:
        """A micro-batch has run, the last one of the call if ``step_ends``.

        Raises:
            RuntimeError: the gradient of a prompt would be missing from the optimizer step.
        """
        self._prompts.leave(step_ends=step_ends, remedy=self._remedy)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As verl's forwards are run."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
