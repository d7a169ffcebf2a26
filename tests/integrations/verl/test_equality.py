"""One update of the shared engine has the gradients and the scores of verl's own FSDP2 engine, in every mode.

Everything in float32: the largest relative difference of a gradient tensor is at most 1e-5. Adapters and weights are
perturbed so that no gradient is zero but for rounding. Ranks of one sequence (Ulysses) are compared with two
data-parallel ranks of verl: its own Ulysses needs flash-attn, and with sdpa it lets no token see another rank's.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("verl")

from tests.integrations.verl.cases import Case, make_rows

BUCKETS = {"pad_to_length": True, "pad_to_length_bucket": 64}
CHUNKED = {"entropy_from_logits_with_chunking": True, "entropy_from_logits_chunk_size": 16}

MODELS = [Case(model=model, lora=lora) for model in ("qwen2", "qwen3", "llama") for lora in (False, True)]
MODES = [
    Case(dynamic=False, micro_batch_size=6),
    Case(dynamic=False, micro_batch_size=3),
    Case(dynamic=False, micro_batch_size=1, rows_per_group=8, groups=2),
    Case(token_budget=48),
    Case(remove_padding=False),
    Case(remove_padding=False, dynamic=False, micro_batch_size=4, lora=True),
    Case(fused=True, tied=True),
    Case(fused=True, tied=True, remove_padding=False, model="qwen2", dynamic=False, micro_batch_size=2),
    Case(fused=True, tied=True, engine=BUCKETS, lora=True),
    Case(checkpointing=True, lora=True, dynamic=False, micro_batch_size=1, rows_per_group=8),
    Case(v0=True),
    Case(v0=True, remove_padding=False, checkpointing=True, model="llama"),
    Case(engine=BUCKETS, dynamic=False, micro_batch_size=2),
    Case(engine=CHUNKED),
    Case(engine={"entropy_checkpointing": True}),
    Case(engine={**CHUNKED, "entropy_checkpointing": True}, checkpointing=True),
    Case(sum_pi_squared=True),
    Case(temperature=1.0),
    Case(options={"backend": "blockwise"}),
    Case(options={"verify": True}, dynamic=False, micro_batch_size=4),
    Case(loss_mode="gspo"),
]
DISTILLATIONS = [
    Case(distillation="and rewards", dynamic=False, micro_batch_size=4),
    Case(distillation="alone", temperature=1.0, v0=True, remove_padding=False),
]
TWO_RANKS = [
    Case(),
    Case(lora=True, checkpointing=True),
    Case(dynamic=False, micro_batch_size=3),
    Case(token_budget=48),
    Case(v0=True, token_budget=48),
    Case(members=[8, 4, 4], dynamic=False, micro_batch_size=1),  # one rank has a whole group, the other one two halves
    Case(options={"verify": True}),
    Case(critic=True, members=[8, 4, 4], dynamic=False, micro_batch_size=1),
]
ONE_SEQUENCE = [
    Case(sequence_parallel=2, **changes)
    for changes in (
        {},
        {"lora": True, "checkpointing": True},
        {"engine": BUCKETS},
        {"fused": True, "tied": True},
        {"v0": True, "token_budget": 24, "model": "llama"},
        {"sum_pi_squared": True, "engine": CHUNKED},
        {"critic": True, "token_budget": 24},
        {"flash": True, "options": {"verify": True}},
    )
]
CRITICS = [
    Case(critic=True, **changes)
    for changes in (
        {},
        {"model": "llama", "checkpointing": True, "dynamic": False, "micro_batch_size": 3},
        {"v0": True, "remove_padding": False, "token_budget": 48},
        {"dynamic": False, "micro_batch_size": 1, "rows_per_group": 8, "groups": 2, "engine": BUCKETS},
        {"actor": {"loss_agg_mode": "seq-mean-token-mean"}, "options": {"verify": True, "share": "prompt"}},
    )
]


def assert_equal(case: Case, result: dict) -> None:
    # In gated delta nets verl's own rows, padded and one by one, differ by 2e-5: gradients by decays are sums that cancel.
    bound = 1e-4 if case.model.startswith("qwen3_5") else 1e-5
    assert "error" not in result, f"{case}: {result['error']}"
    assert result["gradient"] < bound, (str(case), result)
    assert result["smallest_gradient"] > 1e-4, f"{case}: a gradient of zero would be equal to anything"
    assert {"values of rows"} if case.critic else {"log_probs", "entropy"} <= result["scores"].keys()
    assert max(result["scores"].values()) < bound, (str(case), result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "processes"),
    [(MODELS, 1), (MODES, 1), (CRITICS, 1), (TWO_RANKS, 2), (ONE_SEQUENCE, 2)],
    ids=["models", "modes", "critics", "two ranks", "one sequence on two ranks"],
)
def test_gradients_and_scores_equal_those_of_verl(cases, processes, results):
    for case, result in zip(cases, results(cases, processes), strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}, (str(case), result)
        assert result["metrics"]["prefix_grouper/fallbacks"] == 0
        assert result["metrics"]["prefix_grouper/token_ratio"] < 0.7
        if case.options.get("verify"):
            assert any("verified: the gradients of update 0" in line for line in result["said"]), case
        if processes == 1:
            assert result["metrics"]["prefix_grouper/rows_per_group"] == case.rows_per_group, str(case)
        if processes == 1 or case.members:
            # Every prompt once, whatever a micro-batch holds. An update adds a token where another rank forwards a prompt.
            forwarded, tokens = tokens_of_whole_groups(case)
            if in_parts := not case.dynamic and case.micro_batch_size == 1:
                assert any("of a prompt and reuse one forward of it" in line for line in result["said"]), case
            if case.critic and in_parts:
                forwarded += result["forwarded"]["packed"] - len(case.members or range(case.groups))
            added = 3 if case.members else 0
            assert result["metrics"]["prefix_grouper/token_ratio"] == pytest.approx((forwarded + added) / tokens), case
            assert result["forwarded"]["tokens_forwarded"] == forwarded, str(case)  # of the log-probs, which come last


def tokens_of_whole_groups(case: Case) -> tuple[int, int]:
    """Tokens that an update forwards where each prompt is forwarded once, and those of its rows.

    A critic has a value at the last token of a row, too, so its prompts are forwarded whole. Each further part of a group
    forwards the last token of the prompt again.
    """
    rows = make_rows(case)
    prompts = {row["uid"]: len(row["prompt"]) - 1 + case.critic for row in rows}
    responses = sum(len(row["response"]) for row in rows)
    return sum(prompts.values()) + responses, sum(len(row["prompt"]) for row in rows) + responses


@pytest.mark.slow
def test_responses_that_fork_late_and_steps_that_go_on_share_the_tree(results):
    cases = [
        Case(forks=True, options={"share": "tree"}),
        Case(forks=True, options={"share": "tree"}, token_budget=70, v0=True),
        Case(forks=True, options={"share": "prompt"}),
    ]
    found = results(cases, 1)
    for case, result in zip(cases, found, strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}, (str(case), result)
    tree, planned, prompt = (result["metrics"]["prefix_grouper/token_ratio"] for result in found)
    assert tree < 0.75 * prompt
    assert tree <= planned < prompt, "micro-batches of 70 tokens hold what shares most"


@pytest.mark.slow
def test_top_k_distillation_shares_and_reads_each_rows_own_logits(results):
    for case, result in zip(DISTILLATIONS, results(DISTILLATIONS, 1), strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}
        forwarded, tokens = tokens_of_whole_groups(case)
        assert result["metrics"]["prefix_grouper/token_ratio"] == pytest.approx(forwarded / tokens)


@pytest.mark.slow
def test_a_critic_has_the_value_at_the_last_token_of_each_row_and_shares_trees(results):
    """A loss of one's own may read it. Its rows stay where they are."""
    ends = Case(critic=True, own_loss=True, dynamic=False, micro_batch_size=12)
    tree = Case(critic=True, forks=True, options={"share": "tree"}, token_budget=90)
    for case, result in zip([ends, tree], results([ends, tree], 1), strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}
        assert result["metrics"]["prefix_grouper/token_ratio"] < 0.6
        (line,) = [message for message in result["said"] if "prefix grouper is on" in message]
        assert "the critic's micro-batches (critic." in line


@pytest.mark.slow
def test_what_cannot_be_shared_goes_the_ordinary_way_and_is_counted(results):
    reasons = {
        "each row has its own temperature": Case(temperature=[0.7, 1.0, 1.3]),
        "`prompts` is missing": Case(without_prompts=True),
        "attention dropout is 0.1": Case(dropout=0.1, options={"on_unsupported": "fallback"}),
    }
    for (reason, case), result in zip(reasons.items(), results(list(reasons.values()), 1), strict=True):
        assert "error" not in result, result
        assert [reason in text for text in result["fallbacks"]] == [True]
        assert result["metrics"]["prefix_grouper/fallbacks"] >= 1  # and those of earlier log-prob passes
        assert result["metrics"]["prefix_grouper/token_ratio"] == 1
        if not case.dropout and not case.without_prompts:  # dropout is random, and scores need prompts
            assert_equal(case, result)


@pytest.mark.slow
def test_rows_stay_in_their_micro_batches_where_the_loss_depends_on_them(results):
    """geo_mean averages over a micro-batch: three rows of three groups stand in each, and share nothing."""
    coupled = Case(loss_mode="geo_mean", dynamic=False, micro_batch_size=3)
    together = Case(loss_mode="geo_mean", dynamic=False, micro_batch_size=12)
    split, whole = results([coupled, together], 1)
    assert_equal(coupled, split)
    assert_equal(together, whole)
    assert split["metrics"]["prefix_grouper/rows_per_group"] == 1
    assert whole["metrics"]["prefix_grouper/rows_per_group"] == 4
    (line,) = [message for message in split["said"] if "prefix grouper is on" in message]
    assert "hold up to 3 of the 4 rows of a prompt, rows stay where verl puts them (regroup=auto)" in line
    assert "; limited: the policy loss geo_mean may depend" in line


@pytest.mark.slow
def test_a_group_larger_than_the_budget_is_split_and_exact(results):
    case = Case(token_budget=40, rows_per_group=8)
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert result["metrics"]["prefix_grouper/rows_per_group"] == 8
    assert result["metrics"]["prefix_grouper/fallbacks"] == 0
    (line,) = [message for message in result["said"] if "prefix grouper is on" in message]
    assert "of the 8 rows of a prompt and reuse one forward of it, rows are regrouped" in line
    assert "limited" not in line


@pytest.mark.slow
def test_an_unsupported_model_stops_before_training_and_says_what_to_do(results):
    settings, patched = results([Case(dropout=0.1), Case(wrong_positions=True)], 1)
    assert settings["error"].startswith("UnsupportedModelError: attention dropout is 0.1")
    assert "packed rows of FSDPQwen3ForCausalLM are not its rows" in patched["error"]
    for result in (settings, patched):
        assert "on_unsupported=fallback" in result["error"]


@pytest.mark.slow
def test_a_verification_that_finds_a_difference_names_the_layer(results):
    """In a model whose positions are wrong in packed rows alone, which no self-check has looked at."""
    for padding in (True, False):
        case = Case(wrong_positions=True, remove_padding=padding, options={"verify": "first", "self_check": False})
        (result,) = results([case], 1)
        assert re.search(
            r"the gradients of the shared step differ from the ordinary ones by \S+, .*In a forward of one micro-batch it "
            r"starts in decoder layer 1 of 2 \(model\.layers\.0\), whose outputs differ by",
            result["error"],
        ), result


@pytest.mark.slow
def test_a_verification_leaves_the_random_state_and_the_metrics_as_they_are(results):
    case = Case(lora=True, checkpointing=True, dynamic=False, micro_batch_size=3)
    plain, verified = results([case, replace(case, options={"verify": "1"})], 1)
    assert any("verified: the gradients of update 0" in line for line in verified["said"])
    assert verified["random_state"] == plain["random_state"]
    assert verified["metrics"] == plain["metrics"] and verified["gradient"] == plain["gradient"]
