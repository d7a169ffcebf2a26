"""What the self-check found, and where it can be made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from prefix_grouper_plugins.modeling.anatomy import Anatomy

Result = TypeVar("Result", bound="SelfCheck")


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
            return f"{self.model} could not be self-checked: {self.not_covered}"
        said = (
            f"{self.model} passed the self-check in {self.seconds:.2f} s: {self.tokens} packed tokens against rows of "
            f"{self.row_tokens}, outputs differ by {self.outputs:.1e}, gradients by {self.gradient:.1e}"
        )
        return said if self.not_covered is None else f"{said}; not covered: {self.not_covered}"


def on_any_rank(here: bool, device: torch.device) -> bool:
    """Whether ``here`` is true on any process. A collective: every process calls it at the same point."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return here
    flag = torch.tensor([here], dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def on_all_ranks(result: Result, device: torch.device) -> Result:
    """``result``, failed where it has failed on any process. A collective: every process calls it at the same point."""
    if on_any_rank(result.reason is not None, device) and result.reason is None:
        return replace(result, reason="another process found a difference")
    return result


def why_not_yet(anatomy: Anatomy) -> str | None:
    """Why a model cannot be forwarded at this moment."""
    for parameter in anatomy.parameters:
        if parameter.is_meta:
            return "its weights have not been loaded (they are on the meta device)"
        if hasattr(parameter, "ds_id") and parameter.numel() == 0:
            return "DeepSpeed has partitioned its parameters"
    return None
