"""Top-k distillation of rows that share: verl's loss gets the student's logits at each row's own positions.

The teacher's top-k tokens are given for each token of each row, and verl compares them with the logits before anything else
sees them. So the logits of a packed row, computed once, are spread over the rows, and verl's code runs on what an ordinary
forward would have given it. That takes the memory of the ordinary logits; decoder and head are shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu

from prefix_grouper_plugins.integrations.verl.micro_batch import PackedMicroBatch


def uses_topk(data: TensorDict) -> bool:
    return bool(tu.get_non_tensor_data(data, "distillation_use_topk", False))


def why_not_topk(data: TensorDict, *, ulysses: bool) -> str | None:
    """Why rows whose loss reads logits take verl's own path; None if they are shared, or no loss reads logits."""
    if not uses_topk(data):
        return None
    if ulysses:
        return "top-k distillation reads logits, of which Ulysses leaves each rank a piece"
    if tu.get_non_tensor_data(data, "use_fused_kernels", False):
        return "top-k distillation reads logits, which fused kernels do not keep"
    return None


def topk_outputs(
    logits: Tensor, packed: PackedMicroBatch, micro_batch: TensorDict, loss: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What verl's logits processor computes for each token of the rows, by name: nested ``[rows, L_i]``.

    Args:
        logits: ``[1, T, V]`` of the packed row, and of any padding behind it, before the temperature.
        packed: the packed row.
        micro_batch: the rows, with the teacher's tokens.
        loss: verl's loss function, which is its logits processor too.
    """
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    rows = packed.unpack("logits", logits[0, : packed.num_tokens])
    if micro_batch["temperature"] != 1:
        rows = rows / max(micro_batch["temperature"], 1e-8)
    outputs = loss(student_logits=rows.values()[None], data=micro_batch)
    offsets = micro_batch["input_ids"].offsets()
    return {name: torch.nested.nested_tensor_from_jagged(of_tokens[0], offsets) for name, of_tokens in outputs.items()}
