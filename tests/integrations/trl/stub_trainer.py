"""A trainer as far as PromptReuse asks it, its model and its micro-batches, for tests of one optimizer step without TRL's."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch
import trl.trainer.utils as trl_utils
from accelerate.utils import DistributedType, DynamoBackend

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.integrations.trl.windows import StepWindows
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from tests import tiny


def stub_trainer(model, micro_batches, group):
    """What PromptReuse asks of a trainer, for one process and one optimizer step."""
    args = SimpleNamespace(gradient_accumulation_steps=micro_batches, steps_per_generation=micro_batches)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO,
        num_processes=1,
        sync_gradients=False,
        autocast=contextlib.nullcontext,
        unwrap_model=lambda model: model,
        device=torch.device("cpu"),
        gradient_state=SimpleNamespace(plugin_kwargs={}),
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.NO)),
    )
    trainer = SimpleNamespace(
        model=model,
        args=args,
        accelerator=accelerator,
        num_generations=group,
        temperature=1.0,
        min_level=None,
        gate=SimpleNamespace(anatomies=[Anatomy(model)]),
        verification=SimpleNamespace(leaks=False),
        loss_is_sum_over_rows=True,
        _option={"prefix_grouper_regroup": "exact", "prefix_grouper_max_tokens": "auto"}.get,
    )
    trainer.step_windows = StepWindows(trainer)
    return trainer


def one_group(prompt, completion, rows, group=8, tensor=lambda x: x):
    """The micro-batches of a generation batch."""
    ids = torch.randint(3, 20, (group, prompt + completion), generator=torch.Generator().manual_seed(0))
    ids[:, :prompt] = ids[0, :prompt]
    blocks = {"prompt_ids": ids[:, :prompt], "completion_ids": ids[:, prompt:]}
    blocks |= {name.replace("ids", "mask"): torch.ones_like(block) for name, block in blocks.items()}
    parts = range(0, group, rows)
    return [{name: tensor(block[start : start + rows].clone()) for name, block in blocks.items()} for start in parts]


def enabled_model():
    model = tiny.model("qwen3").float().train()
    if hasattr(trl_utils, "add_fused_lm_head"):
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return enable_prefix_grouper(model, self_check=False)
