"""A model whose parameters are sharded over processes gives the numbers of the whole one: the layout reaches its layers.

FSDP walks through the arguments of a forward, to move and cast them, and puts classes of its own on modules.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins import PrefixLayout, UnsupportedModelError, enable_prefix_grouper, self_check
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.sharing import SharingGate
from tests import tiny
from tests.logs import messages
from tests.modeling import families

pytestmark = pytest.mark.slow  # processes take their time to start

LAYOUT_ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(LAYOUT_ROWS)
# stablelm carries the layout by its mask alone; the last three hold mixers that run on whole rows.
MODELS = ["qwen3", "stablelm", "falcon", "qwen3_5_text", "mamba"]


def whole_and_to_shard(model_type: str, checkpointing: bool = False) -> tuple[Any, Any]:
    """The same model twice; the self-check runs on the one that will be sharded."""
    models = families.build(model_type).float(), families.build(model_type).float()
    if checkpointing:
        for model in models:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
    return enable_prefix_grouper(models[0], self_check=False), enable_prefix_grouper(models[1])


def forward_and_backward(model: nn.Module) -> Tensor:
    logits = model(**packed_inputs(LAYOUT, LAYOUT.pack(LAYOUT_ROWS))).logits
    (logits.log_softmax(-1).sum() / 100).backward()
    return logits.detach()


def by_fsdp2(group: dist.ProcessGroup, model_type: str, checkpointing: bool) -> tuple[float, float]:
    """Largest difference of a logit, and of a gradient tensor relative to its norm."""
    whole, sharded = whole_and_to_shard(model_type, checkpointing)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in [m for m in sharded.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    difference = (forward_and_backward(sharded) - forward_and_backward(whole)).abs().max()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    return float(difference), max(float((found[n] - g).norm() / g.norm().clamp(min=1e-4)) for n, g in wanted.items())


def by_fsdp1(group: dist.ProcessGroup, model_type: str) -> tuple[float, float]:
    """Largest difference of a logit, and the relative difference of the norm of all gradients."""
    whole, sharded = whole_and_to_shard(model_type)
    layers = {type(m) for m in sharded.modules() if isinstance(m, GradientCheckpointingLayer)}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
    wrapped = FullyShardedDataParallel(sharded, group, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    difference = (forward_and_backward(wrapped) - forward_and_backward(whole)).abs().max()
    wanted = nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    return float(difference), float((wrapped.clip_grad_norm_(1e9) - wanted).abs() / wanted)


def self_checks(group: dist.ProcessGroup, model_type: str, version: int) -> list[tuple[bool, float, bool]]:
    """Of a right model and of one whose positions are wrong: passed, gradient difference, no gradient left."""
    found = []
    for fault in (False, True):
        model = enable_prefix_grouper(families.build(model_type).float().train(), self_check="later")
        if fault:
            own = model.model.rotary_emb.forward
            model.model.rotary_emb.forward = lambda x, position_ids, own=own: own(x, torch.arange(x.shape[1])[None])
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if version == 2:
            mesh = DeviceMesh.from_group(group, "cpu")
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        else:
            policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(x) for x in layers})
            wrapped = FullyShardedDataParallel(model, group, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        result = self_check(wrapped)
        clean = all(p.grad is None for p in wrapped.parameters())
        if fault:  # what has failed is refused from then on
            with pytest.raises(UnsupportedModelError, match="are not its rows"):
                forward_and_backward(wrapped)
        else:  # nothing is in the way of what follows
            forward_and_backward(wrapped)
        found.append((result.passed, result.gradient, clean))
    return found


@pytest.mark.parametrize(("model_type", "version"), [("qwen3", 1), ("qwen3", 2)])
def test_a_sharded_model_is_checked_by_all_processes_together(processes, model_type, version):
    for (right, difference, clean), (wrong, _, _) in processes.run(2, self_checks, model_type, version):
        assert right and not wrong and clean
        assert 0 < difference < 1e-5


def changed_after_sharding(group: dist.ProcessGroup, changes: list[bool], alone: bool) -> tuple[str, list[str]]:
    """What is said to a hook on a layer that FSDP2 has made its own, on those processes that have it: as an error, and in the log."""
    gate = SharingGate()
    model = families.build("qwen3").float()
    gate.enable([model])
    gate.self_check(model, alone=True)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu"))
    gate.check_changes(model, alone=alone)
    if changes[group.rank()]:
        model.model.layers[0].register_forward_hook(leak)
    with messages() as said:
        try:
            gate.check_changes(model, alone=alone)
        except UnsupportedModelError as error:
            return str(error), said
    return "", said


def leak(module: nn.Module, args: Any, output: Any) -> Any:
    return output + 0.5 * F.pad(output, (0, 0, 1, 0))[..., :-1, :]


@pytest.mark.parametrize("changes", [[False] * 4, [True] * 4, [False, True, False, False]])
def test_a_hook_on_a_layer_that_is_sharded_is_checked_by_all_processes_together(processes, changes):
    for error, _ in processes.run(4, changed_after_sharding, changes, False):
        assert ("Qwen3ForCausalLM has changed since it was checked" in error) == any(changes)
        assert ("changed on some processes only" in error or "depends on tokens of other rows" in error) == any(changes)


def test_where_a_process_is_by_itself_it_says_that_a_sharded_model_is_not_checked_again(processes):
    for error, said in processes.run(4, changed_after_sharding, [True] * 4, True):
        assert not error
        assert len(said) == 1 and "call self_check(model) on every process" in said[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_under_fsdp2_logits_and_gradients_are_those_of_the_whole_model(processes, model_type, checkpointing):
    for logits, gradients in processes.run(2, by_fsdp2, model_type, checkpointing):
        assert logits < 1e-6 and gradients < 1e-5


@pytest.mark.parametrize("model_type", MODELS)
def test_under_fsdp1_logits_and_gradients_are_those_of_the_whole_model(processes, model_type):
    for logits, gradients in processes.run(2, by_fsdp1, model_type):
        assert logits < 1e-6 and gradients < 1e-5
