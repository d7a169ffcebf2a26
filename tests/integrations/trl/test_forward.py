"""One chunk of rows as one packed row, where the processes of a sharded model have to keep in step."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages
from tests import tiny


def gradient_of(model: Any, masked: bool) -> float:
    """Of four rows with one prompt, all of whose completions are masked or none; the norm of this process's gradient."""
    accelerator = SimpleNamespace(unwrap_model=lambda m: getattr(m, "module", m), autocast=contextlib.nullcontext)
    ids = torch.full((4, 9), 7)
    ids[:, 5:] = torch.randint(3, 20, (4, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 5:] = int(not masked)
    verification = SimpleNamespace(leaks=False)
    trainer = SimpleNamespace(accelerator=accelerator, temperature=1.0, min_level=None, verification=verification)
    forward = PackedForward(trainer)
    scores, counts = forward.score(model, Rows(ids, mask, 4, RowsOfImages({}, 4)), entropy=True, aux_loss=False)
    assert counts.tokens_forwarded == (1 if masked else 4 + 4 * 4)
    scores[0].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.numel()]
    assert all(gradient is not None for gradient in gradients)
    return sum(float(getattr(g, "_local_tensor", g).norm()) for g in gradients)


def step(group: Any, version: int) -> tuple[float, float]:
    """Rank 1 has nothing to score and then something; FSDP gathers and scatters in each layer, on both ranks."""
    model = tiny.model("qwen3").float().train()
    if hasattr(trl_utils, "add_fused_lm_head"):
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    enable_prefix_grouper(model, self_check=False)
    if version == 2:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(model, group, device_id=torch.device("cpu"), use_orig_params=True)
    rank = torch.distributed.get_rank(group)
    both_masked = gradient_of(model, masked=True)
    model.zero_grad()
    return both_masked, gradient_of(model, masked=rank == 1)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_under_fsdp_a_process_with_nothing_to_score_keeps_in_step_and_adds_zero(processes, version):
    (nothing, first), (also_nothing, second) = processes.run(2, step, version)
    assert nothing == also_nothing == 0
    assert first > 0 and second > 0, "rank 1 holds its shard of the gradient of rank 0"
