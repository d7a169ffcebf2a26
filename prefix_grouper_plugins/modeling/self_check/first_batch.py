"""The first real micro-batch of a run, both ways: for model classes that no test has compared.

A few tokens cannot show everything: a capacity of experts, a chunk longer than the rows, a special token that only this
class knows. So before the first optimizer step a trainer forwards its first micro-batch on the ordinary path and packed,
and compares log-probs and gradients. The two graphs never exist together. Under ``torch.no_grad`` log-probs alone are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.self_check.changes import while_checking
from prefix_grouper_plugins.modeling.self_check.isolation import rounding, untouched, without_dropout
from prefix_grouper_plugins.modeling.self_check.measures import (
    difference,
    excess,
    parameter_differences,
    projected,
)
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck

Scoring = Callable[[Any], Tensor]
Backward = Callable[[Tensor], Mapping[str, Tensor]]


def compare_first_batch(
    model: nn.Module,
    ordinary: Scoring,
    packed: Scoring,
    mask: Tensor,
    device: torch.device,
    backward: Backward | None = None,
) -> SelfCheck:
    """Compare log-probs and gradients of one micro-batch on both paths. Leaves gradients, modes and random states.

    Dropout is off meanwhile. Without ``backward``, gradients of sharded parameters, and under reentrant checkpointing, are
    not compared; the result says so. A collective where parameters are sharded: every process runs the same number of
    forwards and backwards, whatever it finds. Combine the result by :func:`.result.on_all_ranks`.

    Args:
        model: as it is trained; under DDP the model inside is run, which waits for no other process.
        ordinary: scores the micro-batch with the model that it is given, ``[B, C]``, on the ordinary path.
        packed: likewise, on the shared path.
        mask: ``[B, C]``, 1 where a token counts.
        device: of the random states.
        backward: runs the backward pass from a scalar and returns the gradients that this process holds, by name; none may
            be left on the model. For callers whose parameters are sharded, by default ``torch.autograd.grad``.
    """
    anatomy = Anatomy(model)
    runs = model.module if isinstance(model, DistributedDataParallel) else model
    start = time.perf_counter()
    with torch.inference_mode(False), untouched(anatomy.base, device), without_dropout():
        result = while_checking(lambda: _compared(anatomy, runs, ordinary, packed, mask != 0, backward))
    return replace(result, seconds=time.perf_counter() - start)


def _compared(
    anatomy: Anatomy, model: Any, ordinary: Scoring, packed: Scoring, mask: Tensor, backward: Backward | None
) -> SelfCheck:
    base = anatomy.base
    result = SelfCheck(type(base).__name__, tokens=int(mask.sum()), row_tokens=int(mask.sum()))
    only_scores = not torch.is_grad_enabled()
    parameters = {n: p for n, p in base.named_parameters() if p.requires_grad}
    if only_scores or (anatomy.is_sharded and backward is None):
        parameters = {}
    signs = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(0)).to(mask.device) * 2.0 - 1

    def run(score: Scoring) -> tuple[Tensor, dict[str, Tensor]]:
        torch.default_generator.manual_seed(0)
        with torch.set_grad_enabled(bool(parameters)):
            logps = score(model)
        found = logps.detach().float()[mask]
        if not parameters:
            return found, {}
        objective = (logps * signs)[mask].sum()
        if backward is not None:
            return found, {n: projected(g) for n, g in backward(objective).items() if g.numel()}
        gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
        return found, {n: projected(g) for n, g in zip(parameters, gradients, strict=True) if g is not None}

    def both() -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:
        expected, own = run(ordinary)
        found, mine = run(packed)
        apart = {"outputs (log-probs)": difference(found, expected)} | parameter_differences(mine, own)
        return apart, expected, own

    try:
        try:
            apart, expected, own = both()
        except RuntimeError as error:
            if "Checkpointing is not compatible" not in str(error):
                raise
            parameters = {}
            apart, expected, own = both()
        missing = None if parameters or only_scores else "gradients"
        outputs = apart["outputs (log-probs)"]
        gradient = max((value for name, value in apart.items() if not name.startswith("outputs")), default=0.0)
        result = replace(result, outputs=outputs, gradient=gradient, not_covered=missing)
        dtype = _coarsest(base.dtype, mask.device)
        # Other processes may have found a difference, and a sharded model needs all of them for another forward.
        if not anatomy.is_sharded and excess(apart, dtype, None) is None:
            return replace(result, passed=True)
        with rounding(base, dtype):
            again, rounded = run(ordinary)
        noise = {"outputs (log-probs)": difference(again, expected)} | parameter_differences(rounded, own)
    except torch.OutOfMemoryError:
        return replace(result, not_covered="memory does not suffice for the first batch on the ordinary path")
    reason = excess(apart, dtype, noise, scans=bool(anatomy.mixers))
    return replace(result, passed=reason is None, reason=None if reason is None else f"on the first batch {reason}")


def _coarsest(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the forward, under autocast too."""
    if torch.is_autocast_enabled(device.type):
        dtype = max(dtype, torch.get_autocast_dtype(device.type), key=lambda kind: torch.finfo(kind).eps)
    return dtype
