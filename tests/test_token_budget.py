"""As many micro-batches go into one forward as fit into the tokens of one of them, padded; prompts that do not fit stay open."""

from __future__ import annotations

from prefix_grouper_plugins.token_budget import (
    Forward,
    RowTokens,
    forwarded_tokens,
    next_forward,
    num_that_fit,
    plan_forwards,
)


def batches(*groups):
    """One row in each: the prompt's name, its tokens and those of the completion."""
    return [[RowTokens(*row)] for row in groups]


def test_rows_of_a_prompt_count_it_once():
    rows = batches(*[("a", 9, 3)] * 4)
    assert [num_that_fit(rows, budget) for budget in (12, 14, 15, 18, 20, 21, 99)] == [1, 1, 2, 3, 3, 4, 4]


def test_the_first_micro_batch_runs_whatever_it_holds():
    assert num_that_fit(batches(("a", 9, 3), ("a", 9, 3)), 5) == 1


def test_a_prompt_that_is_open_counts_as_held():
    rows = batches(("a", 9, 3), ("a", 9, 3), ("b", 9, 3))
    assert num_that_fit(rows, 15, held=9, opened={"a"}) == 2
    assert num_that_fit(rows, 27, held=9, opened={"a"}) == 3
    assert num_that_fit(rows, 15, held=10, opened={"a"}) == 1


def test_rows_without_a_completion_cost_nothing():
    rows = batches(("a", 9, 3), (None, 9, 0), (None, 9, 0), ("a", 9, 3))
    assert num_that_fit(rows, 12) == 3


def test_what_completions_have_in_common_counts_once():
    first, second = (("turn", 5),), (("turn", 5), ("answer", 4))
    rows = [[RowTokens("a", 9, 12, levels)] for levels in (first, second, second, ())]
    counted = [9 + 12, 12 - 5, 12 - 9, 12]
    totals = [sum(counted[: n + 1]) for n in range(4)]
    assert [num_that_fit(rows, total) for total in totals] == [1, 2, 3, 4]
    assert [num_that_fit(rows, total - 1) for total in totals] == [1, 1, 2, 3]


def test_what_completions_have_in_common_is_repeated_by_each_forward():
    turn = (("turn", 5),)
    rows = [[RowTokens("a", 9, 12, turn)] for _ in range(4)]
    assert forwarded_tokens(rows, 99, 4) == (9 + 4 * 12 - 3 * 5, 9 + 4 * 12 - 3 * 5), "one forward"
    assert forwarded_tokens(rows, 9 + 12 + 7, 4) == (9 + 4 * 12 - 2 * 5, 9 + 4 * 12 - 3 * 5), "two of two rows"
    assert forwarded_tokens(rows, 9 + 12, 4) == (9 + 4 * 12, 9 + 4 * 12 - 3 * 5)
    assert forwarded_tokens(rows, 99, 4, max_scored=2 * 12) == (9 + 4 * 12 - 2 * 5, 9 + 4 * 12 - 3 * 5), (
        "by their logits"
    )


# ------------------------------------------------------------------------------------------------------------ the plan

P, R, G = 10, 5, 4


def micro_batches(rows, groups=1):
    """Of ``rows`` rows each, the rows of each group side by side."""
    all_rows = [RowTokens.of(group, P, R) for group in range(groups) for _ in range(G)]
    return [all_rows[start : start + rows] for start in range(0, len(all_rows), rows)]


def plan(rows, groups=1):
    return list(plan_forwards(micro_batches(rows, groups), rows * (P + R), G))


def test_a_group_that_fits_into_a_padded_micro_batch_is_one_forward():
    assert plan(4) == [Forward(range(1), {}, 0)]
    assert plan(2) == [Forward(range(2), {}, 0)], "9 + 4 x 5 tokens are no more than 2 x 15"
    assert plan(2, groups=2) == [Forward(range(2), {}, 0), Forward(range(2, 4), {}, 0)]


def test_a_prompt_whose_rows_do_not_fit_is_forwarded_with_the_first_and_held_until_the_last():
    """9 + 2 x 5 tokens are more than 15."""
    first, *others = plan(1)
    assert first == Forward(range(1), {0: True}, 0)
    assert others == [Forward(range(i, i + 1), {0: False}, P - 1) for i in (1, 2, 3)]


def test_a_micro_batch_with_the_ends_of_two_groups_closes_one_prompt_and_opens_the_next():
    plan_of_3 = list(plan_forwards(micro_batches(3, groups=3), 3 * (P + R) - 17, G))
    assert [(forward.micro_batches, forward.shared, forward.held) for forward in plan_of_3] == [
        (range(1), {0: True}, 0),
        (range(1, 2), {0: False, 1: True}, P - 1),
        (range(2, 3), {1: False, 2: True}, P - 1),
        (range(3, 4), {2: False}, P - 1),
    ]


def test_prompts_do_not_stay_open_where_they_may_not():
    assert next_forward(micro_batches(1), P + R, G) == (1, [0])
    assert next_forward(micro_batches(1), P + R, G, stays_open=False) == (1, [])


def test_kept_logits_are_a_limit_of_their_own():
    assert next_forward(micro_batches(2), 2 * (P + R), G) == (2, [])
    assert next_forward(micro_batches(2), 2 * (P + R), G, max_scored=4 * R - 1) == (1, [0])


def test_a_forward_has_no_more_rows_than_a_group():
    assert next_forward(micro_batches(2, groups=2), 1000, G) == (2, [])


def test_a_prompt_of_one_token_and_a_row_without_a_completion_share_nothing():
    rows = [[RowTokens.of("a", 1, R)], [RowTokens.of("a", 1, R)], [RowTokens.of("a", P, 0)], [RowTokens.of("a", P, 0)]]
    assert not any(forward.shared for forward in plan_forwards(rows, 1, G))
