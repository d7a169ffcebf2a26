"""Differences between a packed and an ordinary pass that rounding explains. The one table of the self-check."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Tolerance(NamedTuple):
    """Largest relative differences (L2 norms) in one dtype.

    Attributes:
        outputs: logits or hidden states of a few rows.
        gradients: gradients of a random projection of these outputs.
        update: the gradients of a whole optimizer step.
    """

    outputs: float
    gradients: float
    update: float


# By the dtype of the forward. transformers computes norms, rotary angles and routers in float32 even where the model is
# in float64. `update` was measured on dense tiny models of up to 28 layers: 3e-7 in float64 (1e-15 where norms are in
# float64 too), 1e-6 in float32, 4e-2 in bfloat16, 6e-3 in float16. One wrong label in each row gives 7e-2 to 8e-1, a mask
# that hides the prompt 8e-1 and more.
TOLERANCES = {
    torch.float64: Tolerance(outputs=1e-4, gradients=1e-3, update=1e-5),
    torch.float32: Tolerance(outputs=1e-4, gradients=1e-3, update=1e-4),
    torch.bfloat16: Tolerance(outputs=1e-2, gradients=2e-2, update=5e-2),
    torch.float16: Tolerance(outputs=2e-3, gradients=4e-3, update=1e-2),
}
# Gradients of parameters of recurrent layers: up to 6e-3 was seen in tiny models with drawn decays, in float32 and float64
# alike, where their outputs and embedding gradients agree; a state that leaks into another row gives 1e-1 and more.
OF_SCANS = 2e-2
TIMES_NOISE = 4.0  # how much larger than measured rounding a difference may be: the two are samples, not bounds
CHAOS = 0.25  # where rounding alone moves the outputs so far, a comparison says nothing
LEAK = 1e-6  # of the largest gradient; kernels write zeros, not small numbers


def tolerance(dtype: torch.dtype) -> Tolerance:
    """That of ``dtype``; of float16 for dtypes that are not listed (float8)."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.float16])


def coarsest_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype whose rounding a forward of ``model`` has: the coarsest of its parameters', and of autocast's here.

    Adapters count. TRL gives those of a quantised model bfloat16 weights whatever the model's dtype, and PEFT computes them
    in the dtype of their weights.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()} & TOLERANCES.keys()
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
