"""Which models can take packed rows, and why another one cannot.

A model is supported when every place where it mixes tokens is an attention layer that we can switch, or a mixer that we
can run (modeling/mixers/), under masks that we know. Where a test has also compared packed forward and gradients of its
type with row-by-row forwards (modeling/model_types.py), nothing more is asked. Other types, and code from outside of
transformers, need to pass the self-check (modeling/self_check/). Everything else is refused before training, with the
reason: a guess here would be wrong numbers there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from prefix_grouper_plugins.attention.registry import auto_backend
from prefix_grouper_plugins.modeling.anatomy import Anatomy, Layer, transformers_model
from prefix_grouper_plugins.modeling.implementations import in_words
from prefix_grouper_plugins.modeling.mixers.state_forking import FORKED, ON_ROWS
from prefix_grouper_plugins.modeling.mixers.table import mixer_of, why_on_rows
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.modeling.support.masks import windows_by_mask
from prefix_grouper_plugins.modeling.support.reasons import (
    left_padding_reasons,
    reasons_to_refuse,
    unknown_masks,
    unverified_reasons,
)


@dataclass(frozen=True)
class LayerSupport:
    """How one layer is run: its module name, how it mixes tokens, and the backend that ``auto`` takes.

    The backend is that of the device the model is on, for a model without weights that of this machine; on a GPU that
    for half precision, in which autocast runs attention whatever the weights are. Mixers past the attention interface
    have "state forking" or "expand, run, collapse".
    """

    name: str
    attention: str
    backend: str


@dataclass(frozen=True)
class SupportReport:
    """What :func:`check_support` found.

    Attributes:
        reasons: why the model is refused; empty when it is supported.
        unverified: why it is refused unless :func:`~prefix_grouper_plugins.self_check` shows that it is right.
        left_padding_reasons: why an ordinary batch that is padded on the left does not compute what single rows, and
            therefore packed rows, compute. Trainers that pad on the left refuse the model for these.
        notes: what a user should know although it does not change the result's validity, one line each.
        layers: how each attention layer and each other mixer is run.
    """

    reasons: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    left_padding_reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: tuple[LayerSupport, ...] = field(default=(), repr=False)

    @property
    def supported(self) -> bool:
        return not self.reasons


def check_support(model: nn.Module) -> SupportReport:
    """Say whether packed forwards of ``model`` equal its ordinary ones. Runs no forward and changes nothing.

    Args:
        model: a transformers model, bare or wrapped (PEFT, DDP, FSDP).

    Returns:
        the report; ``report.supported`` is true iff ``report.reasons`` is empty.
    """
    return report_on(Anatomy(model))


def report_on(anatomy: Anatomy) -> SupportReport:
    """:func:`check_support` of a model whose parts are known already."""
    if anatomy.base is None:
        return SupportReport((f"{type(anatomy.model).__name__} contains no transformers model",))
    reasons, unverified = reasons_to_refuse(anatomy), unverified_reasons(anatomy)
    if unverified and not reasons:
        reasons = unknown_masks(anatomy)
    device, dtype = _where_attention_runs(anatomy)
    windows = windows_by_mask(anatomy.text_models, anatomy.attention_layers)
    on_rows = {layer: why for layer in anatomy.mixers if (why := why_on_rows(layer.module)) is not None}
    return SupportReport(
        reasons=tuple(reasons),
        unverified=tuple(unverified),
        left_padding_reasons=tuple(left_padding_reasons(anatomy)),
        notes=(*_notes(anatomy), *_forking_notes(on_rows)),
        layers=(
            *(
                _describe(layer, windows.get(layer.name, layer.window), device, dtype)
                for layer in anatomy.attention_layers
            ),
            *(_describe_mixer(layer, on_rows.get(layer)) for layer in anatomy.mixers),
        ),
    )


def without_router_loss(model: nn.Module) -> dict[str, bool]:
    """Keywords that keep a mixture of experts from computing its router loss over packed tokens.

    A shared token would weigh once, however many rows share it. Who wants the loss weighs them (integrations/trl).
    """
    config = transformers_model(model).config.get_text_config(decoder=True)
    return {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}


def numbers_padded_columns(model: nn.Module) -> bool:
    """Whether a padded forward without ``position_ids`` numbers padded columns too, as nearly all models do.

    Models with rotary positions give the same result either way; for learned positions it matters.
    """
    return not known_of(transformers_model(model).config.model_type).skips_padding


def _notes(anatomy: Anatomy) -> list[str]:
    notes = []
    if limit := anatomy.row_limit:
        notes.append(
            f"rope_type {limit.kind!r} changes the angles of all rows of a batch once one of them reaches {limit.length} "
            "tokens: such batches are not shared"
        )
    ignored = frozenset[str]().union(*(layer.ignored for layer in anatomy.attention_layers))
    if ignored:
        notes.append(
            f"sdpa ignores the {in_words(ignored)} of this model, without sharing too, so packed rows leave them out: load "
            'the model with `attn_implementation="eager"` to have them'
        )
    if rates := anatomy.dropout_rates:
        notes.append(
            f"dropout of {max(rates)} is active: the rows of a group share one dropout mask on their prompt, which is "
            "valid training but gives other numbers than the ordinary path; set it to 0 (`lora_dropout` too) to get the "
            "same"
        )
    return notes


def _where_attention_runs(anatomy: Anatomy) -> tuple[torch.device, torch.dtype]:
    weight = anatomy.first_weight
    assert weight is not None
    device, dtype = weight.device, weight.dtype
    if device.type == "meta":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else dtype


def _describe(layer: Layer, window: int | None, device: torch.device, dtype: torch.dtype) -> LayerSupport:
    softcap = layer.softcap
    parts = ["causal" if window is None else f"sliding window of {window}"]
    if softcap is not None:
        parts.append(f"softcap {softcap}")
    if layer.sinks is not None:
        parts.append("sinks")
    head_dim, value_dim = layer.head_dims
    backend = auto_backend(device, dtype, head_dim, value_dim=value_dim, sliding_window=window, softcap=softcap)
    return LayerSupport(layer.name, ", ".join(parts), backend)


def _describe_mixer(layer: Layer, why_on_rows: str | None) -> LayerSupport:
    kind = mixer_of(layer.module).kind  # type: ignore[union-attr]
    return LayerSupport(layer.name, kind, FORKED if why_on_rows is None else ON_ROWS)


def _forking_notes(on_rows: Mapping[Layer, str]) -> list[str]:
    """Why mixers of kinds that can fork their state do not, one line for each reason."""
    notes = {
        f"{type(layer.module).__name__} scans a shared prompt once for each row ({ON_ROWS}), not once for all: {reason}"
        for layer, reason in on_rows.items()
        if mixer_of(layer.module).recipes  # type: ignore[union-attr]
    }
    return sorted(notes)
