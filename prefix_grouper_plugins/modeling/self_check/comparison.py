"""The rows of a model, the two ways to forward them, and what differs."""

from __future__ import annotations

import inspect
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.inputs import packed_inputs, row_positions
from prefix_grouper_plugins.modeling.self_check.isolation import rounding, untouched
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck
from prefix_grouper_plugins.modeling.self_check.rows import tree_of_rows
from prefix_grouper_plugins.modeling.self_check.tolerances import CHAOS, LEAK, TIMES_NOISE, tolerance
from prefix_grouper_plugins.modeling.support.report import without_router_loss

LONGEST_WINDOW = 64  # longer sliding windows are not reached by the rows, so that the self-check stays cheap


class _Run:
    """One pass over all rows, in packed places: outputs ``[T, V]``, embedding gradients ``[T, d]``, one parameter's."""

    def __init__(self, outputs: Tensor, gradient: Tensor, parameter: Tensor | None) -> None:
        self.outputs, self.gradient, self.parameter = outputs, gradient, parameter


class Comparison:
    """The rows of a model and the two ways to forward them."""

    def __init__(self, anatomy: Anatomy, device: torch.device | None) -> None:
        model = anatomy.model
        self.base = base = anatomy.base
        self.sharded = anatomy.is_sharded
        # DDP would wait for a backward through all parameters; the model inside of it is whole.
        self.model = model if self.sharded else base
        self.embedding = base.get_input_embeddings()
        self.device = device or next((self.embedding if not self.sharded else model).parameters()).device
        self.parameter = None if self.sharded else self._trainable()
        self.generator = torch.Generator().manual_seed(0)
        config = base.config.get_text_config(decoder=True)
        self.window = anatomy.largest_window
        reach = self.window if self.window is not None and self.window <= LONGEST_WINDOW else 0
        self.rows = [row.to(self.device) for row in tree_of_rows(self._token_ids(config), reach, self.generator)]
        self.layout = PrefixLayout.from_rows(self.rows).to(self.device)
        self.weights = [torch.randn(len(row) - 1, generator=self.generator).to(self.device) for row in self.rows]
        takes = inspect.signature(base.forward).parameters
        # verl's fused heads demand the first, and return log-probs of the second.
        self.settings = {"return_dict": True} if "return_dict" in takes else {}
        self.settings |= without_router_loss(base)
        self.takes_labels = "shift_labels" in takes
        self.probe: Tensor | None = None
        self.dtype = base.dtype
        self.has_experts = anatomy.has_experts
        self.row_limit = anatomy.row_limit

    def run(self) -> SelfCheck:
        start = time.perf_counter()
        result = SelfCheck(type(self.base).__name__, not_covered=self._uncovered())
        limit = self.row_limit
        if limit is not None and max(len(row) for row in self.rows) >= limit.length:
            return replace(
                result, not_covered=f"its rows are shared below {limit.length} tokens only (rope_type {limit.kind!r})"
            )
        with untouched(self.base, self.device):
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
        if not leak <= LEAK:
            return replace(
                result, reason=f"a row depends on tokens of other rows ({leak:.1e} of its gradient lies there)"
            )
        reason = self._excess(packed, ordinary, None)
        if reason is None:
            return replace(result, passed=True)
        noise = self._noise(ordinary)
        if noise is not None and max(noise.values()) > CHAOS:
            return replace(
                result,
                not_covered=f"rounding in {self.dtype} alone changes what this model computes by {max(noise.values()):.0%}",
            )
        reason = self._excess(packed, ordinary, noise)
        return replace(result, passed=reason is None, reason=reason)

    def _excess(self, found: _Run, expected: _Run, noise: dict[str, float] | None) -> str | None:
        """What differs by more than rounding explains, in words."""
        plain = tolerance(self.dtype)
        for name, difference in self._differences(found, expected).items():
            limit = plain.outputs if name.startswith("outputs") else plain.gradients
            if noise is not None:
                limit += TIMES_NOISE * noise[name]
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
        with rounding(self.base, self.dtype):
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
        if self.window is None or self.window <= LONGEST_WINDOW:
            return None
        return f"the sliding window of {self.window}, which is longer than these rows"


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
