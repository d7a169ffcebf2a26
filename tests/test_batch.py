"""Which rows of a padded batch share what, the way back to the batch, and micro-batches that keep groups together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens, plan_micro_batches, spread_micro_batches


def padded(prompts, completions):
    """``prompt_ids, prompt_mask`` padded on the left, ``completion_ids, completion_mask`` padded on the right."""

    def block(rows, left):
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
        return ids, mask

    return *block(prompts, left=True), *block(completions, left=False)


PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [5, 6, 7]]
COMPLETIONS = [[1, 2], [3], [1, 4, 4], [2, 2], [1]]


def row_positions(batch):
    """``{(row, column): packed position that predicts the token there}``"""
    places = zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)
    return dict(zip(places, batch.positions.tolist(), strict=True))


def visible(batch, position):
    index = torch.arange(batch.layout.num_tokens)
    return index[(index <= position) & (position < batch.layout.subtree_end)]


def test_equal_prompts_are_forwarded_once_in_whatever_order_the_rows_come():
    expected = (3 - 1) + (2 + 3 + 1) + (2 - 1) + (1 + 2)
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 2, 1], [0, 2, 4, 1, 3]):
        batch = GroupedBatch(*padded([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order]))
        assert batch.layout.num_tokens == expected, f"order {order}"
        assert batch.num_groups == 2 and batch.num_rows == 5
        assert batch.num_row_tokens == sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS))


small = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=4)),
    min_size=1,
    max_size=7,
).filter(lambda rows: any(completion for _, completion in rows))


@settings(deadline=None)
@given(small, st.booleans(), st.booleans())
def test_each_completion_token_is_predicted_by_its_own_row_and_nothing_else(rows, padded_positions, forward_last):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    inputs = padded(prompts, completions)
    batch = GroupedBatch(*inputs, padded_positions=padded_positions, forward_last=forward_last)
    where = row_positions(batch)
    assert where.keys() == {(i, j) for i, c in enumerate(completions) for j in range(len(c))}
    for (i, j), position in where.items():
        offset = inputs[0].shape[1] - len(prompts[i]) if padded_positions else 0
        context = visible(batch, position)
        assert batch.labels[position] == completions[i][j]
        assert batch.input_ids[context].tolist() == prompts[i] + completions[i][:j]
        assert batch.position_ids[context].tolist() == list(range(offset, offset + len(prompts[i]) + j))
    assert int((batch.labels != -100).sum()) == len(where), "a token is labelled twice, or shared"


def test_responses_that_begin_alike_do_not_share_their_beginning():
    batch = GroupedBatch(*padded([[5, 6]] * 3, [[1, 2, 3], [1, 2, 3], [1, 2, 4]]))
    assert batch.layout.num_tokens == 1 + 9
    assert batch.layout.segments[:, 2].tolist() == [-1, 0, 0, 0]


def test_prompts_that_begin_alike_share_their_beginning():
    batch = GroupedBatch(*padded([[1, 2, 3, 4, 7], [1, 2, 3, 4, 8], [1, 2, 3, 4, 7], [1, 2, 3, 4, 8]], [[9]] * 4))
    assert batch.layout.num_tokens == 3 + 2 * (1 + 2)
    assert batch.num_groups == 2, "a shared system prompt does not make one group of two"


def test_scatter_brings_every_value_to_its_token_and_its_gradient_back():
    batch = GroupedBatch(*padded(PROMPTS, COMPLETIONS))
    scattered = batch.scatter(batch.labels[batch.positions])
    assert torch.equal(scattered, padded(PROMPTS, COMPLETIONS)[2])

    values = torch.zeros(len(batch.positions), dtype=torch.float64, requires_grad=True)
    weight = torch.arange(1.0, scattered.numel() + 1, dtype=torch.float64).view(scattered.shape)
    (batch.scatter(values) * weight).sum().backward()
    assert torch.equal(values.grad, weight[batch.rows, batch.columns])


def test_padded_positions_are_columns_and_rows_with_other_padding_stay_apart():
    # All begin alike, but the first one begins in column 0 and the others in column 1.
    inputs = padded([[5, 6, 7, 8], [5, 6, 7], [5, 6, 7]], [[1], [2], [3]])
    batch = GroupedBatch(*inputs, padded_positions=True)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 1, 2, 3, 3]
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 7, 7]

    shared = GroupedBatch(*inputs)
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 2, 2]
    assert shared.layout.num_tokens < batch.layout.num_tokens


def test_rows_with_different_keys_share_nothing_although_their_tokens_agree():
    inputs = padded([[5, 6, 7]] * 4, [[1]] * 4)
    assert GroupedBatch(*inputs, keys=["a", "b", "a", "b"]).layout.num_tokens == 2 * (2 + 2)
    assert GroupedBatch(*inputs, keys=["a", "b", "a", "b"]).num_groups == 2
    assert GroupedBatch(*inputs, keys=["a"] * 4).layout.num_tokens == 2 + 4


def test_empty_completions_are_left_out_with_their_prompts():
    batch = GroupedBatch(*padded([[5, 6], [7, 8, 9], [5, 6]], [[1], [], [2, 3]]))
    assert batch.num_rows == 2 and batch.num_groups == 1
    assert sorted(batch.rows.unique().tolist()) == [0, 2]
    assert not {7, 8, 9} & set(batch.input_ids.tolist())
    assert torch.equal(batch.scatter(torch.ones(3)), torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))


def test_keys_are_those_of_the_batch_also_when_rows_are_left_out():
    inputs = padded([[5, 6]] * 3, [[], [1], [2]])
    assert GroupedBatch(*inputs, keys=["a", "b", "b"]).num_groups == 1
    assert GroupedBatch(*inputs, keys=["a", "a", "b"]).num_groups == 2


def test_forward_last_forwards_every_real_token_of_every_row():
    prompts, completions = [[5, 6], [5, 6], [7, 8, 9]], [[1, 2], [3], []]
    inputs = padded(prompts, completions)
    batch = GroupedBatch(*inputs, forward_last=True)
    assert batch.num_rows == 3
    seen = [context.tolist() for context in batch.layout.unpack(batch.input_ids)]
    assert seen == [p + c for p, c in zip(prompts, completions, strict=True)]
    assert int(batch.layout.rows_per_position.sum()) == batch.num_row_tokens
    ordinary = GroupedBatch(*inputs)
    assert torch.equal(
        batch.scatter(batch.labels[batch.positions]), ordinary.scatter(ordinary.labels[ordinary.positions])
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_masks_of_any_dtype_do(dtype):
    prompt_ids, prompt_mask, completion_ids, completion_mask = padded(PROMPTS, COMPLETIONS)
    batch = GroupedBatch(prompt_ids, prompt_mask.to(dtype), completion_ids, completion_mask.to(dtype))
    assert batch.num_groups == 2


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


GOOD = (ones(2, 3), ones(2, 3), ones(2, 2), ones(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: ones(2, 4)}, r"prompt_ids has shape \(2, 3\) and prompt_mask \(2, 4\)"),
        ({0: ones(3), 1: ones(3)}, r"prompt_ids has shape \(3,\)"),
        ({3: ones(1, 2)}, r"completion_ids has shape \(2, 2\) and completion_mask \(1, 2\)"),
        ({1: torch.tensor([[1, 1, 1], [1, 1, 0]])}, "prompt_mask of row 1 has padding other than on the left"),
        ({1: torch.tensor([[1, 0, 1], [1, 1, 1]])}, "prompt_mask of row 0 has padding other than on the left"),
        ({3: torch.tensor([[1, 1], [0, 1]])}, "completion_mask of row 1 has padding other than on the right"),
        ({1: torch.tensor([[1, 1, 1], [0, 0, 0]])}, "the prompt of row 1 is empty"),
        ({3: torch.zeros(2, 2)}, "every completion is empty"),
    ],
)
def test_batches_that_are_not_padded_so_are_named(change, message):
    arguments = [change.get(i, good) for i, good in enumerate(GOOD)]
    with pytest.raises(ValueError, match=message):
        GroupedBatch(*arguments)


def test_blocks_with_another_number_of_rows_are_refused():
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"completion_ids has {count} rows and prompt_ids 2"):
            GroupedBatch(ones(2, 3), ones(2, 3), ones(count, 2), ones(count, 2))
        with pytest.raises(ValueError, match=f"keys has {count} rows and prompt_ids 2"):
            GroupedBatch(*GOOD, keys=["a"] * count)


# --- micro-batches ---------------------------------------------------------------------------------------------------


@st.composite
def row_sizes(draw):
    """Rows of up to six groups in any order; the rows of a group have one prompt."""
    prompts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rows = st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 9))
    return [RowSize(g, prompts[g], response) for g, response in draw(st.lists(rows, min_size=1, max_size=16))]


@st.composite
def planned(draw):
    """Rows and limits that every single row respects."""
    sizes = draw(row_sizes())
    longest = max(size.prompt - 1 + size.response for size in sizes)
    max_tokens = draw(st.none() | st.integers(longest, longest + 30))
    return sizes, max_tokens, draw(st.none() | st.integers(1, 6))


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
def test_every_row_is_in_one_micro_batch_within_the_limits(case):
    sizes, max_tokens, max_rows = case
    plan = plan_micro_batches(sizes, max_tokens=max_tokens, max_rows=max_rows)
    assert_each_row_once(plan, sizes)
    assert_fullest_first(plan, sizes)
    for rows in plan:
        assert max_tokens is None or forwarded([sizes[row] for row in rows]) <= max_tokens
        assert max_rows is None or len(rows) <= max_rows


@settings(deadline=None, max_examples=500)
@given(planned())
def test_a_group_stays_whole_wherever_a_micro_batch_can_hold_it(case):
    sizes, max_tokens, max_rows = case
    plan = plan_micro_batches(sizes, max_tokens=max_tokens, max_rows=max_rows)
    parts = parts_of_groups(plan, sizes)
    for group in {size.group for size in sizes}:
        members = [size for size in sizes if size.group == group]
        if forwarded(members) <= (max_tokens or 10**9) and len(members) <= (max_rows or 10**9):
            assert sum(of == group for _, of in parts) == 1, f"group {group} is in several micro-batches"


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 30), st.none() | st.integers(4, 12))
def test_groups_of_equal_size_take_the_fewest_micro_batches(groups, rows, slack, max_rows):
    sizes = [RowSize(group, 5, 3) for _ in range(rows) for group in range(groups)]
    load = 4 + 3 * rows
    together = min((load + slack) // load, (max_rows or 10**9) // rows)
    plan = plan_micro_batches(sizes, max_tokens=load + slack, max_rows=max_rows)
    assert len(plan) == -(-groups // together)


def test_small_groups_fill_what_large_ones_leave():
    sizes = [RowSize(group, 2, load - 1) for group, load in enumerate([3, 5, 7, 5])]
    assert plan_micro_batches(sizes, max_tokens=10) == [[2, 0], [1, 3]]


def test_a_group_beyond_the_limits_is_filled_into_few_parts():
    sizes = [RowSize("g", 11, 5)] * 10  # 10 tokens of prompt, 5 of each response
    assert [len(rows) for rows in plan_micro_batches(sizes, max_tokens=30)] == [4, 4, 2]
    assert [len(rows) for rows in plan_micro_batches(sizes, max_tokens=30, max_rows=3)] == [3, 3, 3, 1]
    assert plan_micro_batches(sizes) == [list(range(10))]


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
    sizes, max_tokens, max_rows = case
    plan = plan_micro_batches(sizes, max_tokens=max_tokens, max_rows=max_rows)
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
