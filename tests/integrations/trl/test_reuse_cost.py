"""What reuse costs a micro-batch besides its forward: reads of the device, and planning."""

from __future__ import annotations

import cProfile
import pstats
from types import SimpleNamespace

import pytest
import torch

import prefix_grouper_plugins.integrations.trl.reuse as reuse_module
from prefix_grouper_plugins.batch import blocks_on_host
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse, blocks_of
from tests import tiny
from tests.integrations.trl.stub_trainer import enabled_model, one_group, stub_trainer


def run_step(trainer, reuse, micro_batches):
    """Each micro-batch scored as TRL's loss does it, with its backward."""
    for number, batch in enumerate(micro_batches):
        trainer.accelerator.sync_gradients = number == len(micro_batches) - 1
        reuse.enter(micro_batches, number)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        rows = Rows(ids, mask, batch["completion_ids"].shape[1], RowsOfImages({}, len(ids)))
        (logps, _, _), _ = reuse.score_update(trainer.model, rows, entropy=False)
        logps.sum().backward()
        reuse.leave()


@pytest.mark.parametrize(
    ("rows", "completion", "expected"), [(1, 12, 8), (2, 4, 4)], ids=["an open prompt", "rows ahead"]
)
def test_each_micro_batch_is_read_from_the_device_once(rows, completion, expected):
    """Beside the rows of a generation batch, all at once: the loss may score other rows, so those of a call are compared."""
    from host_time import OnDevice, on_marked_tensors

    model = enabled_model()
    micro_batches = one_group(12, completion, rows, tensor=lambda x: x.as_subclass(OnDevice))
    trainer = stub_trainer(model, len(micro_batches), 8)
    reuse = PromptReuse(trainer, PackedForward(trainer))
    with on_marked_tensors() as copies:
        run_step(trainer, reuse, micro_batches)
    assert len(copies) == 1 + expected
    reads = [
        line for line in OnDevice.waits if not line.startswith("to ")
    ]  # transformers moves tensors to their device
    assert not reads
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_planning_a_step_of_eight_micro_batches_is_little_work(monkeypatch):
    """Calls of functions, 4,020 of them, for a model with as many decoder layers as one of 36 has: about a millisecond.

    Whether the model has changed since the forward is asked for each micro-batch, which is no part of the plan.
    """
    monkeypatch.setattr(reuse_module, "ModelState", lambda model: None)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", True)  # older releases of TRL have a limit of logits, too
    model = enabled_model()
    trainer = stub_trainer(model, 8, 8)
    anatomy = trainer.gate.anatomies[0]
    anatomy.checkpointable *= 36 // tiny.SIZES["num_hidden_layers"]
    micro_batches = one_group(1000, 64, 1)
    blocks = [Rows.of_blocks(blocks_of(batch), blocks_on_host(*blocks_of(batch))) for batch in micro_batches]
    reuse = PromptReuse(trainer, None)

    def score(model, rows, tokens, shared, prompts, entropy):
        for key in shared:
            prompts.keep(key, SimpleNamespace(is_closed=True, num_tokens=999, is_recomputed=False))
        return (torch.zeros(len(rows), 64), None, None), []

    reuse._score = score
    with cProfile.Profile() as profile:
        for number, rows in enumerate(blocks):
            reuse.enter(micro_batches, number)
            reuse.score_update(model, rows, entropy=False)
            reuse.leave()
    assert pstats.Stats(profile).total_calls < 4300


# --------------------------------------------------------------------------------------------- scaled gradients, DeepSpeed
