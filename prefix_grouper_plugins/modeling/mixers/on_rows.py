"""Token mixers that run on whole rows: modules that mix tokens without transformers' attention interface.

Recurrent layers (Mamba, gated delta nets), short convolutions, linear attention and attention with code of its own do
not fit the shared-prefix core. They run by *expand, run, collapse*: the packed hidden states are laid out again as rows,
the module runs unchanged on this ordinary right-padded batch, and each packed position takes its value back from one row
that holds it::

    packed  P P P a a b b b   ->   P P P a a -   ->  module  ->   P P P a a b b b
                                   P P P b b b                    (P from the first row)

This is exact, gradients included: the module is causal, so that all rows compute the same value for a position that they
share, and padding on the right reaches no token. Everything around the mixer (projections of other layers, MLPs,
experts, norms, the head) stays shared.

Where the code of a recurrent layer lets a scan start from a given state, the prefix is scanned only once and the layer
runs on the packed row itself: *state forking*, in modeling/mixers/state_forking.py.

modeling/carrier.py brings the layout to the mixers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.carrier import (
    LAYER_CALL,
    LAYOUT_KWARG,
    MODEL_CALL,
    Layout,
    open_call,
)
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.mixers.state_forking import forked_forward
from prefix_grouper_plugins.modeling.mixers.table import Mixer, mixer_of, why_on_rows
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout
from prefix_grouper_plugins.rows import Rows, rows_of

# Arguments that run along the sequence, `[1, T, ...]`: laid out as rows, like the hidden states themselves.
_ALONG_SEQUENCE = {"residual", "input_ids", "position_ids", "position_embeddings", "k", "q"}
_ALONG_SEQUENCE |= {"key_hidden_states", "value_hidden_states"}  # queries have inputs of their own (inkling2)
_CACHES = {"cache", "past_key_values", "past_key_value", "layer_past", "cache_params", "state"}
# How ordinary packed batches say where rows begin. The rows are a padded batch here, so these are dropped.
_ROW_BOUNDARIES = {"cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
# What trainers hand to the loss head; many models pass every keyword on to their layers.
_OF_THE_LOSS = {"labels", "shift_labels", "num_items_in_batch"}
_MASKS = {"attention_mask", "mask"}
_MASKS_OF_PADDING = {"conv_mask"}  # padding on the right reaches no token


class PackedMixer:
    """Mixed into the class of a token mixer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = LAYER_CALL.call
        run = super().forward  # type: ignore[misc]
        kwargs.pop(LAYOUT_KWARG, None)
        if call is None or call.layout is None:
            if (model := MODEL_CALL.call) is not None and model.layout is not None:
                raise RuntimeError(f"{type(self).__name__} runs in a packed forward, but its layer lost the layout")
            return run(*args, **kwargs)
        return run_packed(self, run, call.layout, args, kwargs)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- packed calls


class Unchanged(Rows):
    """The packed row as it is, for mixers that take it."""

    def __init__(self, layout: PrefixLayout) -> None:
        self.home = layout.position_ids  # for its length

    def expand(self, x: Tensor) -> Tensor:
        """Check the shape only."""
        self.check(x)
        return x

    def collapse(self, x: Tensor) -> Tensor:
        """Nothing to do."""
        return x


def run_packed(
    module: nn.Module,
    run: Callable[..., Any],
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a mixer on the packed row of ``layout``: by state forking where its code allows, otherwise on whole rows.

    Args:
        module: a known mixer, see :func:`mixer_of`.
        run: its ordinary forward.
        layout: the layout of the packed row.
        args: what the module was called with; the first argument of its forward is the packed ``[1, T, d]``.
        kwargs: likewise.

    Raises:
        UnsupportedModelError: an argument that cannot be laid out as rows, or a row that is cut into pieces.
    """
    if isinstance(layout, ShardedLayout):
        raise UnsupportedModelError(
            f"{type(module).__name__} needs whole rows, which sequence parallelism does not leave on one process"
        )
    if (reason := why_on_rows(module)) is not None:
        if layout.cache is not None:
            raise UnsupportedModelError(f"{type(module).__name__} cannot start from the state of a prompt: {reason}")
        return expand_run_collapse(module, run, layout, args, kwargs)
    return fork_states(module, layout, args, kwargs)


def fork_states(module: nn.Module, layout: PrefixLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``module`` on the packed row, its scan level by level; arguments as in :func:`run_packed`."""
    run = forked_forward(module, mixer_of(module).recipes, layout)  # type: ignore[union-attr]
    return _run(module, run, Unchanged(layout), args, kwargs)


def expand_run_collapse(
    module: nn.Module, run: Callable[..., Any], layout: PrefixLayout, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``module`` unchanged on the rows of ``layout``; arguments as in :func:`run_packed`."""
    return _run(module, run, rows_of(layout), args, kwargs)


def _run(module: nn.Module, run: Callable[..., Any], rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mixer = mixer_of(module)
    assert mixer is not None
    bound = inspect.signature(run).bind(*args, **kwargs)
    keywords = variable_keywords(bound.signature)
    arguments = {**bound.arguments, **bound.arguments.pop(keywords, {})} if keywords else dict(bound.arguments)
    arguments.pop(keywords, None)  # type: ignore[arg-type]
    arguments = {name: value for name, value in arguments.items() if name not in _OF_THE_LOSS}
    first = next(iter(bound.signature.parameters))
    for name in arguments:
        arguments[name] = _as_rows(module, mixer, rows, name, arguments[name], along=name == first)
    x = arguments[first]
    if mixer.adapt is not None:
        mixer.adapt(arguments, x)
    for name in _MASKS & arguments.keys():
        arguments[name] = None if mixer.mask is None else mixer.mask(module, x, arguments)
    with (
        open_call(LAYER_CALL, None),
        open_call(MODEL_CALL, None),
    ):  # the rows are an ordinary batch to whatever runs inside
        output = _call(run, bound.signature, arguments)
    if isinstance(output, Tensor):
        return _collapse(mixer, rows, output)
    # Weights and states have no packed form. openai-gpt returns a list.
    return type(output)(_packed_output(mixer, rows, i, part) for i, part in enumerate(output))


def _packed_output(mixer: Mixer, rows: Rows, index: int, part: Any) -> Any:
    if index in mixer.outputs_along:
        return _collapse(mixer, rows, part)
    return part if index in mixer.outputs_as_they_are else None


def _as_rows(module: nn.Module, mixer: Mixer, rows: Rows, name: str, value: Any, along: bool) -> Any:
    """One argument of a packed call, as it is in an ordinary batch of the rows."""
    if name in _MASKS or name in mixer.whole:
        return value
    if name in _CACHES and mixer.drops_cache:
        return None
    if name in _CACHES and value is not None:
        raise ValueError(f"{type(module).__name__} got `{name}`: a packed forward has no cache, set `use_cache=False`")
    if name in _ROW_BOUNDARIES | _MASKS_OF_PADDING:
        return None
    if name in mixer.of_all_heads:
        return rows.expand(value[0])[:, None]
    if along or name in _ALONG_SEQUENCE:
        return _expand(mixer, rows, value)
    if isinstance(value, Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is called with `{name}`, which we cannot lay out as rows")
    return value


def _expand(mixer: Mixer, rows: Rows, value: Any) -> Any:
    """Rows of a tensor, or of each in a tuple or a dict of them (angles of several kinds of layers)."""
    if isinstance(value, tuple):
        return tuple(_expand(mixer, rows, part) for part in value)
    if isinstance(value, dict):
        return {kind: _expand(mixer, rows, part) for kind, part in value.items()}
    if value is None:
        return None
    return rows.expand(value.transpose(0, 1)).transpose(0, 1) if mixer.sequence_first else rows.expand(value)


def _collapse(mixer: Mixer, rows: Rows, value: Tensor) -> Tensor:
    return rows.collapse(value.transpose(0, 1)).transpose(0, 1) if mixer.sequence_first else rows.collapse(value)


def _call(run: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any]) -> Any:
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]
    return run(*(arguments.pop(name) for name in positional), **arguments)


def variable_keywords(signature: inspect.Signature) -> str | None:
    return next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
