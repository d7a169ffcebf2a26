"""Micro-batches of TRL and verl, counted by hand."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins.plan.schedule import (
    Load,
    Prompts,
    TRLSizes,
    VerlSizes,
    trl_schedule,
    verl_schedule,
)
from prefix_grouper_plugins.usage import UsageError

P, R, G = 10, 5, 4
LENGTHS = [R] * (2 * G)


def prompts(share: bool, **options: int) -> Prompts:
    ids = [torch.arange(P), torch.arange(100, 100 + P)]
    return Prompts(ids, beginnings_share=share, **options)  # type: ignore[arg-type]


def causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def test_a_trl_micro_batch_of_a_group_forwards_the_prompt_once_and_stock_forwards_every_row() -> None:
    schedule = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, G, 2, 2))
    pairs = causal(P - 1) + G * (causal(P - 1 + R) - causal(P - 1))
    assert schedule.shared == [Load(P - 1 + G * R, pairs, pairs, G * R)] * 2
    assert schedule.stock == [Load(G * (P + R), G * causal(P + R), G * causal(P + R), G * R)] * 2
    assert schedule.row_tokens == 2 * G * (P + R)
    assert schedule.optimizer_steps == 1


def test_micro_batches_run_together_where_they_hold_no_more_than_one_padded_one() -> None:
    """Two micro-batches of two rows: 9 + 4 x 5 tokens are no more than 2 x 15."""
    schedule = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 2, 4, 4))
    assert [load.tokens for load in schedule.shared] == [P - 1 + G * R] * 2
    assert len(schedule.stock) == 4


def test_smaller_forwards_forward_the_prompt_in_the_first_and_hold_it_in_the_next() -> None:
    """One row at a time: 9 + 2 x 5 tokens are more than 15."""
    first, second = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 1, 8, 8, checkpointing=True)).shared[:2]
    part = causal(P - 1 + R) - causal(P - 1)
    pairs = causal(P - 1) + part
    assert first == Load(P - 1 + R, pairs, pairs, R, apart_tokens=P - 1, cached_tokens=P - 1)
    assert second == Load(R, part, part, R, open_tokens=P - 1, cached_tokens=P - 1)


def test_without_checkpointing_the_layers_of_such_a_prompt_run_again() -> None:
    """A quarter of 9 tokens, which is 3, leaves room for two rows of 5."""
    first, second = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 1, 8, 8)).shared[:2]
    prompt, part = causal(P - 1), 2 * (causal(P - 1 + R) - causal(P - 1))
    again = {"again_tokens": P - 1, "again_pairs": prompt, "again_windowed_pairs": prompt}
    whole = prompt + part
    assert first == Load(P - 1 + 2 * R, whole, whole, 2 * R, apart_tokens=P - 1, cached_tokens=P - 1, **again)
    assert second == Load(2 * R, part, part, 2 * R, open_tokens=3, cached_tokens=P - 1)
    assert (first.held_tokens, second.held_tokens) == (3 + 2 * R, 3 + 2 * R)


def test_the_tokens_of_a_forward_can_be_set() -> None:
    """As `prefix_grouper_max_tokens`: 9 + 4 x 5 tokens are a whole group."""
    schedule = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 1, 8, 8, max_tokens=29))
    assert [load.tokens for load in schedule.shared] == [29, 29]


def test_reuse_ends_where_an_optimizer_step_may_end() -> None:
    """Of four micro-batches of a generation batch, two accumulate: a prompt may be forwarded once in each pair."""
    reused = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 2, 4, 4)).token_ratio
    cut = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 2, 2, 4)).token_ratio
    without = trl_schedule(prompts(True), LENGTHS, TRLSizes(G, 1, 1, 8)).token_ratio
    assert reused == (2 * (P - 1) + 2 * G * R) / (2 * G * (P + R))
    assert reused < cut < without == (P + R - 1) / (P + R)


def test_stock_rows_of_several_lengths_are_padded_and_masked() -> None:
    """To the longest prompt and the longest completion of the generation batch, even where they are of different rows."""
    uneven = Prompts([torch.arange(4), torch.arange(50, 60)], beginnings_share=True)
    schedule = trl_schedule(uneven, [3, 2, 1, 1], TRLSizes(2, 4, 1, 1))
    (load,) = schedule.stock
    assert load == Load(4 * 13, 4 * 13**2, 4 * 13**2, 7, mask_entries=4 * 13**2)
    assert schedule.row_tokens == 2 * 4 + 2 * 10 + 7


def test_a_window_counts_its_own_pairs() -> None:
    (load, _) = trl_schedule(prompts(True, window=3), LENGTHS, TRLSizes(G, G, 2, 2)).shared
    assert load.windowed_pairs == (1 + 2 + 3 * 7) + G * 3 * R < load.pairs


def test_prompts_that_begin_alike_share_their_beginning_where_they_are_equally_long() -> None:
    alike = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])]
    longer = [alike[0], torch.tensor([1, 2, 3, 5, 6])]
    sizes = TRLSizes(2, 4, 1, 1)

    def tokens(ids: list[torch.Tensor], **options: bool) -> int:
        return trl_schedule(Prompts(ids, beginnings_share=True, **options), [2] * 4, sizes).shared[0].tokens

    assert tokens(alike) == 2 + 2 * 1 + 4 * 2  # what a branch starts from is forwarded with the branch
    assert tokens(longer) == 3 + 4 + 4 * 2
    assert tokens(longer, padded_positions=False) < tokens(longer)


@pytest.mark.parametrize("limits", [(G, None), (None, 60), (2, None), (1, None)], ids=str)
def test_verl_forwards_a_prompt_once_for_each_optimizer_step(limits: tuple[int | None, int | None]) -> None:
    schedule = verl_schedule(prompts(False), LENGTHS, VerlSizes(G, 2, *limits))
    assert sum(load.tokens for load in schedule.shared) == 2 * (P - 1 + G * R)
    assert sum(load.tokens for load in schedule.stock) == schedule.row_tokens == 2 * G * (P + R)
    assert schedule.optimizer_steps == 1


def test_verl_scores_every_position_but_those_of_a_prompt_that_its_parts_reuse() -> None:
    """A row has 15 tokens, a group packed 29."""
    both, whole, reused = (
        verl_schedule(prompts(False), LENGTHS, VerlSizes(G, 2, rows, None)).shared for rows in (G, 2, 1)
    )
    assert [load.scored for load in both] == [2 * (P - 1 + G * R)], "60 tokens of verl's rows hold two groups"
    assert [load.scored for load in whole] == [P - 1 + G * R] * 2
    assert [load.scored for load in reused] == [R] * 2 * G
    assert [load.open_tokens for load in reused] == [0, *[P - 1] * 3] * 2


def test_verl_gives_whole_groups_to_each_of_several_processes() -> None:
    schedule = verl_schedule(prompts(False), LENGTHS, VerlSizes(G, 2, G, None, processes=2))
    assert [load.tokens for load in schedule.shared] == [P - 1 + G * R] * 2


def test_equal_prompts_of_a_data_set_share_in_trl_and_not_in_verl() -> None:
    same = [torch.arange(P)] * 2
    trl = trl_schedule(Prompts(same, beginnings_share=True), LENGTHS, TRLSizes(G, 2 * G, 1, 1))
    verl = verl_schedule(Prompts(same, beginnings_share=False), LENGTHS, VerlSizes(G, 2, 2 * G, None))
    assert trl.shared[0].tokens == P - 1 + 2 * G * R
    assert verl.shared[0].tokens == 2 * (P - 1 + G * R)


def test_sizes_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a generation batch has 6 rows .* no multiple of --group 4"):
        TRLSizes(4, 3, 2, 2)
    with pytest.raises(UsageError, match=r"an optimizer step has 4 rows .* no multiple of --processes 3"):
        VerlSizes(4, 1, 4, None, processes=3)
    with pytest.raises(UsageError, match=r"a row has 15 tokens, more than --max-token-len 14"):
        verl_schedule(prompts(False), LENGTHS, VerlSizes(G, 2, None, 14))
