"""As many micro-batches go into one forward as fit into the tokens of one of them, padded."""

from __future__ import annotations

from prefix_grouper_plugins.token_budget import RowTokens, num_that_fit


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
