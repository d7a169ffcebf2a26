"""Which rows of a training lie in which micro-batch, and what each micro-batch forwards: in TRL, in verl, stock and shared.

TRL samples completions group by group, shuffles the rows of a process's generation batch and cuts it into micro-batches;
ours brings rows of a prompt side by side again, runs several micro-batches in one forward where they fit, and lets
forwards reuse an open prompt. verl cuts each optimizer step of a rank into micro-batches by rows or by tokens; ours plans them
by tokens, with every prompt counted once. The plans are made by the code that the trainers run (``token_budget.py`` and
``micro_batches.py``). What is counted here is what the metric ``prefix_grouper/token_ratio`` counts: exactly, where the
order of rows makes no difference, and for one order drawn at random where it does (prompts that begin alike).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.forest import visible_pairs, visible_pairs_of_rows
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.micro_batches import RowSize, plan_all_ranks
from prefix_grouper_plugins.step_order import regrouped_order
from prefix_grouper_plugins.token_budget import (
    Most,
    RowTokens,
    cost_of_forward,
    held_tokens,
    pays_to_pack,
    plan_forwards,
)
from prefix_grouper_plugins.usage import UsageError


class Load(NamedTuple):
    """What a micro-batch forwards, and holds for its backward.

    Attributes:
        tokens: positions that are forwarded, padding included.
        pairs, windowed_pairs: of query and key, of one head, in layers without and with the model's window.
        scored: positions that go through the language-model head.
        apart_tokens: of the positions, those of prompts that are forwarded apart from their rows, and have no logits.
        open_tokens: what the prompts that earlier micro-batches have forwarded count for: positions, or less where their layers run
            again in the backward.
        cached_tokens: positions whose keys and values are held for reuse.
        again_tokens, again_pairs, again_windowed_pairs: of the prompts that are forwarded, those whose layers run again.
        mask_entries: of the attention mask of padded rows.
    """

    tokens: int
    pairs: int
    windowed_pairs: int
    scored: int
    apart_tokens: int = 0
    open_tokens: int = 0
    cached_tokens: int = 0
    again_tokens: int = 0
    again_pairs: int = 0
    again_windowed_pairs: int = 0
    mask_entries: int = 0

    @property
    def held_tokens(self) -> int:
        """Positions that count for what autograd keeps, see `token_budget.held_tokens`."""
        return self.tokens - self.again_tokens + held_tokens(self.again_tokens, is_recomputed=True) + self.open_tokens


@dataclass(frozen=True)
class Schedule:
    """The micro-batches of a training's updates.

    Attributes:
        stock, shared: what each of them forwards.
        row_tokens: tokens of all rows without padding.
        rows: how many rows there are.
        optimizer_steps: over all of which the micro-batches are spread.
    """

    stock: list[Load]
    shared: list[Load]
    row_tokens: int
    rows: int
    optimizer_steps: float

    @property
    def token_ratio(self) -> float:
        """Tokens forwarded, divided by the rows' tokens without padding: the metric of this name."""
        return sum(load.tokens for load in self.shared) / self.row_tokens


@dataclass(frozen=True)
class TRLSizes:
    """Batch sizes by TRL's names: ``per_device_train_batch_size``, ``gradient_accumulation_steps``, ``steps_per_generation``.

    ``max_tokens`` is our ``prefix_grouper_max_tokens``, None for ``auto``; ``checkpointing`` is ``gradient_checkpointing``, under
    which layers run again in the backward anyhow.

    Raises:
        UsageError: the generation batch does not hold whole groups.
    """

    group: int
    batch_size: int
    accumulation: int
    steps_per_generation: int
    processes: int = 1
    max_tokens: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.generation_rows % self.group:
            raise UsageError(
                f"a generation batch has {self.generation_rows} rows (--batch-size {self.batch_size} x --processes "
                f"{self.processes} x --steps-per-generation {self.steps_per_generation}), no multiple of --group {self.group}"
            )

    @property
    def generation_rows(self) -> int:
        return self.batch_size * self.processes * self.steps_per_generation

    @property
    def prompts_needed(self) -> int:
        return self.generation_rows // self.group

    @property
    def window(self) -> int:
        """Micro-batches that exchange rows and share open prompts."""
        return math.gcd(self.accumulation, self.steps_per_generation)


@dataclass(frozen=True)
class VerlSizes:
    """Batch sizes by verl's names: ``rollout.n``, ``actor.ppo_mini_batch_size`` (prompts of an optimizer step), and either
    ``ppo_micro_batch_size_per_gpu`` or, with ``use_dynamic_bsz``, ``ppo_max_token_len_per_gpu``.

    Raises:
        UsageError: the rows of an optimizer step do not divide by the processes.
    """

    group: int
    mini_batch: int
    micro_batch_size: int | None
    max_token_len: int | None
    processes: int = 1

    def __post_init__(self) -> None:
        if self.mini_batch * self.group % self.processes:
            raise UsageError(
                f"an optimizer step has {self.mini_batch * self.group} rows (--mini-batch {self.mini_batch} x --group "
                f"{self.group}), no multiple of --processes {self.processes}"
            )

    @property
    def prompts_needed(self) -> int:
        return self.mini_batch


class Prompts:
    """Prompts of a data set.

    Args:
        ids: ``LongTensor[P]`` each.
        beginnings_share: whether different prompts share what they have in common at the beginning, and equal ones all of
            it (TRL), or each prompt of the data set is a group of its own (verl, by its ``uid``).
        padded_positions: whether they must be equally long for that, since padded columns are numbered too.
        window: of the model's sliding-window layers, None where it has none.
    """

    def __init__(
        self, ids: Sequence[Tensor], *, beginnings_share: bool, padded_positions: bool = True, window: int | None = None
    ) -> None:
        self.ids, self.window = list(ids), window
        self._beginnings_share, self._padded_positions = beginnings_share, padded_positions
        first: dict[bytes, int] = {}
        self.numbers = [
            first.setdefault(x.numpy().tobytes(), i) if beginnings_share else i for i, x in enumerate(self.ids)
        ]

    def first(self, count: int, *, share: bool) -> Prompts:
        """The first ``count`` of them, for the trainer whose prompts ``share`` (see above) or do not."""
        return Prompts(
            self.ids[:count],
            beginnings_share=share,
            padded_positions=self._padded_positions,
            window=self.window,
        )

    def rows(self, group: int, lengths: Sequence[int]) -> list[RowSize]:
        """``group`` rows of each prompt, their responses of ``lengths``."""
        numbers = (number for number in self.numbers for _ in range(group))
        return [RowSize(number, len(self.ids[number]), length) for number, length in zip(numbers, lengths, strict=True)]

    def pairs(self, rows: Iterable[int]) -> tuple[int, int]:
        """Causal pairs of rows of these lengths, without and with the window."""
        rows = list(rows)
        return visible_pairs_of_rows(rows), visible_pairs_of_rows(rows, self.window)

    def packed(self, rows: Sequence[RowSize]) -> Load:
        """Rows as one packed row."""
        layout = self._layout(rows)
        pairs = [visible_pairs(layout.segments, window) for window in (None, self.window)]
        return Load(layout.num_tokens, pairs[0], pairs[1], sum(row.response for row in rows))

    def _layout(self, rows: Sequence[RowSize]) -> PrefixLayout:
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row.response)  # type: ignore[arg-type]
        if len(groups) == 1 or not self._beginnings_share:
            return PrefixLayout.from_groups([len(self.ids[number]) for number in groups], list(groups.values()))
        tokens = [torch.cat([self.ids[row.group], torch.zeros(row.response, dtype=torch.long)]) for row in rows]  # type: ignore[call-overload]
        keys = [row.prompt if self._padded_positions else None for row in rows]
        return PrefixLayout.from_rows(tokens, keys, shareable=[row.prompt for row in rows])


def _sum(loads: Iterable[Load]) -> Load:
    return Load(*map(sum, zip(*loads, strict=True)))


# ----------------------------------------------------------------------------------------------------------------- TRL


def trl_schedule(
    prompts: Prompts, lengths: Sequence[int], sizes: TRLSizes, seed: int = 0, device: str = "cuda"
) -> Schedule:
    """One pass over the data in TRL's order of rows, drawn at random.

    Args:
        prompts: as many as a generation batch needs at least; those beyond the last whole one are left out, as TRL does it.
        lengths: of the responses, ``group`` for each prompt.
        sizes: of the batches.
        seed: of the order.
        device: its type, where the training runs.
    """
    cost = None if sizes.checkpointing else cost_of_forward(device)
    rows = prompts.rows(sizes.group, lengths)
    random = np.random.default_rng(seed)
    groups = random.permutation(len(prompts.ids)).tolist()
    per_batch, local = sizes.prompts_needed, sizes.batch_size * sizes.steps_per_generation
    stock, shared, used = [], [], 0
    batches = range(0, len(groups) - per_batch + 1, per_batch)
    for start in batches:
        of_batch = [row for g in groups[start : start + per_batch] for row in rows[g * sizes.group :][: sizes.group]]
        for process in range(sizes.processes):
            share = of_batch[process * local :][:local]
            shuffled = [share[i] for i in random.permutation(local).tolist()]
            used += sum(row.prompt + row.response for row in share)
            stock += _padded(prompts, shuffled, sizes.batch_size)
            span = sizes.window * sizes.batch_size
            width = max(row.prompt for row in share) + max(row.response for row in share)
            for first in range(0, local, span):
                window = _cut(_side_by_side(shuffled[first : first + span]), sizes.batch_size)
                shared += _reused(prompts, window, sizes, width, cost)
    count = len(batches) * sizes.generation_rows
    steps = count / (sizes.batch_size * sizes.accumulation * sizes.processes)
    return Schedule(stock, shared, used, count, steps)


def _cut(rows: Sequence[RowSize], size: int) -> list[list[RowSize]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _side_by_side(rows: Sequence[RowSize]) -> list[RowSize]:
    groups: dict[object, list[RowSize]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [row for members in groups.values() for row in members]


def _padded(prompts: Prompts, rows: Sequence[RowSize], size: int) -> list[Load]:
    """TRL's micro-batches of a process's generation batch, all of which are padded to its longest prompt and completion.

    Rows of one length need no mask, so attention runs its causal half alone; under a mask it runs all pairs.
    """
    prompt, response = max(row.prompt for row in rows), max(row.response for row in rows)
    width, loads = prompt + response, []
    for batch in _cut(rows, size):
        scored = sum(row.response for row in batch)
        if all((row.prompt, row.response) == (prompt, response) for row in batch):
            loads.append(Load(len(batch) * width, *prompts.pairs([width] * len(batch)), scored))
        else:
            squares = len(batch) * width**2
            loads.append(Load(len(batch) * width, squares, squares, scored, mask_entries=squares))
    return loads


def _reused(
    prompts: Prompts, micro_batches: list[list[RowSize]], sizes: TRLSizes, width: int, cost: int | None
) -> list[Load]:
    """The forwards of one window's micro-batches, by the plan that the trainer follows; ``cost`` as in `plan_forwards`."""
    tokens = [[RowTokens.of(row.group, row.prompt, row.response) for row in batch] for batch in micro_batches]
    last = {row.group: number for number, batch in enumerate(micro_batches) for row in batch}
    loads, most = list[Load](), Most(sizes.max_tokens or len(micro_batches[0]) * width)
    cached: dict[object, int] = {}
    for forward in plan_forwards(tokens, most, sizes.group, cost_of_forward=cost):
        rows = [row for number in forward.micro_batches for row in micro_batches[number]]
        others = [row for row in rows if row.group not in forward.shared]
        parts = [prompts.packed(others)] if others else []
        if len(forward.micro_batches) == 1 and not forward.shared:
            padded = len(rows) * width, len(rows)
            parts = [part if pays_to_pack(part.tokens, *padded) else _ordinary_rows(prompts, rows) for part in parts]
        for number, is_first in forward.shared.items():
            own = [row for row in rows if row.group == number]
            parts.append(_part(prompts, own, is_first=is_first, recomputed=number in forward.recomputed))
            cached[number] = own[0].prompt - 1
        loads.append(_sum(parts)._replace(open_tokens=forward.held, cached_tokens=sum(cached.values())))
        cached = {number: own for number, own in cached.items() if last[number] >= forward.micro_batches.stop}
    return loads


def _ordinary_rows(prompts: Prompts, rows: Sequence[RowSize]) -> Load:
    """Rows that have next to nothing in common or in padding, which the trainer forwards as they are: see `pays_to_pack`."""
    lengths = [row.prompt + row.response for row in rows]
    return Load(sum(lengths), *prompts.pairs(lengths), sum(row.response for row in rows))


def _part(prompts: Prompts, rows: Sequence[RowSize], *, is_first: bool, recomputed: bool = False) -> Load:
    """Rows of one prompt against its keys and values; the first part forwards the prompt too."""
    given, responses = rows[0].prompt - 1, [row.response for row in rows]
    whole, before = prompts.pairs(given + response for response in responses), prompts.pairs([given] * len(rows))
    prompt = Load(given, *prompts.pairs([given]), 0, given) if is_first else Load(0, 0, 0, 0, open_tokens=given)
    if recomputed:
        prompt = prompt._replace(
            again_tokens=given, again_pairs=prompt.pairs, again_windowed_pairs=prompt.windowed_pairs
        )
    pairs = [a - b for a, b in zip(whole, before, strict=True)]
    return _sum([prompt, Load(sum(responses), pairs[0], pairs[1], sum(responses), cached_tokens=given)])


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_schedule(prompts: Prompts, lengths: Sequence[int], sizes: VerlSizes) -> Schedule:
    """One pass over the data, whole groups in each optimizer step (``regroup=auto``); verl scores every position.

    Args:
        prompts: as many as an optimizer step needs at least; those beyond the last whole one are left out.
        lengths: of the responses, ``group`` for each prompt.
        sizes: of the batches.

    Raises:
        UsageError: a row does not fit into ``max_token_len``.
    """
    rows = prompts.rows(sizes.group, lengths)
    stock, shared, used, count = [], [], 0, sizes.mini_batch * sizes.group
    steps = len(rows) // count
    for step in range(steps):
        of_step = rows[step * count :][:count]
        used += sum(row.prompt + row.response for row in of_step)
        order = regrouped_order(of_step, sizes.processes, 1)
        ranks = [[of_step[i] for i in share] for share in torch.tensor(order).view(sizes.processes, -1).tolist()]
        stock += [load for own in ranks for load in _ordinary(prompts, own, sizes)]
        shared += _planned(prompts, ranks, sizes)
    return Schedule(stock, shared, used, steps * count, float(steps))


def _ordinary(prompts: Prompts, rows: Sequence[RowSize], sizes: VerlSizes) -> list[Load]:
    """verl's micro-batches: rows laid end to end without padding, so many rows or so many tokens."""
    batches: list[list[int]] = [[]]
    for row in rows:
        length = row.prompt + row.response
        if sizes.max_token_len is not None and length > sizes.max_token_len:
            raise UsageError(f"a row has {length} tokens, more than --max-token-len {sizes.max_token_len}: raise it")
        full = (
            len(batches[-1]) == sizes.micro_batch_size
            if sizes.max_token_len is None
            else sum(batches[-1]) + length > sizes.max_token_len
        )
        if full and batches[-1]:
            batches.append([])
        batches[-1].append(length)
    return [Load(sum(batch), *prompts.pairs(batch), sum(batch)) for batch in batches]


def _planned(prompts: Prompts, ranks: Sequence[Sequence[RowSize]], sizes: VerlSizes) -> list[Load]:
    """Ours, equally many on each rank; the parts of a group that exceeds a micro-batch reuse its prompt, as under FSDP2."""
    most = [sizes.max_token_len or max(load.tokens for load in _ordinary(prompts, own, sizes)) for own in ranks]
    loads, plans = [], plan_all_ranks(ranks, most)
    reuses = any(runs for _, runs in plans)
    for (plan, runs), rows in zip(plans, ranks, strict=True):
        first_of = {number: first for first, end in runs for number in range(first, end)}
        for number, batch in enumerate(plan):
            members = [rows[i] for i in batch]
            if number in first_of:
                loads.append(_part(prompts, members, is_first=number == first_of[number]))
            else:
                packed, ordinary = prompts.packed(members), _ordinary_rows(prompts, members)
                pays = reuses or pays_to_pack(packed.tokens, ordinary.tokens, len(members))
                load = packed if pays else ordinary
                loads.append(load._replace(scored=load.tokens))
    return loads
