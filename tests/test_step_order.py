"""Groups come together on one rank, what is forwarded is balanced, and every optimizer step keeps its rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens, rows_by_group
from prefix_grouper_plugins.step_order import forwarded_share, regrouped_order


def rows(groups: int, members: int, seed: int = 0) -> list[RowSize]:
    """Rows of equal groups, shuffled."""
    random = np.random.default_rng(seed)
    prompts = random.integers(5, 400, groups)
    sizes = [RowSize(g, int(prompts[g]), int(random.integers(1, 90))) for g in range(groups) for _ in range(members)]
    return [sizes[i] for i in random.permutation(len(sizes))]


def step_of(place: int, count: int, ranks: int, steps: int) -> int:
    """The optimizer step that sees the row at ``place``: verl deals consecutive shares to ranks, and cuts each."""
    share = count // (ranks * steps)
    return place // share % steps


def homes(order: list[int], sizes: list[RowSize], ranks: int, steps: int = 1) -> dict:
    """(rank, step) of each group's rows."""
    found: dict = {}
    for place, row in enumerate(order):
        home = (place // (len(order) // ranks), step_of(place, len(order), ranks, steps))
        found.setdefault(sizes[row].group, set()).add(home)
    return found


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.sampled_from([1, 2, 4]),
    steps=st.sampled_from([1, 2, 3]),
    members=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10**6),
)
def test_every_optimizer_step_sees_the_same_rows_as_before(ranks, steps, members, seed):
    sizes = rows(12, members, seed)
    order = regrouped_order(sizes, ranks, steps)
    assert sorted(order) == list(range(len(sizes)))
    for place, row in enumerate(order):
        assert step_of(place, len(sizes), ranks, steps) == step_of(row, len(sizes), ranks, steps)


@settings(deadline=None, max_examples=60)
@given(ranks=st.sampled_from([1, 2, 4]), members=st.sampled_from([2, 4, 8]), seed=st.integers(0, 10**6))
def test_with_one_step_every_group_is_whole_on_one_rank(ranks, members, seed):
    sizes = rows(12, members, seed)
    assert all(len(found) == 1 for found in homes(regrouped_order(sizes, ranks, 1), sizes, ranks).values())


@settings(deadline=None, max_examples=60)
@given(steps=st.sampled_from([2, 3]), ranks=st.sampled_from([1, 2]), seed=st.integers(0, 10**6))
def test_across_steps_every_group_is_whole_in_one_step_and_on_one_rank(steps, ranks, seed):
    sizes = rows(12, 4, seed)
    order = regrouped_order(sizes, ranks, steps, across_steps=True)
    assert sorted(order) == list(range(len(sizes)))
    assert all(len(found) == 1 for found in homes(order, sizes, ranks, steps).values())


def test_rows_of_a_group_lie_side_by_side():
    sizes = rows(6, 4)
    order = [sizes[row].group for row in regrouped_order(sizes, 2, 1)]
    assert len([1 for a, b in pairwise(order) if a != b]) == 5


def test_what_is_forwarded_is_balanced_over_the_ranks():
    sizes = rows(64, 8, seed=3)
    order = regrouped_order(sizes, 4, 1)
    loads = [packed_tokens(sizes[i] for i in share) for share in np.array(order).reshape(4, -1)]
    assert max(loads) < 1.05 * min(loads)


def test_uneven_groups_are_split_no_more_than_equal_shares_need():
    sizes = [RowSize("big", 10, 5)] * 5 + [RowSize("small", 10, 5)] * 3
    found = homes(regrouped_order(sizes, 2, 1), sizes, 2)
    assert len(found["big"]) == 2 and len(found["small"]) == 1


def test_rows_that_cannot_be_shared_out_evenly_are_refused():
    with pytest.raises(ValueError, match="10 rows cannot be shared out to 4 ranks in 1 steps evenly"):
        regrouped_order([RowSize(0, 5, 5)] * 10, 4, 1)


def test_rows_of_a_step_stay_in_verls_order_but_for_their_groups():
    """A worker that cuts its rows in another way than we know finds no heavy groups first."""
    sizes = rows(12, 4)
    order = regrouped_order(sizes, 2, 1)
    for share in np.array(order).reshape(2, -1).tolist():
        firsts = [group[0] for group in rows_by_group(sizes, share)]
        assert firsts == sorted(firsts)


def test_rows_that_stood_last_on_each_rank_stay_in_the_last_step():
    """verl's padding rows: in the first step they would take the place of rows that are trained on."""
    padding = RowSize("padding", 127, 1)
    share = [RowSize(f"{rank}{i // 2}", 50, 5) for rank in range(2) for i in range(14)]
    sizes = [*share[:14], padding, padding, *share[14:], padding, padding]
    order = regrouped_order(sizes, 2, 4, across_steps=True)
    steps = {step_of(place, 32, 2, 4) for place, row in enumerate(order) if sizes[row] == padding}
    assert steps == {3}


def test_the_share_that_is_forwarded_counts_each_prompt_once_for_each_rank_and_step():
    sizes = [RowSize("a", 11, 5), RowSize("b", 21, 5)] * 2  # a b | a b
    assert forwarded_share([0, 1, 2, 3], sizes, 2, 1) == (2 * (10 + 20) + 4 * 5) / (2 * (11 + 21) + 4 * 5)
    assert forwarded_share([0, 2, 1, 3], sizes, 2, 1) == (10 + 20 + 4 * 5) / (2 * (11 + 21) + 4 * 5)
    assert forwarded_share([0, 2, 1, 3], sizes, 2, 2) == forwarded_share([0, 1, 2, 3], sizes, 2, 1)
