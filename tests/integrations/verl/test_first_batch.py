"""A model class that no test has compared: its first micro-batch runs both ways before the first optimizer step."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

from prefix_grouper_plugins.integrations.verl.planning import Limits, rows_together, rows_within
from prefix_grouper_plugins.micro_batches import RowSize
from tests.integrations.verl.cases import Case
from tests.integrations.verl.test_equality import assert_equal

FALLBACK = {"on_unsupported": "fallback"}
RIGHT = Case(own_class="right", token_budget=48)
SCORED_FIRST = Case(own_class="right", log_probs_first=True)
VERIFIED = Case()
UNCHECKED = Case(own_class="right", options={"self_check": False})
WRONG = {
    "outputs (log-probs)": Case(own_class="outputs", options=FALLBACK),
    "gradients of parameter": Case(own_class="gradients", options=FALLBACK),
}
STOPPED = [Case(own_class="outputs", log_probs_first=first) for first in (False, True)]


# Rank 0 would wait for rank 1, or use what nobody has compared.
ORDINARY_ON_RANK_1 = Case(own_class="right", ordinary_on_rank=1, log_probs_first=True)


def first_batches(result: dict) -> list[str]:
    return [message for message in result["said"] if "the first batch of FSDPOwnQwen3" in message]


def assert_fell_back(what: str, result: dict) -> None:
    assert result["said"][0].startswith("prefix grouper: FSDPOwnQwen3 passed the self-check")
    assert [f"on the first batch {what}" in reason for reason in result["fallbacks"]] == [True]
    assert result["metrics"]["prefix_grouper/token_ratio"] == 1.0, "the update that the comparison comes before"


@pytest.mark.slow
def test_first_batches_in_one_process(results):
    right, scored, verified, unchecked, *wrong = results(
        [RIGHT, SCORED_FIRST, VERIFIED, UNCHECKED, *WRONG.values(), *STOPPED], 1
    )
    for case, result in ((RIGHT, right), (SCORED_FIRST, scored)):
        assert_equal(case, result)
        assert result["fallbacks"] == {}
        assert result["metrics"]["prefix_grouper/token_ratio"] < 0.5
    (line,) = [message for message in right["said"] if "prefix grouper is on" in message]
    assert line.endswith(
        "ppo_max_token_len_per_gpu=48) hold up to 4 of the 4 rows of a prompt, rows are regrouped (regroup=auto)"
    )
    (line,) = first_batches(right)
    assert "in log-probs" in line and "in gradients" in line and " s)" in line
    assert ["in gradients" in line for line in first_batches(scored)] == [False, True]
    assert first_batches(verified) == []
    assert unchecked["error"].startswith("UnsupportedModelError: "), "without any check nobody knows"
    for what, result in zip(WRONG, wrong, strict=False):
        assert_fell_back(what, result)
    for result in wrong[len(WRONG) :]:
        assert "on the first batch outputs (log-probs) differ" in result["error"]
        assert "on_unsupported=fallback" in result["error"]


@pytest.mark.slow
def test_first_batches_on_two_ranks(results):
    right, ordinary, *wrong = results([RIGHT, ORDINARY_ON_RANK_1, *WRONG.values()], 2)
    assert_equal(RIGHT, right)
    assert len(first_batches(right)) == 1
    assert_equal(ORDINARY_ON_RANK_1, ordinary)
    assert ["in gradients" in line for line in first_batches(ordinary)] == [False, True]
    for what, result in zip(WRONG, wrong, strict=True):
        assert_fell_back(what, result)


def test_rows_are_compared_within_the_memory_that_ordinary_rows_take():
    rows, lengths = [3, 1, 0, 2], [10, 20, 30, 40]
    assert rows_within(rows, lengths, Limits("rows", 1000, rows=3)) == [3, 1, 0]
    assert rows_within(rows, lengths, Limits("tokens", 1000)) == rows
    assert rows_within(rows, lengths, Limits("tokens", 70)) == [3, 1, 0]
    assert rows_within(rows, lengths, Limits("tokens", 5)) == [3, 1], "one row shares with nothing"


def test_how_many_rows_of_a_group_stand_together():
    sizes = [RowSize("a", 20, 11), RowSize("a", 20, 31), RowSize("b", 20, 1), RowSize("a", 20, 21)]
    assert rows_together(sizes, Limits("tokens", 1000)) == (3, 3)
    assert rows_together(sizes, Limits("tokens", 51)) == (2, 3), "19 of the prompt, 11 and 21 of responses"
    assert rows_together(sizes, Limits("rows", 50, rows=2)) == (1, 3)
