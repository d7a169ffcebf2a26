"""Per-token log-probabilities and entropies of completions, with every prompt forwarded once.

The language-model head runs on completion positions alone and in chunks, each recomputed in the backward pass
(``torch.utils.checkpoint``), so that no ``[tokens, vocabulary]`` tensor of the batch ever exists.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefix_grouper_plugins.batch import GroupedBatch, NothingToScore, check_tensors
from prefix_grouper_plugins.modeling import (
    UnsupportedModelError,
    decoder_of,
    packed_inputs,
    row_positions,
    transformers_model,
    without_router_loss,
)
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.enable import has_layers_enabled
from prefix_grouper_plugins.modeling.images import ImageRows, why_not_pack
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.support.adapters import adapter_reasons

CHUNK_SIZE = 1024  # completion tokens whose logits exist at one time

# What configs call the cap of their logits (gemma; recurrent_gemma; xlstm) and a factor (cohere; falcon_h1; hyperclovax).
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
# Divisors: granite and others; inkling, which divides the hidden states.
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


def prefix_grouped_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
    min_level: int | None = None,
    images: Mapping[str, Tensor] | None = None,
    num_images: Sequence[int] | None = None,
    num_tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each completion token, as a row-by-row forward gives it. A drop-in for the ordinary function.

    Rows with equal prompts share them, in whatever order they come; prompts that begin alike share their beginning.
    Positions count from each row's first real token. Differentiable, under LoRA, DDP and gradient checkpointing too.

    Args:
        model: a causal LM that has been through :func:`~prefix_grouper_plugins.enable_prefix_grouper`.
        prompt_ids, prompt_mask: ``[B, P]``, left-padded; the mask is 1 on real tokens.
        completion_ids, completion_mask: ``[B, C]``, right-padded.
        temperature: what the logits are divided by.
        min_level: share what completions of a prompt begin alike with too, in levels of at least this many tokens: 1 for
            whatever rows have in common, None for prompts alone.
        compute_entropy: also return the entropy of each next-token distribution, in nats.
        images: what the processor of a vision-language model returned for the prompts besides ids and mask
            (``pixel_values``, ``image_grid_thw``, ``mm_token_type_ids`` and so on). Rows share if prompts and images are
            equal, and the vision tower sees the images of a group once.
        num_images: images of each row, by default one.
        num_tiles: tiles of each row, for models that cut images into tiles.

    Returns:
        ``logps [B, C]`` and ``entropy [B, C]`` (or None), in float32 (float64 for a float64 model), zeros where
        ``completion_mask`` is 0.

    Raises:
        ValueError: the model has not been enabled, ``temperature`` is not positive, or the batch is not padded as described.
        UnsupportedModelError: the model scales its logits in a way that this function does not reproduce, it has got an
            adapter with which rows cannot be packed, or ``images`` holds something that cannot be, such as videos.
    """
    anatomy = Anatomy(model)
    if not has_layers_enabled(anatomy):
        raise ValueError("call enable_prefix_grouper(model) first: this model would read the packed row as one text")
    if reasons := adapter_reasons(anatomy.adapters):  # PEFT changes the call before the model can see it
        raise UnsupportedModelError("; ".join(reasons))
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be positive")
    check_tensors(prompt_ids, prompt_mask, completion_ids, completion_mask)
    blocks = (prompt_ids, prompt_mask, completion_ids, completion_mask)
    if images is None:
        try:
            batch = GroupedBatch(*blocks, min_level=min_level)
        except NothingToScore:
            return _nothing_to_score(model, completion_ids.shape, compute_entropy)
        positions = row_positions(model, batch.layout, batch.input_ids)
        inputs = packed_inputs(batch.layout, batch.input_ids, positions)
    else:
        if (reason := why_not_pack(model, list(images))) is not None:
            raise UnsupportedModelError(reason)
        if not completion_mask.any():
            return _nothing_to_score(model, completion_ids.shape, compute_entropy)
        rows = ImageRows.from_processor(model, *blocks, images, num_images or [1] * len(prompt_ids), num_tiles)
        batch = GroupedBatch(*blocks, keys=rows.keys, min_level=min_level)
        inputs = rows.packed_inputs(batch)
    hidden, head = _hidden_states(model, batch, inputs)
    targets = batch.labels[batch.positions]
    parts = [
        checkpoint(_score, head, states, labels, temperature, compute_entropy, use_reentrant=False)
        for states, labels in zip(hidden[batch.positions].split(CHUNK_SIZE), targets.split(CHUNK_SIZE), strict=True)
    ]
    logps = batch.scatter(torch.cat([logp for logp, _ in parts]))
    return logps, batch.scatter(torch.cat([entropy for _, entropy in parts])) if compute_entropy else None


def _nothing_to_score(model: nn.Module, shape: torch.Size, compute_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Zeros that are still connected to the model, so that a loss made of them has a (zero) gradient."""
    weight = next((p for p in model.parameters() if p.requires_grad), next(model.parameters()))
    zero = (weight.flatten()[:1] * 0).to(torch.promote_types(weight.dtype, torch.float32))
    zeros = zero.expand(shape.numel()).view(shape)
    return zeros, zeros.detach() if compute_entropy else None


# Scale and softcap of heads that have been checked, by model. Heads are weak references, so that no model is kept alive.
_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[float, float | None]]] = weakref.WeakKeyDictionary()


class _Head:
    """How the model gets from a hidden state to its logits, checked against the model's own logits of one position.

    Once for each head: reading the answer waits until the device has done all its work, and what it depends on (modules,
    factors, forwards, hooks) is looked at in each call.
    """

    def __init__(self, base: PreTrainedModel, modules: list[nn.Module], vocabulary: int) -> None:
        config: Any = base.config.get_text_config(decoder=True)
        self.modules, self.vocabulary = modules, vocabulary
        self.softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
        self.scale = next((float(factor) for name in _FACTORS if (factor := getattr(config, name, None))), 1.0)
        for name in _DIVISORS:
            scaling = getattr(config, name, None) or 1.0
            self.scale *= scaling if known_of(config.model_type).logits_scaling == "multiplies" else 1.0 / scaling
        elsewhere = config is not base.config or modules[-1] is not base.get_output_embeddings()
        self._may_leave_out = elsewhere and (self.scale != 1.0 or self.softcap is not None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[N, hidden]`` -> logits ``[N, vocabulary]``, float32 or wider."""
        for module in self.modules:
            hidden = _of_one(module(hidden))
        hidden = hidden[..., : self.vocabulary]  # a head may be padded (inkling)
        logits = hidden if self.scale == 1.0 else hidden * self.scale  # large, so it is copied only if needed
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def check(self, model: nn.Module, base: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
        """Compare with the logits ``[N, vocabulary]`` that the model itself computed from ``hidden [N, hidden]``.

        Scale and cap are tried, then left out: most vision-language models leave out those of their text model, and where
        a module behind the head applies them (inkling2), it is among the modules.

        Args:
            model, base: the model that was called, and the transformers model inside of it.
        """
        factors = _CHECKED.setdefault(base, {})
        head = self._identity(model, base, hidden, logits)
        if head in factors:
            self.scale, self.softcap = factors[head]
            return
        with torch.no_grad():
            if self._may_leave_out and not self._fits(hidden, logits):
                self.scale, self.softcap = 1.0, None
            if not self._fits(hidden, logits):
                raise UnsupportedModelError(
                    "the model computes its logits from the hidden states in a way that is not known here (its own "
                    f"differ by {float((self(hidden) - logits).abs().max()):.2e}): score with its own logits instead"
                )
        factors[head] = self.scale, self.softcap

    def _identity(self, model: nn.Module, base: PreTrainedModel, hidden: Tensor, logits: Tensor) -> Hashable:
        """All that the answer of the check depends on."""
        forwards = [
            getattr(forward, "__func__", forward) for forward in (model.forward, base.forward, type(base).forward)
        ]
        known = tuple(map(weakref.ref, [*self.modules, *forwards]))
        hooks = tuple(model._forward_hooks), tuple(base._forward_hooks)
        return known, hooks, self.softcap, self.scale, self.vocabulary, logits.dtype, hidden.dtype, base.training

    def _fits(self, hidden: Tensor, logits: Tensor) -> bool:
        own = self(hidden)
        tolerance = 1e-2 if logits.dtype.itemsize < 4 else 1e-4
        theirs = logits.to(own.dtype)
        # One answer to read, since each read of a device waits until it has done all its work. NaN is within no bound.
        return bool(((own - theirs).abs() <= tolerance * (own.abs().max() + theirs.abs())).all())


def _hidden_states(model: nn.Module, batch: GroupedBatch, inputs: dict[str, Any]) -> tuple[Tensor, _Head]:
    """Packed forward: last hidden states ``[T, hidden]`` and the head that continues them.

    The call goes through ``model`` itself, so that wrappers (PEFT, DDP) do their part; hooks take the decoder's output
    and what runs after it, and the logits of one single position show that the head is understood.
    """
    base = transformers_model(model)
    decoder = decoder_of(base)
    if base.get_output_embeddings() is None or decoder is None:
        raise ValueError(f"{type(base).__name__} has no language-model head: a model for causal LM is needed")
    taken: list[Tensor] = []
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    thread = threading.get_ident()  # hooks are on the module, so they see the forwards of other threads too

    def take(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            taken[:] = [output[0]]  # the last one: a self-check may have run inside of this call, before it
            calls.clear()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and taken and args and isinstance(made := _of_one(output), Tensor):
            calls.append((module, args[0], made))

    hooks = [decoder.register_forward_hook(take)]
    behind = [child for child in base.children() if all(module is not decoder for module in child.modules())]
    hooks += [child.register_forward_hook(note) for child in behind]
    try:
        inputs |= without_router_loss(base)
        logits = model(**inputs, logits_to_keep=batch.positions[:1]).logits
    finally:
        for hook in hooks:
            hook.remove()
    modules = _leading_to(logits, calls, base.get_output_embeddings())
    if not taken or not modules:
        raise UnsupportedModelError(
            f"{type(base).__name__} does not run its decoder and then modules that give logits: no hidden states"
        )
    hidden, head, first = taken[0][0], _Head(base, modules, logits.shape[-1]), batch.positions[:1]
    head.check(model, base, hidden[first], logits[0] if logits.shape[1] == 1 else logits[0, first])  # xlstm keeps all
    return hidden, head


def _of_one(output: Any) -> Any:
    """What a module returns, also where it is alone in a tuple (the head of xlm)."""
    return output[0] if isinstance(output, tuple) and len(output) == 1 else output


def _leading_to(logits: Tensor, calls: list[tuple[nn.Module, Tensor, Tensor]], head: nn.Module) -> list[nn.Module]:
    """The modules, each called with what the one before it returned, of which the last one returned the logits.

    BERT-like models transform hidden states before they project them. Other modules that a model runs
    (a value head, say) do not return its logits.
    """
    modules: list[nn.Module] = []
    wanted: Tensor | None = None
    for module, given, returned in reversed(calls):
        if returned is wanted if modules else returned.shape == logits.shape:
            modules.insert(0, module)
            wanted = given
        elif module is head:  # it returns more logits than the model, or the model has cast them
            modules, wanted = [module], given
    return modules


def _score(
    head: _Head, hidden: Tensor, labels: Tensor, temperature: float, compute_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy, ``[N]`` each, of ``labels [N]`` after ``hidden [N, hidden]``."""
    logits = head(hidden)
    logits = logits if temperature == 1.0 else logits / temperature
    log_z = logits.logsumexp(-1)
    logp = logits.gather(-1, labels[:, None])[:, 0] - log_z
    if not compute_entropy:
        return logp, torch.zeros_like(logp)
    return logp, log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
