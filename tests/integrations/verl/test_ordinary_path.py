"""Micro-batches whose rows have next to nothing in common are left to verl, and counted."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

from tests.integrations.verl.cases import Case
from tests.integrations.verl.test_equality import assert_equal

REMARK = (
    "forwards of the first update took the ordinary path, which is no fallback: packing their rows would have saved"
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_an_update_that_shares_nothing_is_verls(results, size):
    case = Case(rows_per_group=1, prompt_tokens=40, dynamic=False, micro_batch_size=size)
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert result["gradient"] < 1e-6  # rows and micro-batches are added up in another order
    counts = result["forwarded"]
    assert (counts["ordinary"], counts["packed"], counts["fallbacks"]) == (3 // size, 0, 0)
    assert counts["tokens_forwarded"] == counts["row_tokens"] > 0
    assert result["metrics"]["prefix_grouper/token_ratio"] == 1
    assert any(f"{3 // size} of {3 // size} {REMARK}" in line for line in result["said"]), result["said"]


@pytest.mark.slow
def test_padding_that_packing_saves_is_saved_without_groups(results):
    """Rows of 9 to 30 tokens, which verl pads where it does not remove padding."""
    case = Case(rows_per_group=1, dynamic=False, micro_batch_size=3, remove_padding=False)
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert (result["forwarded"]["ordinary"], result["forwarded"]["packed"]) == (0, 1)


@pytest.mark.slow
def test_a_verification_packs_what_training_does_not(results):
    case = Case(rows_per_group=1, prompt_tokens=40, dynamic=False, micro_batch_size=3, options={"verify": "first"})
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert result["forwarded"]["ordinary"] == 1
    verified = [line for line in result["said"] if "verified: the gradients of update 0" in line]
    assert verified and "differ by 0.0e+00" not in verified[0], "equal to the last bit: it compared nothing"


@pytest.mark.slow
def test_two_ranks_of_which_one_packs_and_the_other_does_not(results):
    case = Case(members=[1, 1, 1, 1, 4], dynamic=False, micro_batch_size=4)
    (result,) = results([case], 2)
    assert_equal(case, result)
    counts = result["forwarded"]
    assert (counts["ordinary"], counts["packed"], counts["fallbacks"]) == (1, 1, 0)
