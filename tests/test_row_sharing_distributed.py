"""`share_rows` under DDP and FSDP: the gradients are those of ordinary forwards, also where only one process has rows to share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins import share_rows
from tests import tiny

pytestmark = pytest.mark.slow  # processes take their time to start

SHARED = torch.stack([torch.cat([torch.arange(3, 15), torch.tensor([3 + i, 9])]) for i in range(3)])
APART = torch.arange(3, 17).repeat(3, 1) + torch.arange(3)[:, None]


def wrapped(kind: str, group: dist.ProcessGroup) -> Any:
    model = tiny.model("qwen3", num_hidden_layers=2)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if kind == "ddp":
        return DistributedDataParallel(model, process_group=group)
    if kind == "fsdp1":
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(layers[0])})
        return FullyShardedDataParallel(model, group, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def norm_of_gradients(model: Any, ids: Tensor) -> tuple[float, Tensor]:
    """Of a step on this process's rows, and the logits."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    (logits.log_softmax(-1).sum() / 100).backward()
    squares = torch.stack(
        [
            (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).square().sum()
            for p in model.parameters()
        ]
    ).sum()
    model.zero_grad()
    return float(squares), logits.detach()


def compare(group: dist.ProcessGroup, kind: str) -> tuple[float, float, int, dict[str, int]]:
    """Difference of logits, relative difference of the gradients, and what was counted on this process."""
    ids = SHARED if dist.get_rank(group) == 0 else APART
    model = wrapped(kind, group)
    expected, logits = norm_of_gradients(model, ids)
    with share_rows(model) as sharing:
        found, got = norm_of_gradients(model, ids)
    difference = float((got - logits).abs().max())
    return difference, abs(found - expected) / expected, sharing.meter.packed, dict(sharing.meter.fallbacks)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_each_process_shares_what_its_rows_have_in_common(processes, kind):
    for rank, (difference, apart, packed, fallbacks) in enumerate(processes.run(2, compare, kind)):
        assert difference < 1e-4
        assert apart < 1e-4
        assert (packed, fallbacks) == (1 if rank == 0 else 0, {})
