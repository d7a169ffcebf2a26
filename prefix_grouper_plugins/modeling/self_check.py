"""The self-check: a tiny packed forward and backward of the real model, against forwards of its rows alone.

What a model is made of says that packed rows should work (modeling/support/report.py); this shows that they do, with the
weights, the code and the kernels that are there now. A few rows that form a tree are forwarded one by one and as one
packed row. Three things are compared:

- the output at every packed position;
- the gradient of a random projection of all outputs with respect to the input embeddings, which exist also where every
  weight is frozen, and with respect to one trainable parameter, where there is one;
- the gradient of a single row's outputs at tokens of other rows. It must be zero, exactly and in every dtype, so this
  part needs no tolerance.

The tolerance of the first two is that of rounding. Where a difference exceeds what is plain in the dtype, it is compared
with what rounding does to this model: the rows are forwarded once more, and every module's output is moved by half a unit
in its last place. In half precision rounding also sends tokens to other experts, so there the differences of a mixture
of experts are judged by their medians.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.attention import is_enabled, packed_inputs, row_positions
from prefix_grouper_plugins.modeling.rope import row_limit
from prefix_grouper_plugins.modeling.support.report import (
    attention_configs,
    largest_window,
    transformers_model,
    without_router_loss,
)

# Differences that need no explanation: of outputs and of gradients, relative to their norms. transformers computes norms,
# rotary angles and routers in float32 even where the model is in float64.
_PLAIN = {torch.float64: (1e-4, 1e-3), torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 2e-2)}
_PLAIN_ELSE = (2e-3, 4e-3)  # float16
_TIMES_NOISE = 4.0  # how much larger than measured rounding a difference may be: the two are samples, not bounds
_CHAOS = 0.25  # where rounding alone moves the outputs so far, a comparison says nothing
_LEAK = 1e-6  # of the largest gradient; kernels write zeros, not small numbers
_LONGEST_WINDOW = 64  # longer sliding windows are not reached by the rows, so that the self-check stays cheap


@dataclass(frozen=True)
class SelfCheck:
    """What :func:`self_check` found.

    Attributes:
        model: name of the model's class.
        tokens, row_tokens: tokens of the packed row, and of the rows that it was compared with.
        seconds: what it took.
        outputs, gradient: relative differences (L2 norms), 0.0 where nothing was compared.
        passed: whether packed rows were shown to be right.
        reason: why packed rows are wrong; None where they are right, or where nothing could be shown.
        not_covered: what could not be shown; None where everything was.
    """

    model: str
    tokens: int = 0
    row_tokens: int = 0
    seconds: float = 0.0
    outputs: float = 0.0
    gradient: float = 0.0
    passed: bool = False
    reason: str | None = None
    not_covered: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"packed rows of {self.model} are not its rows: {self.reason}"
        if not self.passed:
            return f"{self.model} was not proved: {self.not_covered}"
        said = (
            f"{self.model} proved in {self.seconds:.2f} s: {self.tokens} packed tokens against rows of "
            f"{self.row_tokens}, outputs differ by {self.outputs:.1e}, gradients by {self.gradient:.1e}"
        )
        return said if self.not_covered is None else f"{said}; not covered: {self.not_covered}"


def self_check(model: nn.Module, device: torch.device | None = None) -> SelfCheck:
    """Compare a tiny packed forward and backward of ``model`` with forwards of the rows. Leaves the model as it was.

    No gradient, cache, buffer, random state or mode of a module is changed. A model that was proved before is not
    proved again, unless its attention backend has changed. Where parameters are sharded, every process must call it, with
    the outermost module: it runs collectives.

    Args:
        model: has been through :func:`~prefix_grouper_plugins.enable_prefix_grouper`, bare or wrapped.
        device: where token ids go, by default where the input embeddings are (under CPU offload they are elsewhere).

    Returns:
        the self-check; nothing is raised for a model that fails it.

    Raises:
        ValueError: the model has not been enabled.
    """
    if not is_enabled(model):
        raise ValueError("call enable_prefix_grouper(model) first: this model would read the packed row as one text")
    base = transformers_model(model)
    backends = tuple(str(config._attn_implementation) for config in attention_configs(base))
    known = _CHECKED.get(base)
    if known is not None and known[0] == backends:
        return known[1]
    if (obstacle := not_yet(model)) is not None:
        return SelfCheck(type(base).__name__, not_covered=obstacle)
    with torch.inference_mode(False), torch.enable_grad():
        result = _Comparison(model, base, device).run()
    if result.passed or result.reason is not None:
        _CHECKED[base] = (backends, result)
    return result


_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], SelfCheck]] = weakref.WeakKeyDictionary()


def agreed(result: SelfCheck, device: torch.device) -> SelfCheck:
    """``result``, refuted where it is on any process. A collective: every process calls it at the same point."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return result
    refuted = torch.tensor([result.reason is not None], dtype=torch.int32, device=device)
    dist.all_reduce(refuted, op=dist.ReduceOp.MAX)
    if refuted and result.reason is None:
        return replace(result, reason="another process found a difference")
    return result


def not_yet(model: nn.Module) -> str | None:
    """Why ``model`` cannot be forwarded at this moment."""
    for parameter in model.parameters():
        if parameter.is_meta:
            return "its weights have not been loaded (they are on the meta device)"
        if hasattr(parameter, "ds_id") and parameter.numel() == 0:
            return "DeepSpeed has partitioned its parameters"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters under ``model`` are spread over processes, so that all of them must forward together."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(m, FullyShardedDataParallel) for m in model.modules()
    )


# ------------------------------------------------------------------------------------------------------- the comparison


class _Run:
    """One pass over all rows, in packed places: outputs ``[T, V]``, embedding gradients ``[T, d]``, one parameter's."""

    def __init__(self, outputs: Tensor, gradient: Tensor, parameter: Tensor | None) -> None:
        self.outputs, self.gradient, self.parameter = outputs, gradient, parameter


class _Comparison:
    """The rows of a model and the two ways to forward them."""

    def __init__(self, model: nn.Module, base: Any, device: torch.device | None) -> None:
        self.base = base
        self.sharded = is_sharded(model)
        # DDP would wait for a backward through all parameters; the model inside of it is whole.
        self.model = model if self.sharded else base
        self.embedding = base.get_input_embeddings()
        self.device = device or next((self.embedding if not self.sharded else model).parameters()).device
        self.parameter = None if self.sharded else self._trainable()
        self.generator = torch.Generator().manual_seed(0)
        config = base.config.get_text_config(decoder=True)
        self.window = largest_window(base)
        reach = self.window if self.window is not None and self.window <= _LONGEST_WINDOW else 0
        self.rows = [row.to(self.device) for row in _tree(self._token_ids(config), reach, self.generator)]
        self.layout = PrefixLayout.from_rows(self.rows).to(self.device)
        self.weights = [torch.randn(len(row) - 1, generator=self.generator).to(self.device) for row in self.rows]
        takes = inspect.signature(base.forward).parameters
        # verl's fused heads demand the first, and return log-probs of the second.
        self.settings = {"return_dict": True} if "return_dict" in takes else {}
        self.settings |= without_router_loss(base)
        self.takes_labels = "shift_labels" in takes
        self.probe: Tensor | None = None
        self.dtype = base.dtype
        self.has_experts = any("expert" in name.lower() for name, _ in base.named_modules())

    def run(self) -> SelfCheck:
        start = time.perf_counter()
        result = SelfCheck(type(self.base).__name__, not_covered=self._uncovered())
        limit = row_limit(self.base)
        if limit is not None and max(len(row) for row in self.rows) >= limit[0]:
            return replace(
                result, not_covered=f"its rows are shared below {limit[0]} tokens only (rope_type {limit[1]!r})"
            )
        with _untouched(self.base, self.device):
            try:
                ordinary = self._ordinary()
            except Exception as error:  # whatever it is, the trainer's own forward will say it better
                return replace(result, not_covered=f"the ordinary forward failed with {type(error).__name__}: {error}")
            try:
                result = self._compared(result, ordinary)
            except torch.OutOfMemoryError:
                return replace(result, not_covered="memory does not suffice for a few rows")
            except Exception as error:
                result = replace(result, reason=f"the packed forward failed with {type(error).__name__}: {error}")
        return replace(
            result,
            tokens=self.layout.num_tokens,
            row_tokens=self.layout.num_row_tokens,
            seconds=time.perf_counter() - start,
        )

    def _compared(self, result: SelfCheck, ordinary: _Run) -> SelfCheck:
        packed, leak = self._packed()
        result = replace(
            result,
            outputs=_difference(packed.outputs, ordinary.outputs),
            gradient=_difference(packed.gradient, ordinary.gradient),
        )
        if not leak <= _LEAK:
            return replace(
                result, reason=f"a row depends on tokens of other rows ({leak:.1e} of its gradient lies there)"
            )
        reason = self._excess(packed, ordinary, None)
        if reason is None:
            return replace(result, passed=True)
        noise = self._noise(ordinary)
        if noise is not None and max(noise.values()) > _CHAOS:
            return replace(
                result,
                not_covered=f"rounding in {self.dtype} alone changes what this model computes by {max(noise.values()):.0%}",
            )
        reason = self._excess(packed, ordinary, noise)
        return replace(result, passed=reason is None, reason=reason)

    def _excess(self, found: _Run, expected: _Run, noise: dict[str, float] | None) -> str | None:
        """What differs by more than rounding explains, in words."""
        plain = dict(zip(("outputs", "gradients"), _PLAIN.get(self.dtype, _PLAIN_ELSE), strict=True))
        for name, difference in self._differences(found, expected).items():
            limit = plain["outputs" if name.startswith("outputs") else "gradients"]
            if noise is not None:
                limit += _TIMES_NOISE * noise[name]
            if not difference <= limit:  # catches NaN as well
                return f"{name} differ by {difference:.1e}, rounding in {self.dtype} explains {limit:.0e}"
        return None

    def _differences(self, found: _Run, expected: _Run) -> dict[str, float]:
        pairs = {
            "outputs": (found.outputs, expected.outputs),
            "gradients": (found.gradient, expected.gradient),
        }
        differences = {f"{name} of a typical token": self._typical(_by_position(*pair)) for name, pair in pairs.items()}
        if not (self.has_experts and self.dtype.itemsize < 4):
            differences |= {name: _difference(*pair) for name, pair in pairs.items()}
            if expected.parameter is not None and found.parameter is not None:
                differences["gradients of a parameter"] = _difference(found.parameter, expected.parameter)
        return differences

    def _typical(self, errors: Tensor) -> float:
        """The median over a segment, of the worst segment: the first row of a tree is right even without a layout."""
        medians = [errors[start:end].median() for start, end in self.layout.segments[:, :2].tolist()]
        return float(torch.stack(medians).max())

    # ------------------------------------------------------------------------------------------------------ the passes

    def _ordinary(self) -> _Run:
        """Row by row."""
        outputs, gradients, of_parameter = [], [], []
        for i, row in enumerate(self.rows):
            output, leaf = self._forward(row.roll(-1), input_ids=row[None], use_cache=False)
            gradient, parameter = self._backward(self._objective(output[:-1], i), leaf)
            outputs.append(output.detach())
            gradients.append(gradient[:-1])
            of_parameter.append(parameter)
        packed = torch.zeros(self.layout.num_tokens, gradients[0].shape[-1], device=self.device)
        packed.index_add_(0, self.layout.row_index, torch.cat(gradients).float())
        parameters = [p for p in of_parameter if p is not None]
        total = sum(parameters[1:], parameters[0]) if parameters else None
        return _Run(self.layout.pack(outputs), packed, total)

    def _packed(self) -> tuple[_Run, float]:
        """As one packed row; and the largest gradient of one row's outputs at tokens of others, over that at its own."""
        chosen = len(self.rows) // 2  # rows stand before it and behind it
        output, leaf = self._forward_packed()
        objectives = [self._objective(part, i) for i, part in enumerate(self.layout.unpack(output))]
        of_one, _ = self._backward(objectives[chosen], leaf, again=not self.sharded)
        if self.sharded:  # the backward has freed gathered parameters that the graph needs
            again, leaf = self._forward_packed()
            objectives = [self._objective(part, i) for i, part in enumerate(self.layout.unpack(again))]
        gradient, parameter = self._backward(sum(objectives[1:], objectives[0]), leaf)
        sizes = of_one.float().abs().amax(-1)
        own = torch.zeros_like(sizes, dtype=torch.bool)
        own[self.layout.row_index.split([len(row) - 1 for row in self.rows])[chosen]] = True
        leak = float(sizes[~own].max() / sizes[own].max().clamp(min=torch.finfo(torch.float32).tiny))
        return _Run(output.detach(), gradient.float(), parameter), leak

    def _noise(self, ordinary: _Run) -> dict[str, float] | None:
        """What rounding does: differences of the rows from themselves, every module's output moved within its precision."""
        with _rounding(self.base, self.dtype):
            try:
                return self._differences(self._ordinary(), ordinary)
            except Exception:  # a module whose output may not be touched; the plain tolerance holds
                return None

    def _forward_packed(self) -> tuple[Tensor, Tensor]:
        ids = self.layout.pack(self.rows)
        inputs = packed_inputs(self.layout, ids, row_positions(self.base, self.layout, ids))
        return self._forward(self.layout.labels(self.rows), **inputs)

    def _forward(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[L, V]`` and the embeddings ``[1, L, d]`` that they are differentiated by."""
        leaves: list[Tensor] = []
        hidden: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1].clone()  # ctrl writes into it

        def take(module: nn.Module, args: Any, output: Any) -> None:
            hidden.append(output[0])

        with ExitStack() as hooks:
            hooks.callback(self.embedding.register_forward_hook(cut).remove)
            if (decoder := self.base.get_decoder()) is not None:
                hooks.callback(decoder.register_forward_hook(take).remove)
            shifted = {"shift_labels": labels[None]} if self.takes_labels else {}
            output = self.model(**inputs, **self.settings, **shifted)
        logits, logps = getattr(output, "logits", None), getattr(output, "log_probs", None)
        if logits is None and logps is not None:
            logits = logps.unsqueeze(-1)
        elif logits is None or logits.dim() != 3:  # a reward model, or no head at all
            logits = hidden[0] if hidden else output[0]
        if logits.shape[:2] != inputs["input_ids"].shape or not leaves:
            raise TypeError(f"{type(self.base).__name__} returns nothing that has one place for each token")
        dtypes = self.dtype, logits.dtype, _autocast(self.device)
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        logits = logits[0].float()
        return torch.where(logits.isfinite(), logits, 0.0), leaves[0]  # -inf hides words

    def _objective(self, output: Tensor, row: int) -> Tensor:
        if self.probe is None:
            self.probe = torch.randn(output.shape[-1], generator=self.generator).to(self.device)
        return self.weights[row] @ (output @ self.probe) / output.shape[-1] ** 0.5

    def _backward(self, objective: Tensor, leaf: Tensor, again: bool = False) -> tuple[Tensor, Tensor | None]:
        """Gradients by the embeddings, ``[L, d]``, and by the parameter; nothing is added to any ``grad``.

        ``again`` keeps the graph for another call.
        """
        inputs = [leaf] if self.parameter is None else [leaf, self.parameter]
        gradient, *rest = torch.autograd.grad(objective, inputs, allow_unused=True, retain_graph=again)
        if gradient is None:
            raise RuntimeError("no gradient reaches the embeddings")
        return gradient[0], rest[0].float() if rest and rest[0] is not None else None

    # ------------------------------------------------------------------------------------------------------- the rows

    def _token_ids(self, config: Any) -> list[int]:
        """Ordinary words: placeholders of images and the like mean something to the model."""
        named = [*vars(config).items(), *vars(self.base.config).items()]
        special = {v for k, v in named if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        size = min(config.vocab_size, self.embedding.weight.shape[0]) if not self.sharded else config.vocab_size
        drawn = torch.randperm(size, generator=self.generator)[: 200 + len(special)].tolist()
        return [token for token in drawn if token not in special]

    def _trainable(self) -> nn.Parameter | None:
        embedded = {id(p) for p in self.embedding.parameters()}
        trainable = (p for p in self.base.parameters() if p.requires_grad and id(p) not in embedded)
        return next((p for p in trainable if p.is_floating_point() and p.dim() > 0), None)

    def _uncovered(self) -> str | None:
        if self.window is None or self.window <= _LONGEST_WINDOW:
            return None
        return f"the sliding window of {self.window}, which is longer than these rows"


def _tree(words: list[int], reach: int, generator: torch.Generator) -> list[Tensor]:
    """Five rows: two prompts that begin alike, responses of mixed lengths, two of which begin alike.

    Args:
        words: token ids to take from.
        reach: a sliding window; what the prompts share is longer.
    """
    first = iter(words)  # branches begin with different words, so that they part where they should

    def text(length: int) -> Tensor:
        rest = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        return torch.tensor([next(first), *(words[i] for i in rest)])

    shared = text(reach + 5)
    prompts = torch.cat([shared, text(7)]), torch.cat([shared, text(4)])
    begun = torch.cat([prompts[0], text(4)])
    return [
        torch.cat([begun, text(6)]),
        torch.cat([begun, text(9)]),
        torch.cat([prompts[0], text(5)]),
        torch.cat([prompts[1], text(8)]),
        torch.cat([prompts[1], text(5)]),
    ]


# ------------------------------------------------------------------------------------------------------------- measures


def _by_position(found: Tensor, expected: Tensor) -> Tensor:
    """``[T, d]`` twice -> ``[T]``: the difference at each place over its size, or over a part of the mean one."""
    if found.shape[-1] > 1:
        found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    sizes = expected.norm(dim=-1)
    return (found - expected).norm(dim=-1) / sizes.clamp(min=max(0.1 * float(sizes.mean()), 1e-30))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _autocast(device: torch.device) -> torch.dtype:
    """The dtype of matrix products here."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float64


# ------------------------------------------------------------------------------------------------------ without a trace


@contextmanager
def _untouched(base: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers and random states are what they were."""
    modes = [(module, module.training) for module in base.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in base.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = [device] if device.type == "cuda" else []
    try:
        for module, _ in modes:
            module.training = False  # `eval()` may be overridden with something that merges weights
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer.copy_(content)


@contextmanager
def _rounding(base: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Move the outputs of the innermost modules and of the layers by up to half a unit in the last place."""
    layers = {id(child) for m in base.modules() if isinstance(m, nn.ModuleList) for child in m}
    # Norms, rotary angles and recurrent kernels of transformers compute in float32 in a float64 model too.
    half_unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2

    def move(output: Tensor) -> Tensor:
        return output * (1 + half_unit * (2 * torch.rand_like(output) - 1))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point():
            return move(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].is_floating_point():
            return (move(output[0]), *output[1:])
        return output

    with ExitStack() as hooks:
        for module in base.modules():
            if id(module) in layers or next(module.children(), None) is None:
                hooks.callback(module.register_forward_hook(hook).remove)
        yield
