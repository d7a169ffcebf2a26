"""Sizes that share more: the largest group that fits, and the settings for TRL and verl under which least is forwarded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens
from prefix_grouper_plugins.plan.estimate import Training
from prefix_grouper_plugins.plan.schedule import (
    Load,
    Prompts,
    Schedule,
    TRLSizes,
    VerlSizes,
    trl_schedule,
    verl_schedule,
)

MOST_ROWS = 4096  # of a group; beyond that the search stops
ROUNDING = 256  # tokens that a budget is rounded up to


class Advice(NamedTuple):
    """Settings by the trainer's own names, and what they give.

    Attributes:
        settings: name and value.
        token_ratio: under them.
        peak_bytes: of a process under them.
        fits: whether that is within the memory that was asked about.
    """

    settings: dict[str, Any]
    token_ratio: float
    peak_bytes: int
    fits: bool


def largest_group(peak_of: Callable[[int], int], memory: int) -> int:
    """The largest group whose ``peak_of`` bytes fit into ``memory``; 0 if not even one row does."""
    low, high = 0, 1
    while high <= MOST_ROWS and peak_of(high) <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_of(middle) <= memory else (low, middle)
    return low


def peaks_of_one_group(prompts: Prompts, lengths: Sequence[int], training: Training) -> dict[str, Callable[[int], int]]:
    """Peak bytes by the size of a group that is one micro-batch, of the longest prompt with the longest responses."""
    number = max(prompts.numbers, key=lambda i: len(prompts.ids[i]))
    row = RowSize(number, len(prompts.ids[number]), max(lengths))

    def stock(group: int) -> int:
        tokens = [row.prompt + row.response] * group
        scored = sum(tokens) if training.full_logits else row.response * group
        return training.peak_bytes([Load(sum(tokens), *prompts.pairs(tokens), scored)])

    def shared(group: int) -> int:
        load = prompts.packed([row] * group)
        return training.peak_bytes([load._replace(scored=load.tokens) if training.full_logits else load])

    return {"stock": stock, "shared": shared}


def in_both(sizes: TRLSizes | VerlSizes, checkpointing: bool) -> tuple[TRLSizes, VerlSizes]:
    """The same optimizer step for TRL and for verl: its groups, or one more where they do not come out even."""
    group, processes = sizes.group, sizes.processes
    if isinstance(sizes, TRLSizes):
        rows = sizes.batch_size * sizes.accumulation * processes
        prompts = math.lcm(-(-rows // group), processes // math.gcd(processes, group))
        return sizes, VerlSizes(group, prompts, group, None, processes)
    own = sizes.mini_batch * group // processes
    rows = math.gcd(own, group)
    return TRLSizes(group, rows, own // rows, own // rows, processes, checkpointing=checkpointing), sizes


def advise_trl(
    prompts: Prompts, lengths: Sequence[int], sizes: TRLSizes, training: Training, memory: int | None
) -> Advice:
    """Another split of the same generation batch into micro-batches, by the memory of stock where none is named.

    Of those that fit, the one that forwards least; of equal ones, that with the fewest micro-batches.
    """
    per_step = sizes.batch_size * sizes.accumulation
    limit = memory or training.peak_bytes(trl_schedule(prompts, lengths, sizes).stock)
    found: list[tuple[bool, float, int, TRLSizes, Schedule]] = []
    for rows in (rows for rows in range(1, per_step + 1) if per_step % rows == 0):
        slices, rest = divmod(sizes.batch_size * sizes.steps_per_generation, rows)
        if rest or not slices:
            continue
        split = dataclasses.replace(sizes, batch_size=rows, accumulation=per_step // rows, steps_per_generation=slices)
        schedule = trl_schedule(prompts, lengths, split)
        peak = training.peak_bytes(schedule.shared)
        found.append((peak > limit, schedule.token_ratio if peak <= limit else peak, -rows, split, schedule))
    too_large, _, _, split, schedule = min(found, key=lambda one: one[:3])
    settings = {
        "num_generations": split.group,
        "per_device_train_batch_size": split.batch_size,
        "gradient_accumulation_steps": split.accumulation,
    }
    if split.steps_per_generation != split.accumulation:
        settings["steps_per_generation"] = split.steps_per_generation
    return Advice(settings, schedule.token_ratio, training.peak_bytes(schedule.shared), not too_large)


def advise_verl(
    prompts: Prompts, lengths: Sequence[int], sizes: VerlSizes, training: Training, memory: int | None
) -> Advice:
    """Dynamic micro-batches with room for the largest group; where that does not fit into ``memory``, as much as fits."""
    rows = prompts.rows(sizes.group, lengths)
    groups = [rows[start : start + sizes.group] for start in range(0, len(rows), sizes.group)]
    wanted = max(map(packed_tokens, groups))
    least = max(row.prompt + row.response for row in rows)
    found = None
    for budget in (wanted, *(least + (wanted - least) * part // 4 for part in (3, 2, 1, 0))):
        budget = -(-max(budget, least) // ROUNDING) * ROUNDING
        dynamic = dataclasses.replace(sizes, micro_batch_size=None, max_token_len=budget)
        schedule = verl_schedule(prompts, lengths, dynamic)
        peak = training.peak_bytes(schedule.shared)
        found = Advice(
            {"actor.use_dynamic_bsz": True, "actor.ppo_max_token_len_per_gpu": budget, "rollout.n": sizes.group},
            schedule.token_ratio,
            peak,
            memory is None or peak <= memory,
        )
        if found.fits:
            break
    assert found is not None
    return found
