"""Every change of a model after which results of an earlier forward must not be used is seen, and forwards change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.model_state import ModelState
from tests import tiny

ADAPTER = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)


def build(lora):
    model = enable_prefix_grouper(tiny.model("llama"), self_check=False)
    return get_peft_model(model, ADAPTER) if lora else model


def what_differs(before, model):
    now = ModelState(model)
    return before.what_differs(now) or before.other_weights(now)


def a_weight(model):
    return next(p for n, p in model.named_parameters() if "layers.1.self_attn.q_proj" in n and "lora" not in n)


def one_number_by_data(model):
    """Past the versions that autograd counts, by less than its dtype rounds to in a sum of all."""
    weight = a_weight(model).data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def in_place(model):
    with torch.no_grad():
        a_weight(model).mul_(1.5)


def another_storage(model):
    a_weight(model).data = a_weight(model).data.clone()


def another_parameter(model):
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(a_weight(model).detach().clone())


def a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def a_hook_on_gradients(model):
    model.model.layers[1].mlp.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 1.5,))


def frozen(model):
    a_weight(model).requires_grad_(not a_weight(model).requires_grad)


def evaluated(model):
    model.model.layers[1].train(not model.training)


def adapters_off(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def scaled(model):
    next(m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)).scaling["default"] *= 2.0


def another_adapter(model):
    model.add_adapter("other", copy.deepcopy(ADAPTER))
    model.set_adapter("other")


WEIGHT, CODE, ADAPTERS = "layers.1.self_attn.q_proj", "layers, hooks or code", "other adapters are active"
CHANGES = [
    (one_number_by_data, WEIGHT),
    (in_place, WEIGHT),
    (another_storage, WEIGHT),
    (another_parameter, WEIGHT),
    (a_hook, CODE),
    (a_hook_on_gradients, CODE),
    (frozen, "other parameters require a gradient"),
    (evaluated, "between training and evaluation"),
    (adapters_off, ADAPTERS),
    (merged, ADAPTERS),
    (scaled, ADAPTERS),
    (another_adapter, CODE),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_has_changed_is_named(change, reason):
    model = build(lora=reason == ADAPTERS or change is another_adapter)
    before = ModelState(model)
    assert what_differs(before, model) is None
    change(model)
    assert reason in what_differs(before, model)


@pytest.mark.parametrize("lora", [False, True])
def test_forwards_and_backwards_change_nothing(lora):
    model = build(lora).train()
    rows = tiny.rows({6: [4, 3]})
    layout = PrefixLayout.from_rows(rows)
    model(**packed_inputs(layout, layout.pack(rows)))  # transformers puts hooks on at a first forward
    before = ModelState(model)
    for _ in range(2):
        model(**packed_inputs(layout, layout.pack(rows))).logits.sum().backward()
    model(input_ids=rows[0][None]).logits.sum().backward()
    assert what_differs(before, model) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_dtype_are_compared(dtype):
    model = build(lora=False).to(dtype)
    before = ModelState(model)
    a_weight(model).data[-1, -1] += 1
    assert WEIGHT in what_differs(before, model)


def test_weights_without_values_are_compared_by_identity():
    model = build(lora=False).to("meta")
    before = ModelState(model)
    assert what_differs(before, model) is None
    another_parameter(model)
    assert WEIGHT in what_differs(before, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", ["odd", "transposed", "strided", "not aligned"])
def test_weights_of_every_layout_are_compared(dtype, shape):
    """Bits are read eight bytes at a time where they lie so."""
    model = build(lora=False).to(dtype)
    values = {
        "odd": torch.randn(3, 5, dtype=dtype),
        "transposed": torch.randn(4, 6, dtype=dtype).T,
        "strided": torch.randn(4, 12, dtype=dtype)[:, ::2],
        "not aligned": torch.randn(25, dtype=dtype)[1:].view(4, 6),
    }
    a_weight(model).data = values[shape]
    before = ModelState(model)
    assert what_differs(before, model) is None
    a_weight(model).data[-1, -1] += 1
    assert WEIGHT in what_differs(before, model)


def changes_under_fsdp2(group: dist.ProcessGroup) -> list[str | None]:
    """What differs: where parameters are gathered, after a forward and backward, and after a shard has changed past autograd."""
    model = build(lora=False)
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    rows = tiny.rows({6: [4, 3]})
    layout = PrefixLayout.from_rows(rows)
    model(**packed_inputs(layout, layout.pack(rows))).logits.sum().backward()
    before, found = ModelState(model), []
    with torch.no_grad():
        model(**packed_inputs(layout, layout.pack(rows)))
    assert type(model.lm_head.weight) is torch.nn.Parameter and not hasattr(model.lm_head.weight, "to_local")
    found.append(what_differs(before, model))
    model(**packed_inputs(layout, layout.pack(rows))).logits.sum().backward()
    found.append(what_differs(before, model))
    if dist.get_rank(group) == 0:
        a_weight(model).data.to_local()[0, 0] += 1.0
    found.append(what_differs(before, model))
    return found


@pytest.mark.slow
def test_under_fsdp2_the_shards_are_compared_and_not_what_is_gathered_of_them(processes):
    here, there = processes.run(2, changes_under_fsdp2)
    assert here[:2] == there[:2] == [None, None]
    assert WEIGHT in here[2] and there[2] is None
