"""As many micro-batches go into one forward as fit into the tokens of one of them, padded; prompts that do not fit stay open."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from prefix_grouper_plugins.token_budget import (
    Forward,
    Most,
    NextForward,
    RowsOfProcess,
    RowTokens,
    forwarded_tokens,
    matched_forwards,
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
    assert forwarded_tokens(rows, Most(99), 4) == (9 + 4 * 12 - 3 * 5, 9 + 4 * 12 - 3 * 5), "one forward"
    assert forwarded_tokens(rows, Most(9 + 12 + 7), 4) == (9 + 4 * 12 - 2 * 5, 9 + 4 * 12 - 3 * 5), "two of two rows"
    assert forwarded_tokens(rows, Most(9 + 12), 4) == (9 + 4 * 12, 9 + 4 * 12 - 3 * 5)
    assert forwarded_tokens(rows, Most(99, scored=2 * 12), 4) == (9 + 4 * 12 - 2 * 5, 9 + 4 * 12 - 3 * 5), (
        "by their logits"
    )


# ------------------------------------------------------------------------------------------------------------ the plan

P, R, G = 10, 5, 4


def micro_batches(rows, groups=1):
    """Of ``rows`` rows each, the rows of each group side by side."""
    all_rows = [RowTokens.of(group, P, R) for group in range(groups) for _ in range(G)]
    return [all_rows[start : start + rows] for start in range(0, len(all_rows), rows)]


def plan(rows, groups=1):
    return list(plan_forwards(micro_batches(rows, groups), Most(rows * (P + R)), G))


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
    plan_of_3 = list(plan_forwards(micro_batches(3, groups=3), Most(3 * (P + R) - 17), G))
    assert [(forward.micro_batches, forward.shared, forward.held) for forward in plan_of_3] == [
        (range(1), {0: True}, 0),
        (range(1, 2), {0: False, 1: True}, P - 1),
        (range(2, 3), {1: False, 2: True}, P - 1),
        (range(3, 4), {2: False}, P - 1),
    ]


def test_prompts_do_not_stay_open_where_they_may_not():
    assert next_forward(micro_batches(1), Most(P + R), G) == NextForward(1, {0: False})
    assert next_forward(micro_batches(1), Most(P + R), G, stays_open=False) == NextForward(1, {})


def test_kept_logits_are_a_limit_of_their_own():
    assert next_forward(micro_batches(2), Most(2 * (P + R)), G) == NextForward(2, {})
    assert next_forward(micro_batches(2), Most(2 * (P + R), scored=4 * R - 1), G) == NextForward(1, {0: False})


def test_a_forward_has_no_more_rows_than_a_group():
    assert next_forward(micro_batches(2, groups=2), Most(1000), G) == NextForward(2, {})


def test_a_prompt_of_one_token_and_a_row_without_a_completion_share_nothing():
    rows = [[RowTokens.of("a", 1, R)], [RowTokens.of("a", 1, R)], [RowTokens.of("a", P, 0)], [RowTokens.of("a", P, 0)]]
    assert not any(forward.shared for forward in plan_forwards(rows, Most(1), G))


# ------------------------------------------------------------------------------------- prompts whose layers run again


def long_prompt(rows, completion, group=8):
    """A group with a prompt of 1,024 tokens in micro-batches of ``rows`` rows."""
    return [[RowTokens.of("a", 1024, completion)] * rows for _ in range(group // rows)]


def test_layers_of_a_prompt_run_again_where_the_forwards_that_it_saves_cost_more():
    """A quarter of the prompt leaves room for 832 of 1,088 tokens: 8 rows of 64 in one forward, not in 8."""
    most, rows = Most(1024 + 64), long_prompt(1, 64)
    assert next_forward(rows, most, 8) == NextForward(1, {"a": False})
    assert next_forward(rows, most, 8, cost_of_forward=64) == NextForward(8, {"a": True})
    (forward,) = plan_forwards(rows, most, 8, cost_of_forward=64)
    assert forward == Forward(range(8), {"a": True}, 0, frozenset({"a"}))


def test_a_forward_more_of_the_prompt_is_not_worth_a_few_forwards_of_rows():
    """Of 1,023 tokens a third is 341, which is what five forwards and a bit cost."""
    counts = {
        group: len(list(plan_forwards(long_prompt(1, 64, group), Most(1088), 8, cost_of_forward=64)))
        for group in (6, 7)
    }
    assert counts == {6: 6, 7: 1}
    assert next_forward(long_prompt(2, 64), Most(2 * 1088), 8, cost_of_forward=64) == NextForward(4, {}), "they fit"


def test_where_rows_are_long_layers_of_the_prompt_run_once():
    rows = [[RowTokens.of("a", 512, 512)] for _ in range(8)]
    assert next_forward(rows, Most(1024), 8, cost_of_forward=64) == NextForward(1, {"a": False})


def test_a_prompt_whose_layers_run_again_counts_a_quarter_while_it_is_open():
    first, *others = plan_forwards(long_prompt(1, 64, group=64), Most(1088), 64, cost_of_forward=64)
    assert first == Forward(range(13), {"a": True}, 0, frozenset({"a"})), "832 tokens are 13 rows"
    assert [forward.held for forward in others] == [256] * 4
    assert [len(forward.micro_batches) for forward in others] == [13, 13, 13, 12]


def test_the_next_prompt_begins_with_the_last_rows_of_one_whose_layers_run_again():
    rows = [RowTokens.of(name, 1024, 64) for name in "ab" for _ in range(8)]
    micro_batches = [rows[start : start + 1] for start in range(16)]
    plan = list(plan_forwards(micro_batches, Most(1088), 8, cost_of_forward=64))
    assert [(forward.micro_batches, forward.recomputed) for forward in plan] == [
        (range(8), {"a"}),
        (range(8, 16), {"b"}),
    ]


def test_prompts_with_images_do_not_run_again():
    rows = [[row._replace(images=1) for row in batch] for batch in long_prompt(1, 64)]
    assert next_forward(rows, Most(1088), 8, cost_of_forward=64) == NextForward(1, {"a": False})


def test_an_open_prompt_stays_as_it_was_begun():
    rows = long_prompt(1, 64)
    kept = next_forward(rows, Most(1088), 8, opened={"a": 1023}, cost_of_forward=64)
    again = next_forward(rows, Most(1088), 8, opened={"a": 256}, cost_of_forward=64)
    assert (kept, again) == (NextForward(1, {"a": False}), NextForward(8, {"a": False}))


# ------------------------------------------------------------------------------------------------- several processes


def test_one_process_plans_as_if_it_were_alone():
    rows = batches(*[("a", 9, 3)] * 6, *[("b", 7, 3)] * 6)
    for budget in (12, 14, 20, 40):
        alone = list(plan_forwards(rows, Most(budget), 6))
        matched = matched_forwards([RowsOfProcess(rows, Most(budget))], 6)
        assert [forward.micro_batches for forward in matched] == [forward.micro_batches for forward in alone]
        assert [list(forward.shared[0]) for forward in matched] == [list(forward.shared) for forward in alone]
        assert [len(forward.prompts) for forward in matched] == [sum(forward.shared.values()) for forward in alone]


def test_a_forward_takes_what_fits_on_every_process():
    short, long = batches(*[("a", 2, 1)] * 4), batches(*[("b", 9, 3)] * 4)
    assert [x.micro_batches for x in matched_forwards([RowsOfProcess(short, Most(99))], 4)] == [range(4)]
    plan = matched_forwards([RowsOfProcess(short, Most(99)), RowsOfProcess(long, Most(15))], 4)
    assert [forward.micro_batches for forward in plan] == [range(2), range(2, 4)]
    assert [forward.shared for forward in plan] == [[{"a": 1}, {"b": 1}]] * 2
    assert [(list(forward.prompts), forward.num_parts) for forward in plan] == [([1], 1), ([], 1)]


def test_prompts_that_close_at_different_times_are_forwarded_for_each_other():
    """Process 0 has one group of four rows, process 1 two of two: no prompt of one closes with one of the other."""
    first, second = batches(*[("a", 9, 3)] * 4), batches(("b", 9, 3), ("b", 9, 3), ("c", 9, 3), ("c", 9, 3))
    plan = matched_forwards([RowsOfProcess(first, Most(12)), RowsOfProcess(second, Most(12))], 4)
    assert [list(forward.prompts) for forward in plan] == [[1, 3], [], [3], []]
    assert {forward.num_parts for forward in plan} == {1}


def test_a_forward_with_the_ends_of_two_groups_has_a_part_for_each():
    first = [*batches(("a", 9, 3)), [RowTokens("a", 9, 3), RowTokens("b", 9, 3)], *batches(("b", 9, 3))]
    plan = matched_forwards([RowsOfProcess(first, Most(24)), RowsOfProcess(batches(*[("c", 9, 3)] * 3), Most(12))], 2)
    assert [forward.num_parts for forward in plan] == [1, 2, 1]
    assert [list(forward.prompts) for forward in plan] == [[1, 2], [2], []]


def some_rows(source: random.Random, micro_batches: int, rows: int) -> list[list[RowTokens]]:
    """Groups of any size side by side, some of whose rows have no completion."""
    found: list[RowTokens] = []
    while len(found) < micro_batches * rows:
        prompt, tokens = len(found), source.choice([0, 1, 5, 20, 60])
        for _ in range(source.randint(1, 6)):
            found.append(RowTokens.of(prompt, tokens + 1, source.choice([0, 0, 1, 5, 10])))
    return [found[i * rows : (i + 1) * rows] for i in range(micro_batches)]


@pytest.mark.parametrize("seed", range(100))
def test_processes_with_any_rows_make_the_same_forwards(seed):
    source = random.Random(seed)
    micro_batches, rows = source.randint(1, 8), source.randint(1, 4)
    processes = [
        RowsOfProcess(
            some_rows(source, micro_batches, rows), Most(source.randint(1, 200), source.choice([None, 10, 20]))
        )
        for _ in range(source.randint(1, 4))
    ]
    plan = matched_forwards(processes, source.randint(1, 8), stays_open=source.random() < 0.8)
    assert [i for forward in plan for i in forward.micro_batches] == list(range(micro_batches))
    needed = [Counter() for _ in plan]
    for process, own in enumerate(processes):
        taken = [[row for i in forward.micro_batches for row in own.micro_batches[i]] for forward in plan]
        shared = [forward.shared[process] for forward in plan]
        begins = [Counter() for _ in plan]
        for key in {key for keys in shared for key in keys}:
            places = [n for n, of_one in enumerate(taken) if key in {row.prompt for row in of_one}]
            assert len(places) > 1
            assert [n for n, keys in enumerate(shared) if key in keys] == places
            assert {shared[n][key] for n in places} == {places[-1]}
            begins[places[0]][places[-1]] += 1
        needed = [of_all | begun for of_all, begun in zip(needed, begins, strict=True)]
        for rows_of_one, keys, forward in zip(taken, shared, plan, strict=True):
            others = {row.prompt for row in rows_of_one} - {None, *keys}
            assert forward.num_parts >= max(1, len(keys) + bool(others))
            if len(forward.micro_batches) > 1:
                forwarded = [row for row in rows_of_one if row.prompt is not None]
                held = {row.prompt: row.prompt_tokens for row in forwarded}
                assert sum(held.values()) + sum(row.completion_tokens for row in forwarded) <= own.most.tokens
    assert [sorted(of_all.elements()) for of_all in needed] == [list(forward.prompts) for forward in plan]
