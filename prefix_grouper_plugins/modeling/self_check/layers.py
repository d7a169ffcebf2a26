"""The decoder layer where two paths over the same rows begin to differ, once a comparison has found that they do.

Forward hooks keep a random projection of what each decoder layer puts out, a few numbers for each token, so that no graph
and no second set of activations exists. Paths lay the same tokens out differently (padded, unpadded, packed, behind a prompt
that another forward has run), so a token is known by the ids of its row up to and including itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, MODEL_CALL, given_layout
from prefix_grouper_plugins.modeling.self_check.isolation import rounding
from prefix_grouper_plugins.modeling.self_check.tolerances import TIMES_NOISE, tolerance

_NUMBERS = 16  # that are kept of each token at each depth
_SAME = 1e-3  # relative: tokens that are given the same embeddings; other images behind the same ids are not


def decoder_layers(text: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a model by name, in their order: the outermost modules that transformers checkpoints."""
    layers: dict[str, nn.Module] = {}
    for name, module in text.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{own}.") for own in layers):
            layers[name] = module
    return layers


class Trace:
    """What the decoder layers make of each token on one path.

    Attributes:
        tokens: the place of each token in `values`, by a hash of its row's ids up to and including it.
        values: ``[tokens, depths, 16]``: a projection of what goes into the first layer, and of what each layer puts out.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self._rows: list[Tensor] = []
        self._ambiguous: set[int] = set()

    @property
    def values(self) -> Tensor:
        return torch.stack(self._rows)

    def add(self, token: int, values: Tensor) -> None:
        """Keep ``values [depths, 16]`` of a token. What has the same ids but other embeddings has other images."""
        if token not in self.tokens:
            self.tokens[token] = len(self._rows)
            self._rows.append(values)
        elif not torch.allclose(self._rows[self.tokens[token]][0], values[0], rtol=_SAME, atol=_SAME):
            self._ambiguous.add(token)

    def common(self, other: Trace) -> list[int]:
        """The tokens that both have."""
        ambiguous = self._ambiguous | other._ambiguous
        return [token for token in self.tokens if token in other.tokens and token not in ambiguous]


class _Recorder:
    """Hooks that fill a :class:`Trace` while a model runs."""

    def __init__(self, anatomy: Anatomy, layers: list[nn.Module]) -> None:
        self._models, self._layers = anatomy.models, layers
        self._prompts: dict[int, list[int]] = {}  # ids of the prompts that fill a cache
        self._projection = torch.empty(0)
        self._call: dict[str, Any] = {}
        self._depths: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        self._trace = Trace()
        with ExitStack() as stack:
            for model in self._models:
                stack.callback(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            first, last = self._layers[0], self._layers[-1]
            stack.callback(first.register_forward_pre_hook(self._embedded, with_kwargs=True).remove)
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(self._ran).remove)
            stack.callback(last.register_forward_hook(self._leave).remove)
            yield self._trace

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The outermost model has the token ids, an inner one may have the mask alone."""
        for name in ("input_ids", "attention_mask", "position_ids"):
            if isinstance(value := kwargs.get(name), Tensor):
                self._call[name] = value
        outer = MODEL_CALL.call
        layout = given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask"))
        self._call["layout"] = layout if layout is not None or outer is None else outer.layout

    def _embedded(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._depths = []
        self._keep(args[0] if args else kwargs.get("hidden_states"))

    def _ran(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, hidden: Any) -> None:
        if not isinstance(hidden, Tensor):
            return
        if self._projection.shape[0] != hidden.shape[-1]:
            generator = torch.Generator().manual_seed(hidden.shape[-1])
            self._projection = torch.randn(hidden.shape[-1], _NUMBERS, generator=generator)
        projected = hidden.detach().float() @ self._projection.to(hidden.device)
        self._depths.append(projected.flatten(0, -2).cpu())

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        call, self._call = self._call, {}
        if "input_ids" not in call or len(self._depths) != len(self._layers) + 1:
            return
        depths = torch.stack(self._depths, dim=1)  # [B * T, depths, 16]
        for prefix, ids, places in self._rows_of(call):
            token = 0
            for number in prefix:
                token = hash((token, number))
            for number, place in zip(ids, places, strict=True):
                token = hash((token, number))
                self._trace.add(token, depths[place])

    def _rows_of(self, call: dict[str, Any]) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """For each row of a call: the ids that were given, the ids that were forwarded, and their places."""
        ids, layout = call["input_ids"].cpu(), call["layout"]
        if isinstance(layout, PrefixLayout):
            yield from self._packed_rows(ids.flatten(), layout)
        elif layout is None:
            places = torch.arange(ids.numel()).view(ids.shape)
            for row in _ordinary_rows(places, call):
                yield [], ids.flatten()[row].tolist(), row.tolist()

    def _packed_rows(self, ids: Tensor, layout: PrefixLayout) -> Iterator[tuple[list[int], list[int], list[int]]]:
        layout = layout.to("cpu")
        if layout.cache is not None and not layout.num_given:
            self._prompts[id(layout.cache)] = ids.tolist()
        given = self._prompts.get(id(layout.cache), [])
        if len(given) < layout.num_given:
            return
        rows = [layout.unpack(values) for values in (torch.arange(len(ids)), ids, layout.position_ids)]
        for places, own, positions in zip(*rows, strict=True):
            if len(own):
                yield given[: int(positions[0])], own.tolist(), places.tolist()


def _ordinary_rows(places: Tensor, call: dict[str, Any]) -> Iterator[Tensor]:
    """The places ``[L]`` of each row: padded rows by their mask, rows that stand end to end by their positions."""
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and mask.shape == places.shape:
        yield from (row[keep != 0] for row, keep in zip(places, mask.cpu(), strict=True))
    elif len(places) == 1 and positions is not None:
        starts = (positions.cpu().flatten(0, -2)[0] == 0).nonzero().flatten().tolist() or [0]
        yield from places[0].tensor_split(starts[1:])
    else:
        yield from places


@dataclass(frozen=True)
class Parting:
    """Where the forward passes of two paths begin to differ.

    Attributes:
        layer: name of the decoder layer; ``""`` for what comes in front of the first one, None where no output differs.
        number, of: the layer's number, from 1, and how many there are.
        before, behind: the largest difference of a token in what goes into it and in what it puts out, relative to the
            token's size; where no layer differs, `behind` is the largest of any layer.
    """

    layer: str | None
    number: int
    of: int
    before: float
    behind: float

    def __str__(self) -> str:
        if self.layer is None:
            return f"the outputs of all {self.of} decoder layers agree to {self.behind:.1e}"
        if not self.number:
            return f"it starts in front of the first decoder layer, whose inputs differ by {self.behind:.1e}"
        return (
            f"it starts in decoder layer {self.number} of {self.of} ({self.layer}), whose outputs differ by "
            f"{self.behind:.1e} and whose inputs differ by {self.before:.1e}"
        )


def where_paths_part(
    anatomy: Anatomy, ordinary: Callable[[], object], shared: Callable[[], object], dtype: torch.dtype
) -> Parting | None:
    """The first decoder layer whose outputs on the shared path differ by more than rounding explains.

    Three passes without gradients, one after the other: the ordinary one, the ordinary one with its rounding made visible,
    and the shared one. Every process makes as many, whatever it finds.

    Args:
        anatomy: of the model that the paths run.
        ordinary, shared: forward the same rows; may run out of memory.
        dtype: that of the forward.

    Returns:
        None where the layers of this model are not known, where the tokens of a path cannot be told apart, or where memory
        does not suffice.
    """
    layers = decoder_layers(anatomy.text)
    expected, found = (_recorded(anatomy, list(layers.values()), path) for path in (ordinary, shared))
    with rounding(anatomy.base, dtype):
        rounded = _recorded(anatomy, list(layers.values()), ordinary)
    if expected is None or found is None or rounded is None:
        return None
    apart, noise = _apart(found, expected), _apart(rounded, expected)
    if not apart or not noise:
        return None
    limits = [tolerance(dtype).outputs + TIMES_NOISE * own for own in noise]
    names, depths = ["", *layers], range(len(layers) + 1)
    number = next((depth for depth in depths if not apart[depth] <= limits[depth]), None)  # catches NaN as well
    if number is None:
        return Parting(None, 0, len(layers), 0.0, max(apart))
    return Parting(names[number], number, len(layers), apart[max(number - 1, 0)], apart[number])


def where_gradients_part(anatomy: Anatomy, names: Collection[str]) -> str | None:
    """The last decoder layer that holds one of these parameters, in words: a backward pass meets it first.

    Args:
        anatomy: of the model.
        names: of parameters of ``anatomy.base`` whose gradients differ.

    Returns:
        None where no layer holds one of them.
    """
    differ = {id(parameter) for name, parameter in anatomy.base.named_parameters() if name in names}
    layers = decoder_layers(anatomy.text)
    for number, (name, layer) in reversed(list(enumerate(layers.items(), 1))):
        if any(id(parameter) in differ for parameter in layer.parameters()):
            return f"the backward pass differs from decoder layer {number} of {len(layers)} ({name}) on"
    return None


def _recorded(anatomy: Anatomy, layers: list[nn.Module], path: Callable[[], object]) -> Trace | None:
    """The trace of one path; None where memory does not suffice."""
    if not layers:
        path()
        return None
    torch.manual_seed(0)
    try:
        with torch.no_grad(), _Recorder(anatomy, layers).recording() as trace:
            path()
        return trace
    except torch.OutOfMemoryError:
        return None


def _apart(found: Trace, expected: Trace) -> list[float]:
    """At each depth the largest difference of a token, relative to its size or to a tenth of the mean size."""
    tokens = found.common(expected)
    if not tokens:
        return []
    mine, own = (trace.values[[trace.tokens[token] for token in tokens]].transpose(0, 1) for trace in (found, expected))
    sizes = own.norm(dim=-1)  # [depths, tokens]
    floor = (0.1 * sizes.mean(dim=1, keepdim=True)).clamp(min=1e-30)
    return ((mine - own).norm(dim=-1) / sizes.maximum(floor)).amax(dim=1).tolist()  # type: ignore[no-any-return]
