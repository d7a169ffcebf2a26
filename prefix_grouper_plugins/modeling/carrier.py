"""How a layout travels from a model's call to the layers that mix tokens.

Three carriers, because no single one reaches every layer of every family:

- the keyword :data:`LAYOUT_KWARG`, which most models hand on to their attention function;
- a tag on the 4-D placeholder mask, for the few families that drop keywords on the way (stablelm, nemotron);
- the context of a call, for mixers past the attention interface, which receive neither. A model's forward opens it, the
  call of a decoder layer writes it into that call's keywords, and the layer's forward shows it to the mixers inside.

A context variable alone would not do: gradient checkpointing keeps a call's keywords and runs the layer's forward again
long after the model's forward has returned, outside of every context that was open in it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout

LAYOUT_KWARG = "prefix_layout"
LAYOUT_TAG = "_prefix_layout"

Layout = PrefixLayout | ShardedLayout


# ------------------------------------------------------------------------------------------------ keyword and tagged mask


def placeholder_mask(layout: Layout, device: torch.device) -> Tensor:
    """``BoolTensor[1, 1, 0, 0]``: a mask that hides nothing and carries ``layout`` as its tag.

    transformers hands a 4-D mask through unchanged. Without one it would read the positions as packed sequences and cut
    the responses off from their prefix. Attention that does not know the layout cannot apply an empty mask.
    """
    placeholder = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)
    setattr(placeholder, LAYOUT_TAG, layout)
    return placeholder


def is_placeholder(mask: Any) -> bool:
    """Whether ``mask`` is a :func:`placeholder_mask`, with its tag or without."""
    return isinstance(mask, Tensor) and tuple(mask.shape) == (1, 1, 0, 0)


class FalseIfEnabled:
    """``use_cache`` of a packed call: an enabled model takes it for False, any other model that asks for it gets an error.

    All language models ask, the recurrent ones that read neither mask nor positions included.
    """

    def __bool__(self) -> bool:
        raise ValueError("call enable_prefix_grouper(model) first: this model would read the packed row as one text")


FALSE_IF_ENABLED = FalseIfEnabled()


def given_layout(keyword: Layout | None, mask: Tensor | None) -> Layout | None:
    """The layout that a call brings: its keyword or, where keywords are dropped on the way, the tag of its mask."""
    return keyword if keyword is not None else getattr(mask, LAYOUT_TAG, None)


# ------------------------------------------------------------------------------------------------- the context of a call


class Call:
    """A running forward: with its layout and the positions that it was called with (``[1, T]``), or an ordinary one.

    No dataclass: FSDP2 copies dataclass arguments.
    """

    __slots__ = ("layout", "positions")

    def __init__(self, layout: Layout | None, positions: Tensor | None = None) -> None:
        self.layout, self.positions = layout, positions


class RunningCall(threading.local):
    """The call that runs in this thread, or None. No `ContextVar`, for Dynamo reads those from torch 2.15 on only: each layer of a
    compiled model would break its graph."""

    call: Call | None = None


MODEL_CALL = RunningCall()
LAYER_CALL = RunningCall()


@contextmanager
def open_call(running: RunningCall, call: Call | None) -> Iterator[None]:
    before, running.call = running.call, call
    try:
        yield
    finally:
        running.call = before


def layout_of_layer() -> Layout | None:
    """The layout of the decoder layer whose forward is running, for attention that receives neither keyword nor mask."""
    call = LAYER_CALL.call
    return None if call is None else call.layout


class ModelForward:
    """In place of a model's ``forward``: says to the layers below which layout is in flight, or that there is none.

    A class, so that a copied or pickled model keeps it, bound to the copy.
    """

    def __init__(self, model: PreTrainedModel, *, takes_mask: bool, holds_mixers: bool) -> None:
        self.model, self.takes_mask, self.holds_mixers = model, takes_mask, holds_mixers
        self.previous = model.__dict__.get("forward")  # TRL's fused head puts one there

    @property
    def own(self) -> Callable[..., Any]:
        """The forward that the model had; that of its class where nobody has replaced it."""
        return self.previous or type(self.model).forward.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:  # trainers look for the names of arguments
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask"))
        positions = kwargs.get("position_ids")
        if (outer := MODEL_CALL.call) is not None:  # an inner model, whose outer one may have dropped them
            layout = outer.layout if layout is None else layout
            positions = outer.positions if positions is None else positions
        if not self.takes_mask and is_placeholder(kwargs.get("attention_mask")):
            kwargs["attention_mask"] = self._hides_nothing(args, kwargs)
        call = Call(layout, positions)
        # No decoder layer is around mixers that a model holds itself, and no checkpoint.
        with open_call(MODEL_CALL, call), open_call(LAYER_CALL, call if self.holds_mixers else LAYER_CALL.call):
            return self.own(*args, **kwargs)

    def _hides_nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The mask ``[1, T]`` of a row without padding."""
        given = inspect.signature(self.own).bind(*args, **kwargs).arguments
        ids: Tensor | None = given.get("input_ids")
        tokens: Tensor = given["inputs_embeds"] if ids is None else ids
        return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def disabled_too_early(module: Any) -> RuntimeError:
    """The error of the backward of a packed forward whose model is no longer enabled."""
    return RuntimeError(
        f"{type(module).__name__} was disabled between a packed forward and its backward, which runs checkpointed layers again: "
        "call disable_prefix_grouper(model) after the backward"
    )


class PackedLayer:
    """Mixed into the class of a decoder layer that holds token mixers."""

    _packed_before = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, given = MODEL_CALL.call, kwargs.get(LAYOUT_KWARG)
        if call is not None:
            kwargs[LAYOUT_KWARG] = call
        elif isinstance(given, Layout):  # a model whose forward was replaced after ours
            kwargs[LAYOUT_KWARG] = Call(given)
        elif not isinstance(given, Call) and self._packed_before:
            raise RuntimeError(
                f"{type(self).__name__} is called outside of its model's forward, so it cannot know whether the call "
                "belongs to a packed row: checkpoint with the model's own `gradient_checkpointing_enable()`"
            )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(LAYOUT_KWARG, None)
        if not isinstance(call, Call) or call.layout is None:
            with open_call(LAYER_CALL, Call(None)):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(self, PackedLayer):  # what a checkpoint kept is our forward, run on the class of before
            raise disabled_too_early(self)
        self._packed_before = True
        if self._takes_keywords:  # type: ignore[attr-defined]
            kwargs[LAYOUT_KWARG] = call.layout  # for attention that does use the interface
        with open_call(LAYER_CALL, call):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
