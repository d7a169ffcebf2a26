"""A real micro-batch on the ordinary path and on the shared one, with the same weights and the same random numbers.

The paths run one after the other, so that their graphs never exist together, and large gradients are kept as projections.
Where they differ, they run once more without gradients, to find the decoder layer in which that starts (:mod:`.layers`).
Dropout is off. Afterwards gradients, modes, buffers and random states are as before. It is what the first batch of an unknown
class goes through (:mod:`.first_batch`), and what a trainer's option ``verify`` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.self_check.changes import while_checking
from prefix_grouper_plugins.modeling.self_check.isolation import rounding, untouched, without_dropout
from prefix_grouper_plugins.modeling.self_check.layers import where_gradients_part, where_paths_part
from prefix_grouper_plugins.modeling.self_check.measures import (
    ALL_GRADIENTS,
    difference,
    exceeding,
    in_words,
    parameter_differences,
    parameter_of,
    projected,
    total_difference,
)
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck, on_any_rank
from prefix_grouper_plugins.modeling.self_check.tolerances import coarsest_dtype

_NO_MEMORY = "there is not enough memory for this micro-batch on the ordinary path"
_LOG_PROBS, _LOSS = "outputs (log-probs)", "outputs (loss)"


@dataclass(frozen=True)
class Scored:
    """What one path makes of a micro-batch.

    Attributes:
        log_probs: of each call that scored rows, ``[B, C]``, with their graph.
        masks: likewise, 1 where a token counts.
        loss: ``[]``, whose gradients are compared.
    """

    log_probs: Sequence[Tensor]
    masks: Sequence[Tensor]
    loss: Tensor


Path = Callable[[Any], Scored]
Backward = Callable[[Tensor], Mapping[str, Tensor]]


class Apart(NamedTuple):
    """How far a path is from the ordinary one.

    Attributes:
        log_probs: L2 norm of the difference over that of the ordinary ones.
        loss: difference over the larger of the loss and of what the log-probs contribute to it. A loss near zero is usual.
        gradients: L2 norm of the difference of all gradients over that of the ordinary ones.
    """

    log_probs: float = 0.0
    loss: float = 0.0
    gradients: float = 0.0


@dataclass(frozen=True)
class Compared(SelfCheck):
    """What the comparison of a micro-batch found.

    Attributes:
        apart: the largest differences of a shared path.
        leak: the differences that a leak of one key makes; None where there was none to make.
        has_gradients: whether the gradients of the loss are not all zero; False where they were not compared.
        paths: names of the shared paths.
    """

    apart: Apart = field(default_factory=Apart)
    leak: Apart | None = None
    has_gradients: bool = False
    paths: tuple[str, ...] = ()

    def in_words(self) -> str:
        """Both paths' differences, and those that one leaked key would have made."""
        graded = self.not_covered is None
        shared = f"shared ({', '.join(self.paths)})" if len(self.paths) > 1 else "shared"
        said = (
            f"{shared} and ordinary log-probs differ by {self.apart.log_probs:.1e}, the loss by {self.apart.loss:.1e}"
        )
        said += f", gradients by {self.apart.gradients:.1e}" if graded else f" (not covered: {self.not_covered})"
        if graded and not self.has_gradients:
            said += " (all are zero, as every advantage is)"
        if self.leak is None:
            return f"{said}; no two rows are side by side, so no key could be leaked to see what an error would do"
        said += f"; a leak of one key would have shown as {self.leak.log_probs:.1e} in log-probs"
        return f"{said} and {self.leak.gradients:.1e} in gradients" if graded else said

    def over_ranks(self, device: torch.device) -> Compared:
        """Differences are the largest, and those of the leak the smallest, of all processes that have any. A collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        largest = torch.tensor([*self.apart, float(self.has_gradients)], dtype=torch.float64, device=device)
        smallest = torch.tensor(self.leak or (torch.inf,) * 3, dtype=torch.float64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        *apart, has_gradients = largest.tolist()
        leak = Apart(*smallest.tolist()) if bool(smallest.isfinite().all()) else None
        return replace(self, apart=Apart(*apart), leak=leak, has_gradients=bool(has_gradients))


@dataclass
class _Pass:
    log_probs: Tensor  # [N]
    loss: float
    size_of_loss: float
    gradients: dict[str, Tensor]


def compare_micro_batch(
    model: nn.Module,
    ordinary: Path,
    shared: Mapping[str, Path],
    device: torch.device,
    *,
    leaking: Path | None = None,
    backward: Backward | None = None,
    scale: float = 1.0,
) -> Compared:
    """Compare log-probs, loss and gradients of one micro-batch on its ordinary and shared paths. Leaves no trace.

    Under ``torch.no_grad``, without ``backward`` for sharded parameters, and under reentrant checkpointing, gradients are not
    compared; the result says so. A collective: every process calls it at the same point, and runs the same number of forwards
    and backwards, whatever it finds. Combine the result by :func:`.result.on_all_ranks`.

    Args:
        model: as it is trained; under DDP the model inside is run, which waits for no other process.
        ordinary: scores the micro-batch with the model that it is given, on the ordinary path.
        shared: likewise, on each shared path, by name.
        device: of the random states.
        leaking: likewise, on a shared path with an error. It is not judged: its differences show what would be noticed.
        backward: runs the backward pass from a scalar and returns the gradients that this process holds, by name; none may
            be left on the model. For callers whose parameters are sharded, by default ``torch.autograd.grad``.
        scale: by which the loss is multiplied before its backward, as in float16.
    """
    anatomy = Anatomy(model)
    runs = model.module if isinstance(model, DistributedDataParallel) else model
    paths = _Paths(anatomy, runs, backward, scale)
    start = time.perf_counter()
    with torch.inference_mode(False), untouched(anatomy.base, device), without_dropout():
        result = while_checking(lambda: paths.compare(ordinary, shared, leaking, device))
    return replace(result, seconds=time.perf_counter() - start)  # type: ignore[no-any-return]


class _Paths:
    """Runs one micro-batch on several paths and measures how far they are apart."""

    def __init__(self, anatomy: Anatomy, model: Any, backward: Backward | None, scale: float) -> None:
        self._anatomy, self._model, self._backward, self._scale = anatomy, model, backward, scale
        self._only_scores = not torch.is_grad_enabled()
        named = anatomy.base.named_parameters()
        self._parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        if self._only_scores or (anatomy.is_sharded and backward is None):
            self._parameters = {}

    def compare(
        self, ordinary: Path, shared: Mapping[str, Path], leaking: Path | None, device: torch.device
    ) -> Compared:
        base = self._anatomy.base
        dtype, scans = coarsest_dtype(base, device), bool(self._anatomy.mixers)
        result, differences = Compared(type(base).__name__, not_covered=_NO_MEMORY), dict[str, dict[str, float]]()
        # What runs in the paths may be collective, so every process runs all of them, and agrees on one more.
        expected = self._run_or_leave_gradients(ordinary)
        found = [one for path in shared.values() if (one := self._run(path)) is not None]
        leak = None if leaking is None else self._run(leaking)
        if expected is not None and len(found) == len(shared):
            result = replace(self._measured(result, expected, found, leak), paths=tuple(shared))
            differences = {name: _differences(one, expected) for name, one in zip(shared, found, strict=True)}
        exceeds = any(exceeding(own, dtype, None, scans=scans) for own in differences.values())
        if not on_any_rank(exceeds or self._anatomy.is_sharded, device):
            return result
        with rounding(base, dtype):
            again = self._run(ordinary)
        over: dict[str, dict[str, tuple[float, float]]] = {}
        if expected is None or again is None:
            result = replace(result, passed=False, not_covered=_NO_MEMORY)
        else:
            noise = _differences(again, expected)
            over = {name: exceeding(own, dtype, noise, scans=scans) for name, own in differences.items()}
        if not on_any_rank(any(over.values()), device):
            return result
        starts = {
            name: self._where_it_starts(ordinary, path, dtype, over.get(name, {})) for name, path in shared.items()
        }
        name = next((name for name, own in over.items() if own), None)
        if name is None:
            return result
        reason = in_words(over[name], dtype) + (f" ({name})" if len(shared) > 1 else "")
        return replace(result, passed=False, reason="; ".join(filter(None, [reason, starts[name]])))

    def _where_it_starts(
        self, ordinary: Path, shared: Path, dtype: torch.dtype, over: Mapping[str, tuple[float, float]]
    ) -> str | None:
        """The layer in which a difference starts, in words; ``over`` are the differences that rounding does not explain."""
        found = where_paths_part(self._anatomy, lambda: ordinary(self._model), lambda: shared(self._model), dtype)
        if found is None or found.layer is not None:
            return None if found is None else str(found)
        names = {name for difference in over if (name := parameter_of(difference)) is not None}
        return "; ".join(filter(None, [str(found), where_gradients_part(self._anatomy, names)]))

    def _measured(self, result: Compared, expected: _Pass, found: Sequence[_Pass], leak: _Pass | None) -> Compared:
        apart = Apart(*map(max, zip(*(_apart(one, expected) for one in found), strict=True)))
        return replace(
            result,
            passed=True,
            tokens=len(expected.log_probs),
            row_tokens=len(expected.log_probs),
            outputs=apart.log_probs,
            gradient=apart.gradients,
            apart=apart,
            leak=None if leak is None else _apart(leak, expected),
            has_gradients=any(bool(gradient.any()) for gradient in expected.gradients.values()),
            not_covered=None if self._parameters or self._only_scores else "gradients",
        )

    def _run_or_leave_gradients(self, path: Path) -> _Pass | None:
        try:
            return self._run(path)
        except RuntimeError as error:
            if "Checkpointing is not compatible" not in str(error):
                raise
            self._parameters = {}
            return self._run(path)

    def _run(self, path: Path) -> _Pass | None:
        """One path; None where memory does not suffice."""
        torch.manual_seed(0)
        try:
            with torch.set_grad_enabled(bool(self._parameters)):
                scored = path(self._model)
            pairs = zip(scored.log_probs, scored.masks, strict=True)
            log_probs = torch.cat([values.detach().float()[mask != 0] for values, mask in pairs])
            loss, size = float(scored.loss.detach()), _size_of_loss(scored)
            return _Pass(log_probs, loss, size, self._gradients(scored.loss) if self._parameters else {})
        except torch.OutOfMemoryError:
            return None

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        if self._backward is not None:
            return {n: projected(g) for n, g in self._backward(loss).items() if g.numel()}
        found = torch.autograd.grad(loss * self._scale, list(self._parameters.values()), allow_unused=True)
        return {n: projected(g) for n, g in zip(self._parameters, found, strict=True) if g is not None}


def _size_of_loss(scored: Scored) -> float:
    """What the loss is a small difference of: to first order a log-prob contributes itself times its derivative."""
    own = abs(float(scored.loss.detach()))
    live = [values for values in scored.log_probs if values.requires_grad]
    if not live or not scored.loss.requires_grad:
        return own
    found = torch.autograd.grad(scored.loss, live, retain_graph=True, allow_unused=True)
    pairs = zip(found, live, strict=True)
    return max(own, *(0.0 if by is None else float(by.norm() * values.detach().norm()) for by, values in pairs))


def _apart(found: _Pass, expected: _Pass) -> Apart:
    return Apart(
        difference(found.log_probs, expected.log_probs) if len(expected.log_probs) else 0.0,
        abs(found.loss - expected.loss) / max(expected.size_of_loss, 1e-30),
        total_difference(found.gradients, expected.gradients),
    )


def _differences(found: _Pass, expected: _Pass) -> dict[str, float]:
    apart = _apart(found, expected)
    named = {_LOG_PROBS: apart.log_probs, _LOSS: apart.loss}
    return named | parameter_differences(found.gradients, expected.gradients) | {ALL_GRADIENTS: apart.gradients}
