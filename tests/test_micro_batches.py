"""Micro-batches: groups stay whole where they fit, and every row is in one within the limit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.micro_batches import (
    RowSize,
    cut_groups,
    finish_plan,
    packed_tokens,
    plan_all_ranks,
    plan_micro_batches,
    plan_of_rank,
    plan_parts,
    rows_by_group,
    runs_of_parts,
    sizes_in,
    spread_micro_batches,
)


@st.composite
def row_sizes(draw):
    """Rows of up to six groups in any order; the rows of a group have one prompt."""
    prompts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rows = st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 9))
    return [RowSize(g, prompts[g], response) for g, response in draw(st.lists(rows, min_size=1, max_size=16))]


@st.composite
def planned(draw):
    """Rows and a limit that every single row respects."""
    sizes = draw(row_sizes())
    longest = max(size.prompt - 1 + size.response for size in sizes)
    return sizes, draw(st.integers(longest, longest + 30) | st.just(10**9))


def forwarded(sizes):
    """Packed tokens, counted by laying out real rows: distinct prompts, and responses that all begin differently."""
    rows = [
        torch.tensor([size.group] * size.prompt + [1000 + i] + [0] * (size.response - 1))
        for i, size in enumerate(sizes)
    ]
    return PrefixLayout.from_rows(rows).num_tokens


def assert_each_row_once(plan, sizes):
    assert sorted(row for rows in plan for row in rows) == list(range(len(sizes)))
    assert all(plan), "a micro-batch is empty"


def assert_fullest_first(plan, sizes):
    loads = [forwarded([sizes[row] for row in rows]) for rows in plan]
    assert loads == sorted(loads, reverse=True)


def parts_of_groups(plan, sizes):
    """Pairs of a micro-batch and a group in it: each of them forwards one prompt."""
    return {(i, sizes[row].group) for i, rows in enumerate(plan) for row in rows}


@settings(deadline=None)
@given(row_sizes())
def test_packed_tokens_are_those_of_the_layout(sizes):
    assert packed_tokens(sizes) == forwarded(sizes)


@settings(deadline=None, max_examples=500)
@given(planned())
def test_every_row_is_in_one_micro_batch_within_the_limit(case):
    sizes, max_tokens = case
    plan = plan_micro_batches(sizes, max_tokens)
    assert_each_row_once(plan, sizes)
    assert_fullest_first(plan, sizes)
    for rows in plan:
        assert forwarded([sizes[row] for row in rows]) <= max_tokens


@settings(deadline=None, max_examples=500)
@given(planned())
def test_a_group_stays_whole_wherever_a_micro_batch_can_hold_it(case):
    sizes, max_tokens = case
    plan = plan_micro_batches(sizes, max_tokens)
    parts = parts_of_groups(plan, sizes)
    for group in {size.group for size in sizes}:
        members = [size for size in sizes if size.group == group]
        if forwarded(members) <= max_tokens:
            assert sum(of == group for _, of in parts) == 1, f"group {group} is in several micro-batches"


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 30))
def test_groups_of_equal_size_take_the_fewest_micro_batches(groups, rows, slack):
    sizes = [RowSize(group, 5, 3) for _ in range(rows) for group in range(groups)]
    load = 4 + 3 * rows
    plan = plan_micro_batches(sizes, load + slack)
    assert len(plan) == -(-groups // ((load + slack) // load))


def test_small_groups_fill_what_large_ones_leave():
    sizes = [RowSize(group, 2, load - 1) for group, load in enumerate([3, 5, 7, 5])]
    assert plan_micro_batches(sizes, max_tokens=10) == [[2, 0], [1, 3]]


def test_a_group_beyond_the_limit_is_filled_into_few_parts():
    sizes = [RowSize("g", 11, 5)] * 10  # 10 tokens of prompt, 5 of each response
    assert [len(rows) for rows in plan_micro_batches(sizes, max_tokens=30)] == [4, 4, 2]
    assert plan_micro_batches(sizes, max_tokens=60) == [list(range(10))]


def test_rows_of_a_group_that_fit_together_come_together_whatever_stands_between_them():
    sizes = [RowSize("g", 10, response) for response in (8, 20, 8)]
    assert plan_micro_batches(sizes, max_tokens=29) == [[1], [0, 2]]  # 9 + 20 and 9 + 16


def test_a_prompt_is_paid_for_once_and_a_row_may_fill_the_budget():
    sizes = [RowSize(0, 100, 10), RowSize(0, 100, 20), RowSize(1, 50, 80)]
    assert plan_micro_batches(sizes, max_tokens=129) == [[0, 1], [2]]  # 99 + 30 and 49 + 80
    assert sorted(map(sorted, plan_micro_batches(sizes, max_tokens=258))) == [[0, 1, 2]]


def test_no_rows_make_no_micro_batches():
    assert plan_micro_batches([], max_tokens=8) == spread_micro_batches([], [], 0) == []


def test_a_row_beyond_the_budget_is_named():
    sizes = [RowSize("a", 4, 2), RowSize("b", 5, 6)]
    message = r"row 1 has 5 \+ 6 tokens, a micro-batch may hold 9: raise the token budget"
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(sizes, max_tokens=9)
    assert len(plan_micro_batches(sizes, max_tokens=10)) == 2


@settings(deadline=None, max_examples=500)
@given(planned(), st.data())
def test_spreading_reaches_the_count_and_splits_groups_last(case, data):
    sizes, max_tokens = case
    plan = plan_micro_batches(sizes, max_tokens)
    before = [list(rows) for rows in plan]
    count = data.draw(st.integers(len(plan), len(sizes)))
    spread = spread_micro_batches(plan, sizes, count)
    assert plan == before, "the plan was changed"
    assert len(spread) == count
    assert_each_row_once(spread, sizes)
    assert_fullest_first(spread, sizes)
    for rows in spread:
        assert any(set(rows) <= set(whole) for whole in plan), "rows of different micro-batches were joined"
    # A cut between groups adds no pair, so there are as many as before until each micro-batch holds one group.
    assert len(parts_of_groups(spread, sizes)) == max(len(parts_of_groups(plan, sizes)), count)


def test_the_fullest_micro_batch_is_halved_first():
    sizes = [RowSize(0, 2, 1)] * 6 + [RowSize(1, 2, 9)] * 4
    assert spread_micro_batches([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]], sizes, 3) == [[6, 7], [8, 9], [0, 1, 2, 3, 4, 5]]


def test_two_groups_are_parted_before_a_fuller_group_is_split():
    sizes = [RowSize(0, 9, 9)] * 4 + [RowSize(1, 3, 1), RowSize(2, 3, 1)]
    spread = spread_micro_batches([[0, 1, 2, 3], [4, 5]], sizes, 3)
    assert spread[0] == [0, 1, 2, 3] and sorted(spread[1:]) == [[4], [5]]


@pytest.mark.parametrize(("plan", "count"), [([[0, 1]], 3), ([[0], [1]], 1), ([], 1)])
def test_counts_that_cannot_be_reached_are_named(plan, count):
    sizes = [RowSize(0, 2, 1)] * sum(map(len, plan))
    message = f"{len(sizes)} rows in {len(plan)} micro-batches cannot be spread over {count}"
    with pytest.raises(ValueError, match=message):
        spread_micro_batches(plan, sizes, count)


# ---------------------------------------------------------------------------------------------------------------- trees


@st.composite
def forks(draw):
    """Rows of few different tokens, so that they fork everywhere, with prompts of any length, and a shortest level."""
    rows = draw(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=9), min_size=1, max_size=12))
    prompts = [draw(st.integers(1, len(row) - 1)) for row in rows]
    return [torch.tensor(row) for row in rows], prompts, draw(st.none() | st.integers(1, 4))


@settings(deadline=None, max_examples=300)
@given(forks(), st.data())
def test_micro_batches_of_trees_keep_within_the_limit_when_they_are_laid_out(case, data):
    rows, prompts, least = case
    layout = PrefixLayout.from_rows(rows, shareable=prompts, min_level=least)
    sizes = sizes_in(layout, [str(row[:p].tolist()) for row, p in zip(rows, prompts, strict=True)], prompts)
    assert packed_tokens(sizes) == layout.num_tokens
    assert [size.tokens for size in sizes] == [len(row) - 1 for row in rows]
    max_tokens = data.draw(st.integers(max(len(row) - 1 for row in rows), 40))
    plan = plan_micro_batches(sizes, max_tokens)
    assert_each_row_once(plan, sizes)
    plan = spread_micro_batches(plan, sizes, data.draw(st.integers(len(plan), len(rows))))
    assert_each_row_once(plan, sizes)
    for members in plan:
        taken = PrefixLayout.from_rows(
            [rows[i] for i in members], shareable=[prompts[i] for i in members], min_level=least
        )
        assert taken.num_tokens <= packed_tokens(sizes[i] for i in members)
        assert taken.num_tokens <= max_tokens


def tool_loops(prompts=4, depth=4, system=60, turn=15, result=40):
    """Every path of a tree that forks in two at each turn, below a system prompt, and their order a shuffled one."""
    torch.manual_seed(0)

    def tokens(count):
        return torch.randint(1, 50_000, (count,)).tolist()

    def grow(row, level):
        if level == depth:
            return [row]
        answers = [tokens(result) if level < depth - 1 else [] for _ in range(2)]
        return [path for answer in answers for path in grow(row + tokens(turn) + answer, level + 1)]

    shared = tokens(system)
    asked = [shared + tokens(20) for _ in range(prompts)]
    rows = [(row, len(prompt)) for prompt in asked for row in grow(prompt, 0)]
    return [rows[i] for i in torch.randperm(len(rows)).tolist()]


@pytest.mark.parametrize("max_tokens", [400, 1200])
def test_rows_that_fork_late_stay_together(max_tokens):
    """Tool use that forks: micro-batches filled from the leaves of the tree forward far less than those filled by prompt."""
    rows, prompts = map(list, zip(*tool_loops(), strict=True))
    rows = [torch.tensor(row) for row in rows]
    groups = [tuple(row[:p].tolist()) for row, p in zip(rows, prompts, strict=True)]
    layout = PrefixLayout.from_rows(rows, shareable=prompts, min_level=1)

    def forwarded_by(sizes):
        plan = plan_micro_batches(sizes, max_tokens=max_tokens)
        return sum(PrefixLayout.from_rows([rows[i] for i in members]).num_tokens for members in plan)

    by_tree = forwarded_by(sizes_in(layout, groups, prompts))
    by_prompt = forwarded_by([RowSize(g, p, len(row) - p) for g, p, row in zip(groups, prompts, rows, strict=True)])
    assert layout.num_tokens <= by_tree < 0.75 * by_prompt
    if max_tokens == 1200:  # each prompt's tree fits: 20 + 15 * 30 + 40 * 14 tokens, and 59 of the system prompt
        assert by_tree == layout.num_tokens + 3 * 59


def test_rows_of_a_group_lie_in_the_order_of_their_tree():
    rows = [torch.tensor([9, 9, 9, *tail]) for tail in ([1, 1, 5], [2, 7], [1, 1, 6], [2, 8], [1, 4])]
    sizes = sizes_in(PrefixLayout.from_rows(rows), ["g"] * 5, [3] * 5)
    assert rows_by_group(sizes, range(5)) == [[0, 2, 4, 1, 3]]
    assert plan_micro_batches(sizes, max_tokens=100) == [[0, 2, 4, 1, 3]]


def test_a_micro_batch_is_cut_where_rows_have_least_in_common():
    rows = [torch.tensor([9, 9, 9, *tail]) for tail in ([1, 1, 1, 5], [1, 1, 1, 6], [1, 1, 1, 7], [2, 3])]
    sizes = sizes_in(PrefixLayout.from_rows(rows), ["g"] * 4, [3] * 4)
    assert spread_micro_batches([[0, 1, 2, 3]], sizes, 2) == [[0, 1, 2], [3]]


# ------------------------------------------------------------------------------------------ parts that reuse a prompt


@settings(deadline=None, max_examples=200)
@given(planned(), st.lists(st.integers(1, 5), max_size=6), st.data())
def test_parts_keep_the_limit_and_stand_alone_in_runs(case, at_least, data):
    sizes, max_tokens = case
    groups = cut_groups(sizes, max_tokens, at_least)
    assert [len(parts) for parts in cut_groups(sizes, max_tokens)] == sorted(map(len, cut_groups(sizes, max_tokens)))[
        ::-1
    ]
    for parts, count in zip(groups, at_least, strict=False):
        assert len(parts) >= min(count, sum(map(len, parts)))
    in_parts, whole = plan_parts(groups, sizes, max_tokens)
    assert_each_row_once(in_parts + whole, sizes)
    spread = spread_micro_batches(in_parts + whole, sizes, data.draw(st.integers(len(in_parts + whole), len(sizes))))
    plan, runs = runs_of_parts(spread, sizes)
    assert sorted(map(sorted, plan)) == sorted(map(sorted, spread))
    for rows in plan:
        assert forwarded([sizes[row] for row in rows]) <= max_tokens
    in_runs = {number for first, end in runs for number in range(first, end)}
    for first, end in runs:
        (group,) = {sizes[row].group for rows in plan[first:end] for row in rows}
        assert sum(len(rows) for rows in plan[first:end]) == sum(size.group == group for size in sizes)
        assert end - first > 1
    # Every prompt of two tokens or more is forwarded once.
    outside = [(i, sizes[row]) for i, rows in enumerate(plan) for row in rows if i not in in_runs]
    homes = {(number, size.group) for number, size in outside if size.prompt > 1}
    assert len(homes) == len({group for _, group in homes})


def test_the_groups_that_are_cut_most_come_first_and_are_cut_as_others_cut_theirs():
    sizes = [RowSize("a", 5, 3)] * 2 + [RowSize("b", 17, 3)] * 5 + [RowSize("c", 5, 9)] * 4
    assert [[len(part) for part in parts] for parts in cut_groups(sizes, 22)] == [[2, 2, 1], [2, 2], [2]]
    groups = cut_groups(sizes, 22, [4, 3, 1])
    assert [[len(part) for part in parts] for parts in groups] == [[2, 1, 1, 1], [2, 1, 1], [2]]
    in_parts, whole = plan_parts(groups, sizes, 22)
    assert whole == [[0, 1]]
    plan, runs = runs_of_parts([*whole, *in_parts], sizes)
    assert plan == [*in_parts, *whole] and runs == [(0, 4), (4, 7)]


def test_a_prompt_of_one_token_leaves_nothing_to_reuse():
    assert runs_of_parts([[0], [1]], [RowSize("a", 1, 3)] * 2) == ([[0], [1]], [])


# ------------------------------------------------------------------------------------------------------------ the ranks

RANKS = [
    [RowSize("a", 9, 3)] * 4 + [RowSize("b", 5, 3)] * 2,
    [RowSize("c", 6, 2)] * 3 + [RowSize("d", 4, 6)] * 2 + [RowSize("e", 7, 2)],
]


@pytest.mark.parametrize("limits", [(11, 9), (14, 13), (20, 9), (18, 18), (1000, 1000), (11, 1000)], ids=str)
def test_ranks_make_equally_many_micro_batches_and_each_forwards_a_prompt_once(limits):
    """Each has a limit of its own, as where verl's limit is one of rows."""
    plans = plan_all_ranks(RANKS, limits)
    assert len({len(plan) for plan, _ in plans}) == 1
    for (plan, runs), sizes in zip(plans, RANKS, strict=True):
        assert_each_row_once(plan, sizes)
        first_of = {number: first for first, end in runs for number in range(first, end)}
        homes = {(first_of.get(i, i), sizes[row].group) for i, rows in enumerate(plan) for row in rows}
        assert len(homes) == len({size.group for size in sizes})


def test_a_rank_that_cuts_nothing_follows_one_that_does():
    """One rank has a group of four, which it cuts, and the other one four of one row."""
    cut, uncut = RANKS[0][:4], [RowSize(name, 5, 3) for name in "wxyz"]
    (_, runs), (plan, no_runs) = plan_all_ranks([cut, uncut], [14, 14])
    assert runs == [(0, 2)] and no_runs == [] and len(plan) == 2


def test_without_reuse_a_rank_takes_the_plan_without_it():
    rank = plan_of_rank(RANKS[0], 14)
    count, cut, fewest = next(rank)
    assert (cut, fewest) == (1, -2)
    plan, runs = finish_plan(rank, [count + 1, 0, -count - 1], lambda told: pytest.fail("nothing more is agreed on"))
    assert runs == [] and len(plan) == count + 1
    assert_each_row_once(plan, RANKS[0])
