"""State forking: recurrent mixers scan a shared prefix once, and each branch continues from the state at its end.

A gated delta net (arXiv 2412.06464) or a Mamba-2 layer (arXiv 2405.21060) mixes tokens in two places: a short causal
convolution, and a scan whose kernel takes an initial state and returns the final one, with gradients through both. The
segments of a layout are disjoint pieces of the rows, and by the branch rule a child begins right after its parent. So

- the convolution of a segment needs the last ``K - 1`` inputs of the path that leads to it, and
- its scan starts from the final state of its parent. The gradients of all branches meet in that state.

The forward of the module itself runs on the packed row. Only the two functions that mix tokens are replaced, and only for
that call: as globals of the forward or as attributes of the module, whichever its code uses. Where that is impossible
(:func:`why_not_forked`), the mixer runs on whole rows instead, see modeling/mixers/on_rows.py.

A prompt that is forwarded once for several forwards of its responses (modeling/prompt_cache.py) ends in a state and in
``K - 1`` inputs, which the responses begin from.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError

FORKED = "state forking"
ON_ROWS = "expand, run, collapse"
_CHUNK = 64  # tokens that kernels of the delta rule take at a time

# ---------------------------------------------------------------------------------------------- segments, level by level


class _Batch:
    """Segments of one level that are scanned together: ``N`` rows of ``L`` positions.

    Attributes:
        index (`LongTensor[N, L]`): packed positions; a shorter segment repeats its last one.
        parents (`LongTensor[N]` or None): index of each initial state among the final states of the level above.
        forks: whether other segments continue from these. Then none is padded: padding would change the final states.
    """

    __slots__ = ("forks", "index", "parents")

    def __init__(self, index: Tensor, parents: Tensor | None, forks: bool) -> None:
        self.index, self.parents, self.forks = index, parents, forks


class Scan:
    """The order in which the segments of a layout are scanned.

    Args:
        layout: the layout.
        chunk: tokens that the kernel takes at a time. Leaves with the same number of chunks are scanned together, so that
            no row is padded beyond its last chunk.
    """

    def __init__(self, layout: PrefixLayout, chunk: int) -> None:
        self.device, self.num_tokens = layout.position_ids.device, layout.num_queries
        self._spans = _spans_behind_given(layout)
        self._goes_on = bool(layout.num_given)  # from the states and inputs at the end of the given tokens
        is_prompt = layout.cache is not None and not self._goes_on  # one segment, and the state after it is kept
        self._contexts: dict[int, tuple[Tensor, Tensor]] = {}
        self.levels: list[list[_Batch]] = []
        real: list[Tensor] = []
        state_of: dict[int, int] = {}
        for members in self._by_level():
            batches = [(members, True)] if is_prompt else _batches(members, self._spans, chunk)
            self.levels.append([self._batch(segments, state_of, forks) for segments, forks in batches])
            real += [self._is_real(segments) for segments, _ in batches]
            forking = [segment for segments, forks in batches if forks for segment in segments]
            state_of = {segment: row for row, segment in enumerate(forking)}
        scanned = torch.cat([batch.index.flatten() for level in self.levels for batch in level])
        place = torch.cat(real).to(self.device).nonzero().flatten()
        self.home = torch.empty(self.num_tokens, dtype=torch.int64, device=self.device)
        self.home[scanned[place]] = place

    def _by_level(self) -> list[list[int]]:
        levels: list[list[int]] = []
        depth: list[int] = []
        for segment, (_, _, parent) in enumerate(self._spans):  # parents come before children
            depth.append(0 if parent < 0 else depth[parent] + 1)
            if depth[-1] == len(levels):
                levels.append([])
            levels[depth[-1]].append(segment)
        return levels

    def _batch(self, segments: list[int], state_of: dict[int, int], forks: bool) -> _Batch:
        start, end, parent = torch.tensor([self._spans[s] for s in segments]).unbind(1)
        column = torch.arange(int((end - start).max()))
        index = torch.minimum(start[:, None] + column, end[:, None] - 1)
        parents = torch.tensor([state_of[p] for p in parent.tolist()]) if int(parent[0]) >= 0 else None
        if parents is None and self._goes_on:
            parents = torch.zeros(len(segments), dtype=torch.int64)
        return _Batch(index.to(self.device), None if parents is None else parents.to(self.device), forks)

    def _is_real(self, segments: list[int]) -> Tensor:
        lengths = torch.tensor([self._spans[s][1] - self._spans[s][0] for s in segments])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).flatten()

    @property
    def num_scanned(self) -> int:
        """Positions that enter the kernel, padding included."""
        return sum(batch.index.numel() for level in self.levels for batch in level)

    def scan(
        self,
        run: Callable[..., tuple[Tensor, Tensor | None]],
        inputs: tuple[Tensor, ...],
        *,
        given: Tensor | None = None,
        keep: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Run a recurrence over all rows, each segment once.

        Args:
            run: ``(inputs [N, L, ...], initial state [N, ...] or None, whether to return the final one)`` ->
                ``(output [N, L, ...], final state [N, ...] or None)``.
            inputs: the tensors with one entry for each token, ``[1, T, ...]`` each.
            given: the state after the given tokens, ``[1, ...]``, where the layout has some.
            keep: called with the state after the last token, ``[1, ...]``, where the layout is that of a prompt.

        Returns:
            the outputs, ``[1, T, ...]``.
        """
        outputs: list[Tensor] = []
        states = given
        for level in self.levels:
            finals = []
            for batch in level:
                initial = None if batch.parents is None or states is None else states[batch.parents]
                output, final = run(tuple(x[0][batch.index] for x in inputs), initial, batch.forks)
                outputs.append(output.flatten(0, 1))
                if batch.forks:
                    finals.append(final)
            states = torch.cat(finals) if finals else None  # type: ignore[arg-type]
        if keep is not None:
            assert states is not None
            keep(states)
        return torch.cat(outputs)[self.home].unsqueeze(0)

    def convolve(
        self,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        width: int,
        *,
        given: Tensor | None = None,
        keep: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """``run``, a causal convolution over ``width`` tokens of ``[1, L, d]``, on the packed ``x [1, T, d]``.

        ``given`` and ``keep`` as for :meth:`scan`; the state is the last ``width - 1`` inputs, ``[width - 1, d]``.
        """
        if width not in self._contexts:
            with torch.inference_mode(False):
                self._contexts[width] = self._with_context(width)
        index, home = self._contexts[width]
        if keep is not None:
            keep(F.pad(x[0], (0, 0, width - 1, 0))[x.shape[1] :])
        if given is not None:
            inputs = torch.cat([given, x[0]])[index + width - 1]
        else:
            inputs = x[0][index.clamp(min=0)].masked_fill((index < 0)[:, None], 0)
        return run(inputs.unsqueeze(0))[0][home].unsqueeze(0)

    def _with_context(self, width: int) -> tuple[Tensor, Tensor]:
        """All segments end to end, each preceded by the ``width - 1`` positions that its first outputs need.

        Returns:
            index (`LongTensor[T + S * (width - 1)]`): packed positions, -1 before a row's beginning; given tokens
                have negative ones, the last is -1.
            home (`LongTensor[T]`): for each packed position, its place in ``index``.
        """
        index: list[Tensor] = []
        home: list[Tensor] = []
        offset = 0
        for start, end, parent in self._spans:
            before = [*self._path(parent, width - 1)]
            index += [torch.tensor(before[::-1], dtype=torch.int64), torch.arange(start, end)]
            home.append(torch.arange(end - start) + offset + width - 1)
            offset += end - start + width - 1
        return torch.cat(index).to(self.device), torch.cat(home).to(self.device)

    def _path(self, segment: int, count: int) -> Iterator[int]:
        """The last ``count`` positions of the path to the end of ``segment``, backwards; beyond its beginning see above."""
        while count and segment >= 0:
            start, end, parent = self._spans[segment]
            taken = range(end - 1, max(start, end - count) - 1, -1)
            yield from taken
            segment, count = parent, count - len(taken)
        yield from range(-1, -1 - count, -1) if self._goes_on else [-1] * count


def _spans_behind_given(layout: PrefixLayout) -> list[tuple[int, int, int]]:
    """Start, end and parent of the segments that are forwarded, counted from the first of them on; -1 for no such parent.

    Raises:
        ValueError: with given tokens, a segment that does not go on from the last of them: several branches need several
            states. In the layout of a prompt, a second segment.
    """
    spans = [(start, end, parent) for start, end, parent, _ in layout.segments.tolist()]
    given = layout.num_given
    first = sum(start < given for start, *_ in spans)
    if given and any(parent < first - 1 for *_, parent in spans[first:]):
        raise ValueError("a part has rows that do not go on from its last given token: give it rows of one prompt")
    if layout.cache is not None and not given and len(spans) > 1:
        raise ValueError(f"a prompt is forwarded as one segment, and the layout has {len(spans)}")
    return [(start - given, end - given, max(parent - first, -1)) for start, end, parent in spans[first:]]


def _batches(members: list[int], spans: list[tuple[int, int, int]], chunk: int) -> list[tuple[list[int], bool]]:
    """Segments of a level that are scanned together, and whether branches continue from them; those come first."""
    inner = {parent for _, _, parent in spans}
    found: dict[tuple[bool, int], list[int]] = {}
    for segment in members:
        length = spans[segment][1] - spans[segment][0]
        key = (False, length) if segment in inner else (True, -(-length // chunk))
        found.setdefault(key, []).append(segment)
    return [(segments, not is_leaf) for (is_leaf, _), segments in sorted(found.items())]


_SCANS: weakref.WeakKeyDictionary[PrefixLayout, dict[int, Scan]] = weakref.WeakKeyDictionary()


def scan_of(layout: PrefixLayout, chunk: int = _CHUNK) -> Scan:
    """The scan of ``layout``, worked out once for each layout and chunk size."""
    scans = _SCANS.setdefault(layout, {})
    if chunk not in scans:
        with torch.inference_mode(False):  # a later training step may use it as well
            scans[chunk] = Scan(layout, chunk)
    return scans[chunk]


def _states(layout: PrefixLayout, module: nn.Module, name: str, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """``given`` and ``keep`` of one of the two functions, for layouts of prompts that are reused, and of their parts.

    Args:
        layout: of the forward that runs.
        module: the mixer.
        name: of the function in it.
        inputs: of the function.
    """
    if layout.cache is None:
        return {}
    if layout.num_given:
        return {"given": layout.cache.state(module, name, any(x.requires_grad for x in inputs))}
    return {"keep": functools.partial(layout.cache.keep_state, module, name)}


# -------------------------------------------------------------------------------------- the two functions that mix tokens


@dataclass(frozen=True)
class Recipe:
    """How the forward of a mixer class calls the functions that mix tokens.

    Attributes:
        convolutions: names of its convolutions.
        convolve: ``(layout, module, its name, original) -> replacement`` for one of them.
        scan: name of its scan, None for mixers that only convolve.
        fork: ``(layout, module, original) -> replacement`` for the scan.
        state: the parameters by which the scan takes and returns a state.
        fused: a function that does everything at once, or returns None to ask for the separate steps.
    """

    convolutions: tuple[str, ...]
    convolve: Callable[[PrefixLayout, nn.Module, str, Any], Callable[..., Any]]
    scan: str | None = None
    fork: Callable[[PrefixLayout, nn.Module, Callable[..., Any]], Callable[..., Any]] | None = None
    state: tuple[str, ...] = ()
    fused: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all functions that are replaced."""
        return (*self.convolutions, *filter(None, (self.scan, self.fused)))


def _convolve_function(layout: PrefixLayout, module: nn.Module, name: str, original: Any) -> Callable[..., Tensor]:
    """For ``causal_conv1d_fn(x [1, d, T], weight [d, K], ...)``."""

    def convolution(*args: Any, **kwargs: Any) -> Tensor:
        x = kwargs.pop("x", None)
        named = x is not None
        x, rest = (x, args) if named else (args[0], args[1:])
        weight = kwargs["weight"] if "weight" in kwargs else rest[0]

        def run(inputs: Tensor) -> Tensor:
            columns = inputs.transpose(1, 2)
            if original is None:  # the module then falls back to this
                out = F.silu(module.conv1d(columns)[..., : columns.shape[-1]])  # type: ignore[operator]
            else:
                out = original(x=columns, **kwargs) if named else original(columns, *rest, **kwargs)
            return out.transpose(1, 2)

        packed = x.transpose(1, 2)
        states = _states(layout, module, name, [packed])
        return scan_of(layout).convolve(run, packed, weight.shape[-1], **states).transpose(1, 2)

    return convolution


def _convolve_module(
    layout: PrefixLayout, module: nn.Module, name: str, original: Any
) -> Callable[..., tuple[Tensor, None]]:
    """For a module that maps ``x [1, T, d]`` to its convolution and a state, which nobody reads without a cache."""

    def convolution(x: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        states = _states(layout, module, name, [x])
        return scan_of(layout).convolve(
            lambda inputs: original(inputs, **kwargs)[0], x, original.weight.shape[-1], **states
        ), None

    return convolution


def _fork_delta_rule(
    layout: PrefixLayout, module: nn.Module, original: Callable[..., Any]
) -> Callable[..., tuple[Tensor, None]]:
    """For ``chunk_gated_delta_rule(query, key, value, g=, beta=)``, ``[1, T, H, ...]`` each."""

    def scan(
        query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, None]:
        def run(inputs: tuple[Tensor, ...], initial: Tensor | None, forks: bool) -> tuple[Tensor, Tensor | None]:
            state = {"initial_state": initial, "output_final_state": forks}
            q, k, v, decay, write = inputs
            return original(q, k, v, g=decay, beta=write, **{**kwargs, **state})

        inputs = (query, key, value, g, beta)
        return scan_of(layout).scan(run, inputs, **_states(layout, module, "scan", inputs)), None

    return scan


def _fork_chunk_scan(layout: PrefixLayout, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=)``: all but ``A [H]`` are ``[1, T, ...]``."""

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("z") is not None:
            raise UnsupportedModelError("a Mamba-2 layer gates inside its scan, which state forking does not know")
        returns_state = kwargs.pop("return_final_states", False)

        def run(inputs: tuple[Tensor, ...], initial: Tensor | None, forks: bool) -> tuple[Tensor, Tensor | None]:
            x, dt, B, C = inputs
            state = {"initial_states": initial, "return_final_states": forks}
            output = original(x, dt, A, B, C, **{**kwargs, **state})
            return output if forks else (output, None)

        packed = (x, dt, B, C)
        states = _states(layout, module, "scan", (*packed, A))
        output = scan_of(layout, kwargs["chunk_size"]).scan(run, packed, **states)
        return (output, None) if returns_state else output

    return scan


_DELTA_STATE = ("initial_state", "output_final_state")

# In the order in which they are tried. Which one fits is read from the code of the module's forward.
DELTA_RULE = (
    Recipe(("causal_conv1d_fn",), _convolve_function, "torch_chunk_gated_delta_rule", _fork_delta_rule, _DELTA_STATE),
    Recipe(("causal_conv1d_fn",), _convolve_function, "chunk_kimi_delta_attention", _fork_delta_rule, _DELTA_STATE),
    # transformers before 5.23
    Recipe(("causal_conv1d_fn",), _convolve_function, "chunk_gated_delta_rule", _fork_delta_rule, _DELTA_STATE),
    Recipe(
        ("q_conv1d", "k_conv1d", "v_conv1d"), _convolve_module, "chunk_gated_delta_rule", _fork_delta_rule, _DELTA_STATE
    ),
)
MAMBA2 = (
    Recipe(
        ("causal_conv1d_fn",),
        _convolve_function,
        "mamba2_chunk_scan",
        _fork_chunk_scan,
        ("initial_states", "return_final_states"),
        fused="mamba2_split_conv1d_scan_combined",
    ),
)
SHORT_CONVOLUTION = (Recipe(("causal_conv1d_fn",), _convolve_function),)


# ------------------------------------------------------------------------------------------------------ into the module


def why_not_forked(module: nn.Module, recipes: tuple[Recipe, ...]) -> str | None:
    """Why ``module`` cannot fork its state and takes whole rows; None where it can."""
    code = _raw_forward(module)
    recipe = _fitting(code, recipes)
    if recipe is None:
        return (
            f"transformers {transformers.__version__} has no seam between what mixes tokens and the rest of its forward"
        )
    if any("_hf_hook" in vars(child) for child in module.children()):
        return "accelerate has put hooks on its parts (offloading)"
    if recipe.scan is not None:
        scan = _original(module, code, recipe.scan)
        if missing := sorted(set(recipe.state) - _parameters(scan)):
            return f"its kernel {recipe.scan} takes no {' and no '.join(missing)}"
    return None


def forked_forward(module: nn.Module, recipes: tuple[Recipe, ...], layout: PrefixLayout) -> Callable[..., Any]:
    """The forward of ``module`` for packed rows ``[1, T, d]`` of ``layout``; nothing is changed in the module.

    Args:
        module: a mixer for which :func:`why_not_forked` gives no reason.
        recipes: the recipes of its kind.
        layout: the layout of the packed row.
    """
    code = _raw_forward(module)
    recipe = _fitting(code, recipes)
    assert recipe is not None
    replaced: dict[str, Any] = {}
    for name in recipe.convolutions:
        replaced[name] = recipe.convolve(layout, module, name, _original(module, code, name))
    if recipe.scan is not None and recipe.fork is not None:
        replaced[recipe.scan] = recipe.fork(layout, module, _original(module, code, recipe.scan))
    if recipe.fused is not None:
        replaced[recipe.fused] = lambda *args, **kwargs: None
    uses_globals = _names(code)[0]
    namespace = code.__globals__ | {name: value for name, value in replaced.items() if name in uses_globals}
    forward = types.FunctionType(code.__code__, namespace, code.__name__, code.__defaults__, code.__closure__)
    forward.__kwdefaults__ = code.__kwdefaults__
    attributes = {name: value for name, value in replaced.items() if name not in uses_globals}
    return functools.partial(forward, _Instead(module, attributes) if attributes else module)


class _Instead:
    """Stands in for a module, with some attributes replaced."""

    __slots__ = ("_attributes", "_module")

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        self._module, self._attributes = module, attributes

    def __getattr__(self, name: str) -> Any:
        return self._attributes[name] if name in self._attributes else getattr(self._module, name)


def _raw_forward(module: nn.Module) -> types.FunctionType:
    """The forward of transformers' own class, without its decorators."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.models.") and "_prefix_grouper_base" not in vars(cls):
            return inspect.unwrap(cls.forward)  # type: ignore[attr-defined,return-value]
    raise TypeError(f"{type(module).__name__} is not a class of transformers")


def _fitting(code: types.FunctionType, recipes: tuple[Recipe, ...]) -> Recipe | None:
    used_globals, used_attributes = _names(code)
    return next((r for r in recipes if all(n in used_globals | used_attributes for n in r.names)), None)


@functools.lru_cache(maxsize=256)
def _names(code: types.FunctionType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that a function uses."""
    instructions = list(dis.get_instructions(code))
    loaded = frozenset(i.argval for i in instructions if i.opname == "LOAD_GLOBAL")
    return loaded, frozenset(i.argval for i in instructions if i.opname in {"LOAD_ATTR", "LOAD_METHOD"})


def _original(module: nn.Module, code: types.FunctionType, name: str) -> Any:
    return code.__globals__[name] if name in _names(code)[0] else getattr(module, name)


def _parameters(function: Any) -> frozenset[str]:
    """Parameters that a kernel takes. transformers wraps kernels and silently drops keywords that they do not take."""
    return _taken_by(function.forward if isinstance(function, nn.Module) else function)


@functools.lru_cache(maxsize=256)  # asked before each call of each mixer, and the answer is that of the object
def _taken_by(function: Any) -> frozenset[str]:
    names = frozenset(inspect.signature(function).parameters)
    outer = inspect.getclosurevars(function).nonlocals if inspect.isroutine(function) else {}
    return names & set(outer["applicable_params"]) if "applicable_params" in outer else names
