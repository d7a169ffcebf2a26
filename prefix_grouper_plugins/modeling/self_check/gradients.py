"""Compare a packed step with an ordinary one, gradients included.

An ordinary and a packed step add the same numbers in another order, so their gradients differ by rounding alone. The
measure is the L2 norm of the difference of all gradients over the norm of the ordinary ones.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.self_check.tolerances import tolerance


def local_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that this process holds, its shards where the model is sharded, by parameter name."""
    return {name: gradient.clone() for name, gradient in _gradients(model).items()}


def gradient_difference(model: nn.Module, ordinary: dict[str, Tensor]) -> float:
    """L2 norm of (gradients of ``model`` - ``ordinary``) over that of ``ordinary``, over all processes.

    Args:
        model: with the gradients of the packed step.
        ordinary: what :func:`local_gradients` gave after the ordinary step.

    Raises:
        ValueError: other parameters have gradients than before, on this process or another.
    """
    packed = _gradients(model)
    unmatched = sorted(packed.keys() ^ ordinary.keys())
    device = next(iter(packed.values())).device if packed else torch.device("cpu")
    sums = torch.zeros(3, dtype=torch.float32, device=device)  # squares of the difference and of the size; unmatched
    for name in packed.keys() & ordinary.keys():
        sums[0] += (packed[name] - ordinary[name]).float().square().sum()
        sums[1] += ordinary[name].float().square().sum()
    sums[2] = len(unmatched)
    if dist.is_initialized():  # before anything is raised: all processes must hear of it
        dist.all_reduce(sums)
    if sums[2]:
        where = f"{unmatched[0]} for one" if unmatched else "on another process"
        raise ValueError(f"{int(sums[2])} parameters have a gradient in one of the two steps only, {where}")
    difference, size = sums[:2].sqrt().tolist()
    if not size:
        return math.inf if difference else 0.0
    return float(difference / size)


def check_gradients(model: nn.Module, ordinary: dict[str, Tensor], dtype: torch.dtype) -> float:
    """:func:`gradient_difference`, refused where rounding in ``dtype`` does not explain it.

    Raises:
        RuntimeError: the packed step computed something else.
    """
    difference = gradient_difference(model, ordinary)
    limit = tolerance(dtype).update
    if not difference <= limit:  # catches NaN as well
        raise RuntimeError(
            f"the gradients of the shared step differ from the ordinary ones by {difference:.1e}, rounding in {dtype} "
            f"explains {limit:.0e}. A mixture of experts in half precision may differ by more, as rounding sends "
            "tokens to other experts: verify it in float32. Else please report this with the model's config, and turn "
            "sharing off to train"
        )
    return difference


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: _local(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that FSDP2 shards."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[no-any-return, operator]
