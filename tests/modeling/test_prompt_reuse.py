"""Prompts that stay open between micro-batches: each gets its gradient, and under FSDP2 all processes keep in step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.prompt_reuse import MatchedForwards, OpenPrompts, matched_ends
from prefix_grouper_plugins.modeling.reuse_conditions import why_not_reuse
from tests import tiny
from tests.modeling import families

# --------------------------------------------------------------------------------------------------------- bookkeeping


class Cache:
    def __init__(self) -> None:
        self.is_closed = False


def test_a_prompt_stays_open_until_its_last_micro_batch_and_closes_with_its_gradient():
    prompts, cache = OpenPrompts(), Cache()
    prompts.expect(["a", None, "a", "c"])
    assert prompts.of(["a", "b", None, "a"]) == ["a"]
    assert prompts.cache("a") is None and not prompts.is_last("a")
    prompts.keep("a", cache)
    prompts.leave(step_ends=False, remedy="")
    prompts.expect(["c"])
    assert prompts.of(["a"]) == ["a"]
    assert prompts.cache("a") is cache and prompts.is_last("a")
    prompts.keep("a", cache)
    cache.is_closed = True
    prompts.leave(step_ends=True, remedy="")
    assert prompts.of(["a"]) == []


@pytest.mark.parametrize("later", [[], ["a"]], ids=["no backward reached it", "its last micro-batch never came"])
def test_a_step_without_the_gradient_of_a_prompt_is_an_error(later):
    prompts = OpenPrompts()
    prompts.expect(later)
    prompts.keep("a", Cache())
    with pytest.raises(RuntimeError, match=r"1 forward\(s\) .* have not got their gradient.* Do this"):
        prompts.leave(step_ends=True, remedy="Do this")
    prompts.leave(step_ends=True, remedy="")  # and it is not told again


def test_processes_match_prompts_that_begin_and_end_in_the_same_micro_batches():
    assert matched_ends([[3, -1, -1, -1], [1, -1, 3, -1]]) == [{1, 3}, set(), {3}, set()]


# ---------------------------------------------------------------------------------------------------------- under FSDP2

# Rank 0 has one group of four rows, rank 1 two of two, and then a row without a group: in micro-batches of one row.
GROUPS = [[tiny.rows({9: [4, 7, 1, 3]}), tiny.rows({5: [3]})], [tiny.rows({6: [2, 5], 4: [6, 3], 7: [2]})]]
RUNS = [{0: (9, 3)}, {0: (6, 1), 2: (4, 3)}]  # where a prompt of how many tokens begins, and where it ends
WEIGHTS = torch.linspace(-1.0, 1.0, 7)


def rows_of(rank: int) -> list[torch.Tensor]:
    return [row for group in GROUPS[rank] for row in group]


def build(checkpointing: bool) -> Any:
    model = families.build("qwen3").float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return enable_prefix_grouper(model, self_check=False)


def shard(model: Any, group: dist.ProcessGroup, **options: Any) -> Any:
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] + [model.lm_head]:
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(logits: torch.Tensor, row: torch.Tensor, prompt: int) -> torch.Tensor:
    logps = logits.log_softmax(-1).gather(-1, row[prompt:, None])[:, 0]
    return (logps * WEIGHTS[: len(logps)]).sum()


def prompt_lengths(rank: int) -> list[int]:
    return [[9] * 4 + [5], [6, 6, 4, 4, 7]][rank]


def reuse(model: Any, rank: int, ranks: list[int], attaches: bool) -> None:
    """One optimizer step of micro-batches of one row, where the processes have the rows of ``ranks``."""
    ends = matched_ends([[RUNS[of].get(i, (0, -1))[1] for i in range(5)] for of in ranks])
    matched = MatchedForwards(model, ends, torch.device("cpu"))
    cache = None
    for number, (row, prompt) in enumerate(zip(rows_of(rank), prompt_lengths(rank), strict=True)):
        model.set_requires_gradient_sync(number == 4)
        begins = RUNS[rank].get(number)

        def run(row=row, prompt=prompt) -> PromptCache:
            new = PromptCache()
            new.run(model, PrefixLayout.from_groups([prompt - 1], [[1]]), row[: prompt - 1])
            return new

        own, added = matched.forward(number, [(begins[1], run)] if begins else [])
        assert added == len(ends[number]) - (begins is not None)
        if own:
            (cache,), end = own, begins[1]
        layout = PrefixLayout.from_rows([row])
        if number < 4:
            layout = layout.given(prompt - 1)
            cache.prepare(layout, last=number == end)
        logits = model(**packed_inputs(layout, row[layout.num_given : -1])).logits[0]
        if attaches:
            (logits,) = matched.attach(number, [logits], synchronizes=number == 4)
        loss_of(logits if number < 4 else logits[prompt - 1 :], row, prompt).backward()
        if number == end:
            assert cache.is_closed
    model.set_requires_gradient_sync(True)


def by_fsdp2(group: dist.ProcessGroup, checkpointing: bool, options: dict[str, Any]) -> tuple[float, list[str]]:
    """Largest difference of a gradient tensor relative to its norm, and the collectives of this process."""
    rank, whole, sharded = dist.get_rank(group), build(checkpointing), shard(build(checkpointing), group, **options)
    for of in range(2):
        for row, prompt in zip(rows_of(of), prompt_lengths(of), strict=True):
            (
                loss_of(whole(input_ids=row[None], use_cache=False).logits[0, prompt - 1 : -1], row, prompt) / 2
            ).backward()
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("foreach_all_gather", "foreach_reduce"):
            own = getattr(param_group, name)
            patch.setattr(param_group, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1])
        reuse(sharded, rank, [0, 1], attaches=True)
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters()}
    return max(float((found[name] - g).norm() / g.norm()) for name, g in wanted.items()), calls


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=["", "parameters stay"])
def test_under_fsdp2_processes_with_other_groups_keep_in_step(processes, checkpointing, options):
    (first, calls), (second, others) = processes.run(2, by_fsdp2, checkpointing, options)
    assert first < 1e-5 and second < 1e-5
    assert calls == others
    layers = 3
    # Each layer once, the head and what the root holds: gradients are reduced as often as without reuse.
    assert calls.count("foreach_reduce") == layers + 2


def without_attaching(group: dist.ProcessGroup) -> str:
    with pytest.raises(RuntimeError) as caught:
        reuse(shard(build(False), group), 0, [0, 0], attaches=False)
    return str(caught.value)


@pytest.mark.slow
def test_under_fsdp2_the_backward_of_a_prompt_that_is_not_attached_finds_no_parameters(processes):
    assert ["storage of size 0" in message for message in processes.run(2, without_attaching)] == [True, True]


def wrapped_in_fsdp1(group: dist.ProcessGroup) -> str | None:
    return why_not_reuse(FullyShardedDataParallel(build(False), group, device_id=torch.device("cpu")))


@pytest.mark.slow
def test_under_fsdp1_prompts_are_not_reused_and_the_reason_names_fsdp2(processes):
    assert ["use FSDP2" in reason for reason in processes.run(2, wrapped_in_fsdp1)] == [True, True]
