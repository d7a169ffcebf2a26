"""A prompt that is forwarded once, and reused by several forwards of its responses.

A group that does not fit into one forward is cut into parts. The prompt runs once, and each part of responses runs forward
and backward against its keys and values, so that the memory of a part does not depend on the size of the group. This is
schedule-level reuse of shared prefixes (arXiv 2606.01143), depth-first training of a tree (arXiv 2602.00482)::

    cache = PromptCache()
    cache.run(model, layout_of_prompt, ids, positions)          # its graph is kept
    for part in parts:
        cache.prepare(part.layout, last=part is parts[-1])       # a layout made by PrefixLayout.given()
        loss(model(**packed_inputs(part.layout, ids))).backward()

What arrives at the prompt's keys and values is added up, part after part, in float32 or better. The last part is connected
to the prompt's graph and hands the sums on, so the backward of the prompt is a piece of the last part's own backward: one
gradient synchronisation, one place for a trainer's scaling, and autograd keeps the order. Layer by layer
the prompt's nodes go first (`_run_early`), so that no weight waits for the second half of its gradient.

Keys and values of a part are appended to those of the prompt in one buffer for each layer, so the prompt's are copied
once, not once for each part. Recurrent layers start each part from the prompt's state (modeling/mixers/state_forking.py).
A cache costs, for each layer, the prompt's graph, a second copy of its keys and values until the last part's backward has passed the
layer, and their gradients from the second part on. Instead of the graph it may keep the inputs of layers, which run again in
the last part's backward (modeling/recomputation.py); then there is one copy of the keys and values.

Under FSDP2 the prompt's forward goes through the root module, whose hooks gather the parameters. A layer's parameters are
gathered for its backward when a gradient arrives at the layer's output, and that of the last layer is read by nobody, so
the last part's values send it a gradient of zero (:meth:`PromptCache.attach`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.inputs import packed_inputs
from prefix_grouper_plugins.modeling.recomputation import recomputed


class _Edge(torch.autograd.Function):
    """A tensor of the shape of ``live`` and with its graph, which takes no memory: its values are not read."""

    @staticmethod
    def forward(ctx: Any, live: Tensor) -> Tensor:
        return torch.zeros((), dtype=live.dtype, device=live.device).expand(live.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class _Given:
    """Keys, or values, of the prompt in one layer.

    Under gradient checkpointing nobody else keeps what the prompt's forward computed, so it is held once, in front of the
    part's, until the last part's backward has passed the layer.

    Attributes:
        edge (`Tensor[P, H_kv, D]`): leads into the prompt's graph.
        gradient (`Tensor[P, H_kv, D]` or None): what the parts so far have sent back to it.
    """

    def __init__(self, live: Tensor) -> None:
        self.edge: Tensor = _Edge.apply(live)  # type: ignore[assignment]
        self.gradient: Tensor | None = None
        self._buffer = live.detach()

    def in_front_of(self, new: Tensor) -> Tensor:
        """The prompt's keys and then ``new [N, H_kv, D]``: ``[P + N, H_kv, D]``, valid until the next call."""
        prompt, total = len(self.edge), len(self.edge) + len(new)
        if len(self._buffer) < total:
            grown = new.new_empty((total, *new.shape[1:]))
            grown[:prompt] = self._buffer[:prompt]
            self._buffer = grown
        self._buffer[prompt:total] = new.detach()
        return self._buffer[:total].detach()

    def add(self, gradient: Tensor) -> None:
        if self.gradient is None:
            exact = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            self.gradient = torch.zeros_like(gradient, dtype=exact)
        self.gradient += gradient

    def send(self, dtype: torch.dtype) -> Tensor:
        """The gradient, for the prompt's backward. Neither it nor the keys are held any longer."""
        assert self.gradient is not None
        total, self.gradient = self.gradient.to(dtype), None
        self._buffer = self._buffer.new_empty(0)
        return total


class _Concatenate(torch.autograd.Function):
    """Keys of a part after those of its prompt. The prompt's gradient is kept in ``given``, or sent on at the last part."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor | None, new: Tensor, given: _Given, sent: Callable[[], None]) -> Tensor:
        ctx.given, ctx.is_last, ctx.sent, ctx.has_run = given, edge is not None, sent, False
        return given.in_front_of(new)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _check_once(ctx.has_run)
        ctx.has_run = True
        given: _Given = ctx.given
        count = len(given.edge)
        given.add(gradient[:count])
        if not ctx.is_last:
            return None, gradient[count:], None, None
        ctx.sent()
        return given.send(gradient.dtype), gradient[count:], None, None


def _check_once(has_run: bool) -> None:
    """
    Raises:
        RuntimeError: a second backward goes through a part. The prompt would get the part's gradient twice, be it that the second
            one is the other half of a loss, or that the first one was there to be looked at.
    """
    if has_run:
        raise RuntimeError(
            "a second backward goes through responses that share the forward of their prompt with other micro-batches, which "
            "would count them twice: run one backward for each micro-batch, or set prefix_grouper_regroup='none' in TRL, "
            "prefix_grouper.regroup=none in verl"
        )


class _State:
    """The state of a recurrent layer after the prompt, or the inputs that its convolution still needs.

    Attributes:
        live (`Tensor`): what the prompt's forward computed, with its graph.
        gradient (`Tensor` or None): what the parts so far have sent back to it.
    """

    def __init__(self, live: Tensor) -> None:
        self.live = live
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def for_part(self, is_last: bool, sent: Callable[[], None]) -> Tensor:
        """The state, for a part: its gradient is kept here, or sent on at the last part."""
        if is_last:
            return _SendOn.apply(self.live, self, sent)  # type: ignore[no-any-return]
        leaf, has_run = self.live.detach().requires_grad_(), False

        def add(gradient: Tensor) -> None:
            nonlocal has_run
            _check_once(has_run)
            has_run = True
            self.add(gradient)

        leaf.register_hook(add)
        return leaf


class _SendOn(torch.autograd.Function):
    """A state, whose gradient is that of all parts."""

    @staticmethod
    def forward(ctx: Any, live: Tensor, state: _State, sent: Callable[[], None]) -> Tensor:
        ctx.state, ctx.sent, ctx.has_run = state, sent, False
        return live.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        _check_once(ctx.has_run)
        ctx.has_run = True
        state: _State = ctx.state
        state.add(gradient)
        total, state.gradient = state.gradient, None
        ctx.sent()
        return total, None, None


class _Attach(torch.autograd.Function):
    """``values`` as they are, whose backward sends ``output`` a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.output = (output.shape, output.dtype, output.device)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        shape, dtype, device = ctx.output
        return torch.zeros(shape, dtype=dtype, device=device), *gradients


class PromptCache:
    """Keys, values and states of one prompt in every layer, and the gradients that its responses send back.

    :attr:`is_closed` says whether the last part's backward has reached the prompt; a trainer checks it before it steps.
    """

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[_Given, _Given]] = {}
        self._states: dict[tuple[nn.Module, str], _State] = {}
        self._num_tokens = 0
        self._is_recomputed = False
        self._runs = self._collects = False
        self._waiting: set[tuple[nn.Module, int | str]] = set()
        self._is_last = False
        self._output: Tensor | None = None

    def run(
        self,
        model: nn.Module,
        layout: PrefixLayout,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        images: Mapping[str, Tensor] | None = None,
        *,
        recompute: Sequence[nn.Module] = (),
    ) -> None:
        """Forward the prompt through the decoder of ``model``, without its head. Its graph is kept where gradients are on.

        The prompt's images go through the vision tower here, and their gradients back through it with the last part.

        Args:
            model: as for :func:`.why_not_reuse`, which has no objection.
            layout: one row of ``P`` tokens, of which ``P - 1`` are forwarded.
            input_ids, position_ids: ``LongTensor[P - 1]``, see :func:`packed_inputs`.
            images: the prompt's image tensors and token kinds, as the model takes them.
            recompute: layers that run again in the backward, whose graph is not kept, see :func:`.recomputable_layers`.

        Raises:
            UnsupportedModelError: a layer runs twice in one forward, so that its keys would be taken for one another.
        """
        layout = layout.to(layout.position_ids.device)
        layout.cache = self
        self._num_tokens, self._runs, self._is_recomputed = layout.num_tokens, True, bool(recompute)
        try:
            inputs = {**packed_inputs(layout, input_ids, position_ids), **(images or {})}
            with recomputed(recompute):
                output = _run_decoder(model, inputs).last_hidden_state
        finally:
            self._runs = False
        if isinstance(model, FSDPModule):
            self._output = output if output.requires_grad else None
        elif not has_inside(model, FSDPModule):
            ends = [given.edge for pair in self._layers.values() for given in pair]
            ends += [state.live for state in self._states.values()]
            _run_early(end.grad_fn for end in ends)
        if not self._layers and not self._states:
            raise UnsupportedModelError(f"no layer of {type(model).__name__} has brought keys or a state to the cache")
        self._waiting = {
            (module, i)
            for module, pair in self._layers.items()
            for i, given in enumerate(pair)
            if given.edge.requires_grad
        }
        self._waiting |= {place for place, state in self._states.items() if state.live.requires_grad}

    @classmethod
    def of_one_token(cls, model: nn.Module, device: torch.device) -> PromptCache:
        """A prompt without parts: a forward of one token, to which nothing but :meth:`attach` sends gradients, all zero.

        For processes that have to forward something while others forward a prompt.
        """
        cache, token = cls(), torch.zeros(1, dtype=torch.long, device=device)
        cache.run(model, PrefixLayout.from_groups([1], [[1]], device=device), token)
        cache._layers, cache._states, cache._waiting = {}, {}, set()
        return cache

    def collect(self, layout: PrefixLayout, num_tokens: int) -> None:
        """Take keys and values from the forward of ``layout`` that comes next, without gradients, instead of :meth:`run`.

        Not for recurrent layers, whose state after the prompt is not at hand there.

        Args:
            layout: of the prompt's first part, prompt included.
            num_tokens: of the prompt, before those of ``layout``.

        Raises:
            RuntimeError: gradients are on, and would go through the part's graph, which its own backward frees.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("a part's own forward can fill a PromptCache without gradients only: call run() first")
        layout.cache, self._num_tokens, self._collects = self, num_tokens, True

    def prepare(self, part: PrefixLayout, *, last: bool) -> None:
        """Let ``part``, a layout whose given tokens are this prompt, be forwarded against it.

        Args:
            part: made by :meth:`PrefixLayout.given`.
            last: whether its backward is the last one, and goes on through the prompt.

        Raises:
            ValueError: ``part`` does not have as many given tokens as the prompt.
        """
        if part.num_given != self._num_tokens:
            raise ValueError(f"the part has {part.num_given} given tokens and the prompt {self._num_tokens}")
        part.cache, self._is_last, self._collects = self, last, False

    def when_reached(self, call: Callable[[], None]) -> None:
        """Call ``call`` when the backward that :meth:`attach` lets in arrives at the prompt."""
        if self._output is not None:
            self._output.register_hook(lambda _: call())

    def attach(self, *values: Tensor) -> tuple[Tensor, ...]:
        """``values``, computed from the last part, whose backward reaches every layer of the prompt.

        The same values where that makes no difference. A caller puts what enters its loss through this function; under
        FSDP2 the backward would meet parameters that nobody has gathered otherwise.
        """
        output, self._output = self._output, None
        return values if output is None else _Attach.apply(output, *values)  # type: ignore[no-any-return]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt that have been forwarded."""
        return self._num_tokens

    @property
    def is_recomputed(self) -> bool:
        """Whether the prompt's layers run again in the backward, so that their graph is not in memory."""
        return self._is_recomputed

    @property
    def is_closed(self) -> bool:
        """Whether nothing is left to send back: the prompt's backward has run, or it has no graph."""
        return not self._waiting and self._output is None

    def join(self, module: nn.Module, key: Tensor, value: Tensor, layout: PrefixLayout) -> tuple[Tensor, Tensor]:
        """Called by the attention of each layer.

        Args:
            module: the layer's attention.
            key, value: ``[num_queries, H_kv, D]``, of the prompt or of a part.
            layout: of the forward that runs.

        Returns:
            keys and values for all tokens of ``layout``.
        """
        if not layout.num_given:
            self._take(module, key, value)
            return key, value
        if module not in self._layers:
            raise RuntimeError(
                f"{type(module).__name__} has no keys of the prompt: it did not run in PromptCache.run()"
            )
        joined = [self._join(module, i, new) for i, new in enumerate((key, value))]
        return joined[0], joined[1]

    def keep_state(self, module: nn.Module, name: str, state: Tensor) -> None:
        """Called by a recurrent layer while the prompt is forwarded.

        Args:
            module: the layer's mixer.
            name: of the state in it.
            state: after the prompt's last token.
        """
        if not self._runs:
            return
        if (module, name) in self._states:
            raise UnsupportedModelError(_TWICE.format(type(module).__name__))
        self._states[module, name] = _State(state)

    def state(self, module: nn.Module, name: str, requires_grad: bool) -> Tensor:
        """Called by a recurrent layer in the forward of a part: what :meth:`keep_state` was given.

        Args:
            module, name: as there.
            requires_grad: whether the part's inputs of the recurrence do.
        """
        if (module, name) not in self._states:
            raise RuntimeError(
                f"{type(module).__name__} has no state of the prompt: it did not run in PromptCache.run()"
            )
        state = self._states[module, name]
        if not (torch.is_grad_enabled() and (requires_grad or state.live.requires_grad)):
            return state.live.detach()
        _check_graph(module, state.live)
        return state.for_part(self._is_last, functools.partial(self._waiting.discard, (module, name)))

    def _take(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        if self._collects:
            key, value = key[: self._num_tokens].clone(), value[: self._num_tokens].clone()
        elif not self._runs:  # gradient checkpointing runs the layer again: its first keys hold the graph
            return
        if module in self._layers:
            raise UnsupportedModelError(_TWICE.format(type(module).__name__))
        self._layers[module] = (_Given(key), _Given(value))

    def _join(self, module: nn.Module, index: int, new: Tensor) -> Tensor:
        given = self._layers[module][index]
        if not (torch.is_grad_enabled() and (new.requires_grad or given.edge.requires_grad)):
            return given.in_front_of(new)
        _check_graph(module, given.edge)
        if not new.requires_grad:  # where the vision tower learns alone
            new = new.detach().requires_grad_()
        sent = functools.partial(self._waiting.discard, (module, index))
        return _Concatenate.apply(given.edge if self._is_last else None, new, given, sent)  # type: ignore[no-any-return]


_TWICE = (
    "{} runs twice in one forward, so that the keys of its prompt cannot be told apart: forward whole groups at once, and set "
    "prefix_grouper_regroup='none' in TRL, prefix_grouper.regroup=none in verl"
)


def _check_graph(module: nn.Module, live: Tensor) -> None:
    """Refuse to begin a part, whose gradients are wanted, from what has none."""
    if not live.requires_grad:
        raise RuntimeError(
            f"{type(module).__name__} has lost the graph of its prompt, whose gradient would be missing: checkpoint "
            "with use_reentrant=False, and forward the prompt with gradients on"
        )


# Above the numbers that autograd gives to nodes, and below that of the nodes that accumulate gradients, which always go first.
_EARLY = 1 << 48


def _run_early(ends: Iterable[Node | None]) -> None:
    """Let the nodes of the graph behind ``ends`` run before younger ones as soon as they can.

    Autograd takes the youngest of the nodes whose gradients have arrived, which are those of a part: all of its layers, and
    then all of the prompt's. Each weight is in both, and its gradient from the part waits for the prompt's: as much memory as
    all gradients take. Where the prompt's nodes go first, a layer of the prompt follows on that layer of the part. Not under
    FSDP2, whose hooks free the parameters of a layer between the two.
    """
    left = [node for node in ends if node is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if not node.next_functions:  # it accumulates the gradient of a weight
            continue
        node._set_sequence_nr(_EARLY + node._sequence_nr() % _EARLY)  # type: ignore[attr-defined]
        for inner, _ in node.next_functions:
            if inner is not None and inner not in seen:
                seen.add(inner)
                left.append(inner)


def _run_decoder(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Forward of the decoder in ``model``; under FSDP2 as a forward of ``model``, which gathers what it holds itself."""
    if not isinstance(model, FSDPModule):
        return decoder(model)(**inputs)
    name = "_prefix_grouper_run_decoder"
    object.__setattr__(model, name, lambda **given: decoder(model)(**given))
    register_fsdp_forward_method(model, name)
    try:
        return getattr(model, name)(**inputs)
    finally:
        object.__delattr__(model, name)


def decoder(model: nn.Module) -> Any:
    """The transformers model inside ``model``, without its language-model head."""
    return transformers_model(model).base_model


def has_inside(model: nn.Module, wrapper: type) -> bool:
    """Whether a module of ``model`` is sharded by ``wrapper``; only where there are processes to shard it over."""
    return dist.is_initialized() and any(isinstance(module, wrapper) for module in model.modules())
