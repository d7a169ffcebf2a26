"""Micro-batches that keep groups whole, within verl's limits, as many on every data-parallel rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from prefix_grouper_plugins.micro_batches import (
    RowSize,
    cut_groups,
    finish_plan,
    must_split,
    packed_tokens,
    plan_of_rank,
    rows_by_group,
)
from prefix_grouper_plugins.modeling.prompt_reuse import matched_ends

# Names of verl's limits by pass: of tokens (dynamic batches) and of rows.
_OPTIONS = {
    "update": (
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    ),
    "old_log_prob": (
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
    ),
    "ref_log_prob": (
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    ),
    "critic_update": ("critic.ppo_max_token_len_per_gpu", "critic.fsdp.micro_batch_size_per_gpu"),
    "critic_update_v1": ("critic.ppo_infer_max_token_len_per_gpu", "critic.fsdp.micro_batch_size_per_gpu"),
    "values": ("critic.ppo_infer_max_token_len_per_gpu", "critic.fsdp.infer_micro_batch_size_per_gpu"),
}


@dataclass(frozen=True)
class Limits:
    """What a micro-batch may hold.

    Attributes:
        option: verl's name for the limit.
        max_tokens: of a micro-batch, in which each prompt counts once.
        rows: verl's limit, where that is a number of rows; ``max_tokens`` is then what the largest micro-batch of verl's holds.
        ranks: among which a micro-batch is split (Ulysses), each of which may hold ``max_tokens / ranks``.
    """

    option: str
    max_tokens: int
    rows: int | None = None
    ranks: int = 1

    @classmethod
    def of(cls, data: TensorDict, options: str, ranks: int) -> Limits:
        """Those that verl put beside the rows of ``data``, for the pass whose ``options`` are a key of this module."""
        tokens, rows = _OPTIONS[options]
        if tu.get_non_tensor_data(data, "use_dynamic_bsz", True):
            return cls(tokens, int(data["max_token_len_per_gpu"] * ranks), ranks=ranks)
        size, lengths = int(data["micro_batch_size_per_gpu"]), data["input_ids"].offsets().diff().tolist()
        removes_padding = tu.get_non_tensor_data(data, "use_remove_padding", True)
        stock = cut_by_rows(lengths, size)
        return cls(rows, max(tokens_of_rows(own, removes_padding) for own in stock), rows=size, ranks=ranks)

    def __str__(self) -> str:
        return self.setting if self.rows is None else f"{self.setting}, up to {self.max_tokens} tokens"

    @property
    def setting(self) -> str:
        """The option and its value."""
        return f"{self.option}={self.max_tokens // self.ranks if self.rows is None else self.rows}"

    def value_for(self, tokens: int, lengths: Sequence[int] = ()) -> int:
        """The smallest value of the option under which a micro-batch may hold ``tokens``.

        Args:
            tokens: as many as all rows have at most.
            lengths: of the rows, in verl's order; for a limit of rows, which has to divide their number.
        """
        if self.rows is None:
            return -(-tokens // self.ranks)
        divisors = (rows for rows in range(1, len(lengths) + 1) if len(lengths) % rows == 0)
        return next(rows for rows in divisors if max(map(sum, cut_by_rows(lengths, rows))) >= tokens)


@dataclass(frozen=True)
class Plan:
    """Which rows go together on this rank.

    Attributes:
        micro_batches: row indices of each, as many as on every other data-parallel rank.
        runs: ``(first, end)`` of the micro-batches that hold the parts of one group, and reuse one forward of its prompt.
        ends: for each micro-batch, the last ones of the runs that begin with it on any rank.
    """

    micro_batches: list[list[int]]
    runs: list[tuple[int, int]]
    ends: list[set[int]]


def cut_by_rows(lengths: Sequence[int], rows: int) -> list[Sequence[int]]:
    """The rows of each micro-batch where verl's limit is a number of rows."""
    return [lengths[start : start + rows] for start in range(0, len(lengths), rows)]


def tokens_of_rows(lengths: Sequence[int], removes_padding: bool) -> int:
    """What verl's own forward of rows of these lengths processes."""
    return sum(lengths) if removes_padding else len(lengths) * max(lengths)


def plan_on_all_ranks(
    sizes: Sequence[RowSize] | None,
    longest: int,
    limits: Limits,
    group: Any,
    *,
    reuses: bool = False,
    forward_last: bool = False,
) -> Plan | None:
    """The plan of this rank. A collective of ``group``, whose ranks get equally many micro-batches.

    Args:
        sizes: the rows of this rank, None where they cannot share prompts.
        longest: tokens of the longest of them.
        limits: what a micro-batch may hold.
        group: data-parallel ranks.
        reuses: whether parts of a group may reuse its prompt on this rank. They do if they may on every rank.
        forward_last: whether packed rows hold the last token of each row.

    Returns:
        the plan; where the rows of some rank cannot share, or those of no rank have anything in common, None: all take
        verl's micro-batches, if each row fits into one.

    Raises:
        ValueError: on every rank, where a row of one of them is longer than a micro-batch may be.
    """
    left_out = int(not forward_last)
    rank, told = None, [0, 0, 0]
    # Nothing is raised before all ranks know: those that went on would wait for this one.
    if sizes is not None and longest - left_out <= limits.max_tokens:
        rank = plan_of_rank(sizes, limits.max_tokens)
        told = next(rank)
    share = sizes is None or any(size.path for size in sizes)
    numbers = [*told, int(sizes is None), longest, int(not reuses), int(share)]
    count, cut, fewest, refused, longest, repeats, shared = _largest(numbers, group)
    needed = longest if refused else longest - left_out
    if limits.rows is None and needed > limits.max_tokens:
        raise ValueError(
            f"a row of {longest} tokens does not fit into a micro-batch: {limits}"
            f"{f' on each of {limits.ranks} sequence-parallel ranks' if limits.ranks > 1 else ''}. Set it to at least "
            f"{limits.value_for(needed)}, or make prompts and responses shorter"
        )
    fits_verl = limits.rows is not None or longest <= limits.max_tokens
    if refused or rank is None or (not shared and fits_verl):
        return None
    reused = (cut or must_split(count, fewest)) and not repeats
    agreed = [count, cut, fewest] if reused else [count, 0, -count]
    plan, runs = finish_plan(rank, agreed, lambda values: _largest(values, group))
    ends = _ends_on_all_ranks(runs, len(plan), group) if reused else [set() for _ in plan]
    return Plan(plan, runs, ends)


def _largest(values: Sequence[int], group: Any) -> list[int]:
    """The largest of each value over the ranks of ``group``. A collective."""
    told = torch.tensor(values, device=get_device_name())
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return told.tolist()  # type: ignore[no-any-return]


def _ends_on_all_ranks(runs: Sequence[tuple[int, int]], count: int, group: Any) -> list[set[int]]:
    own = torch.full((count,), -1, device=get_device_name())
    for first, end in runs:
        own[first] = end - 1
    of_all = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, own, group=group)
    return matched_ends([ends.tolist() for ends in of_all])


def rows_together(sizes: Sequence[RowSize], limits: Limits, *, stay: bool = False) -> tuple[int, int]:
    """How many rows of the largest group one micro-batch may hold, and how many it has.

    Args:
        sizes: the rows.
        limits: of a micro-batch.
        stay: whether rows keep the micro-batches of verl's.
    """
    largest = max(rows_by_group(sizes, range(len(sizes))), key=len, default=[])
    if stay and limits.rows is not None:
        return min(limits.rows, len(largest)), len(largest)
    fitting, group = 0, sorted((sizes[row] for row in largest), key=lambda size: size.response)
    while fitting < len(group) and packed_tokens(group[: fitting + 1]) <= limits.max_tokens:
        fitting += 1
    return fitting, len(group)


def rows_within(rows: Sequence[int], lengths: Sequence[int], limits: Limits) -> list[int]:
    """The first of ``rows`` that one micro-batch of verl's may hold, with every prompt counted in every row.

    Two at least, unless verl's have one.
    """
    totals = itertools.accumulate(lengths[row] for row in rows)
    fitting = max(sum(total <= limits.max_tokens for total in totals), 2)
    return list(rows[: fitting if limits.rows is None else min(fitting, limits.rows)])


def why_levels_are_repeated(sizes: Sequence[RowSize], limits: Limits, *, forward_last: bool = False) -> str | None:
    """A line for the log where parts of a group, which reuse its prompt, repeat what their responses have in common.

    With ``forward_last`` they repeat the last token of the prompt, too, which is not told.
    """
    apart = together = 0
    for parts in cut_groups(sizes, limits.max_tokens):
        reused = (len(parts) - 1) * (sizes[parts[0][0]].prompt - 1 + forward_last)
        apart += sum(packed_tokens(sizes[row] for row in part) for part in parts) - reused
        together += packed_tokens(sizes[row] for part in parts for row in part)
    if apart == together:
        return None
    rows = sum(size.prompt + size.response for size in sizes)
    return (
        "parts of a group reuse its prompt, and share what responses begin alike with in each part alone: of the tokens of this "
        f"batch {apart / rows:.1%} are forwarded, {together / rows:.1%} with whole groups in a micro-batch"
    )


def why_groups_are_cut(sizes: Sequence[RowSize], limits: Limits, *, stay: bool = False) -> str | None:
    """A line for the log where a micro-batch holds less than a group, None where whole groups fit. Arguments of :func:`rows_together`."""
    groups = rows_by_group(sizes, range(len(sizes)))
    if stay and limits.rows is not None:
        rows = max(map(len, groups), default=0)
        if rows <= limits.rows:
            return None
        return (
            f"{limits.setting}: a group has {rows} rows, so its prompt is forwarded {-(-rows // limits.rows)} times; set a "
            f"multiple of {rows} to share it whole"
        )
    tokens = max((packed_tokens(sizes[row] for row in group) for group in groups if len(group) > 1), default=0)
    if tokens <= limits.max_tokens:
        return None
    return (
        f"{limits}: a group has up to {tokens} tokens, its prompt counted once, so it is cut and its prompt forwarded for "
        f"each part; set {limits.value_for(tokens, [size.prompt + size.response for size in sizes])} to share it whole"
    )
