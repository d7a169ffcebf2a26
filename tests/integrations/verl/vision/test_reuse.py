"""Parts of a group with images reuse its prompt: verl's gradients and scores, and each image encoded once."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

import torch
from verl_on_cpu.tiny import make_tokenizer

from prefix_grouper_plugins.integrations.verl.reuse import why_not_reuse_rows
from tests.integrations.verl.cases import Case, make_batch, make_rows
from tests.integrations.verl.test_equality import BUCKETS, assert_equal, tokens_of_whole_groups
from tests.integrations.verl.test_reuse import engine_of, why_not_reuse
from tests.integrations.verl.vision.rows import make_model

# A micro-batch has the tokens of the longest row, a group four times as many tokens of responses as that has.
ONE_ROW = {"dynamic": False, "micro_batch_size": 1, "rows_per_group": 8}
EMPTY = 16  # patches of the picture of zeros that verl shows the tower in a forward without images
# With the patches of each group's prompt; verl shows the tower a picture of zeros where there is none, and in each part.
ONE_PROCESS = [
    (Case(model="qwen2_5_vl", images="two", engine=BUCKETS, **ONE_ROW), [40, 48, 56]),
    (Case(model="qwen3_vl", images="some", lora=True, checkpointing=True, **ONE_ROW), [16, EMPTY, 32]),
    (Case(model="qwen2_vl", images="video", remove_padding=False, **ONE_ROW), [32, 48, 64]),
    (Case(model="qwen2_vl", images="one", fused=True, tied=True, v0=True, **ONE_ROW), [16, 24, 32]),
    (Case(model="qwen3_vl_moe", images="twins", options={"verify": True}, **ONE_ROW), [16, 16, 16]),
    (Case(model="qwen3_vl", images="one", token_budget=45, rows_per_group=8), [16, 24, 32]),
]
# One rank has a whole group, the other one two halves, so prompts are not forwarded at the same time.
TWO_RANKS = [
    Case(model="qwen2_5_vl", images="one", members=[8, 4, 4], dynamic=False, micro_batch_size=1),
    Case(
        model="qwen3_vl",
        images="some",
        members=[8, 4, 4],
        lora=True,
        checkpointing=True,
        dynamic=False,
        micro_batch_size=1,
    ),
    Case(model="qwen2_vl", images="video", members=[8, 4, 4], dynamic=False, micro_batch_size=1),
]


@pytest.fixture(scope="module")
def found(results):
    return results([case for case, _ in ONE_PROCESS], 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ONE_PROCESS)), ids=[str(case) for case, _ in ONE_PROCESS])
def test_prompts_with_images_are_reused_with_verls_gradients(number, found):
    (case, patches), result = ONE_PROCESS[number], found[number]
    assert_equal(case, result)
    assert result["fallbacks"] == {} and result["proved"]
    assert result["metrics"]["prefix_grouper/rows_per_group"] == case.rows_per_group
    forwarded, tokens = tokens_with_images(case)
    assert result["metrics"]["prefix_grouper/token_ratio"] == pytest.approx(forwarded / tokens)
    assert result["forwarded"]["tokens_forwarded"] == forwarded, "of the log-probs, which come last"
    if case.options:  # whose comparison runs the tower as well
        assert any("verified: the gradients of update 0" in line for line in result["said"])
    elif not case.dynamic:
        assert sorted(result["patches"]) == sorted([*patches, *[EMPTY] * result["forwarded"]["packed"]])
        assert result["forwarded"]["packed"] >= 2 * len(patches), "each group in parts"
    else:
        assert [count for count in sorted(result["patches"]) if count != EMPTY] == patches[1:]


@pytest.mark.slow
def test_ranks_whose_groups_differ_reuse_prompts_with_images(results):
    for case, result in zip(TWO_RANKS, results(TWO_RANKS, 2), strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}
        forwarded, tokens = tokens_with_images(case)
        ratio = result["metrics"]["prefix_grouper/token_ratio"]
        assert ratio == pytest.approx((forwarded + 3) / tokens), "a token where another rank forwards a prompt"
        assert result["forwarded"]["tokens_forwarded"] == forwarded, str(case)


def tokens_with_images(case: Case) -> tuple[int, int]:
    """:func:`tokens_of_whole_groups`, of groups that may differ by their pictures alone."""
    if case.images != "twins":
        return tokens_of_whole_groups(case)
    rows = make_rows(case)
    prompts = sum(len(row["prompt"]) for row in rows)
    responses = sum(len(row["response"]) for row in rows)
    return (prompts - len(rows)) // case.rows_per_group + responses, prompts + responses


def test_rows_of_equal_prompts_that_number_their_tokens_differently_do_not_reuse_them():
    for images, reason in (("one", None), ("shifted", "rows of equal prompts number their tokens differently")):
        case = Case(model="qwen3_vl", images=images)
        rows = make_rows(case)
        assert why_not_reuse_rows(make_batch(case, rows, len(rows))) == reason


def test_where_verl_runs_the_tower_on_some_ranks_alone_prompts_are_not_reused():
    torch.manual_seed(0)
    reason = why_not_reuse(engine_of(make_model("llava", make_tokenizer(), tied=True)), None, gradients=True)
    assert reason == "verl does not run the vision tower of llava where a micro-batch has no images"
