"""Kinds of RoPE: those whose angles depend on the longest row are exact below a length, and refused from there on."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

from prefix_grouper_plugins import PrefixLayout, check_support, disable_prefix_grouper, enable_prefix_grouper
from prefix_grouper_plugins import prefix_grouped_logps as grouped_logps
from prefix_grouper_plugins.modeling import packed_inputs, row_limit
from tests import tiny
from tests.modeling.comparing import LAYOUT, ROWS, assert_packed_equals_single_rows, exact, packed, single_rows

LONGEST = max(map(len, ROWS))
FACTORS = {"short_factor": [1.0, 1.3, 1.6, 2.0], "long_factor": [2.0, 3.0, 4.0, 6.0]}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "dynamic": {"factor": 2.0},
    "longrope": FACTORS,
}
LONGEST_ROW_COUNTS = ("dynamic", "longrope")


def build(kind: str, model_type: str = "llama", limit: int = 64) -> Any:
    """``limit`` is the length that the model was trained for; it matters for the last two kinds only."""
    rope = {"rope_type": kind, "rope_theta": 1e2, **KINDS[kind]}
    changes: dict[str, Any] = {}
    if kind == "dynamic":
        changes["max_position_embeddings"] = limit
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": limit, "factor": 4.0}
        if model_type == "phi3":
            changes["original_max_position_embeddings"] = limit
    return exact(model_type, rope_parameters=rope, **changes)


# phi3 takes no other kind
@pytest.mark.parametrize(
    ("kind", "model_type"), [*((k, m) for k in KINDS for m in ("llama", "qwen2")), ("longrope", "phi3")]
)
def test_packed_gradients_equal_those_of_single_rows(kind, model_type):
    """All rows are longer than what yarn and llama3 were trained for, and shorter than dynamic and longrope were."""
    model = build(kind, model_type)
    report = check_support(model)
    assert report.supported
    assert [note[:9] for note in report.notes] == (["rope_type"] if kind in LONGEST_ROW_COUNTS else [])
    assert_packed_equals_single_rows(enable_prefix_grouper(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_changes_the_logits(kind):
    """Else the comparison above would say nothing about it."""
    plain = exact("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e2})
    changed = build(kind, limit=8)
    assert max((a - b).abs().max() for a, b in zip(single_rows(plain), single_rows(changed), strict=True)) > 1e-3


@pytest.mark.parametrize("kind", LONGEST_ROW_COUNTS)
def test_below_the_limit_packed_equals_single_rows_and_from_there_on_it_is_refused(kind):
    assert_packed_equals_single_rows(enable_prefix_grouper(build(kind, limit=LONGEST + 1)))
    model = enable_prefix_grouper(build(kind, limit=LONGEST))
    message = f"a row reaches {LONGEST} tokens, and from {LONGEST} on rope_type '{kind}' changes the angles of all rows of a batch"
    with pytest.raises(ValueError, match=message):
        packed(model)


@pytest.mark.parametrize("kind", LONGEST_ROW_COUNTS)
def test_beyond_the_limit_an_ordinary_batch_differs_from_its_rows(kind):
    """The reason that the refusal gives, seen without any packing: the shorter row turns with the longer one."""
    model = build(kind, limit=10)
    long, short = torch.arange(3, 23), torch.arange(3, 10)
    alone = model(input_ids=short[None]).logits[0]
    beside = torch.stack([long, torch.cat([short, short.new_zeros(13)])])
    together = model(input_ids=beside).logits[1, : len(short)]
    assert (together - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kind", LONGEST_ROW_COUNTS)
def test_positions_that_are_given_count_and_not_the_length_of_the_packed_row(kind):
    limit = LONGEST + 8
    assert LAYOUT.num_tokens > limit
    model = enable_prefix_grouper(build(kind, limit=limit))
    inputs = packed_inputs(LAYOUT, LAYOUT.pack(ROWS), LAYOUT.position_ids + 7)
    model(**inputs)
    with pytest.raises(ValueError, match=f"a row reaches {limit} tokens"):
        model(**packed_inputs(LAYOUT, LAYOUT.pack(ROWS), LAYOUT.position_ids + 8))


@pytest.mark.parametrize("kind", LONGEST_ROW_COUNTS)
def test_after_a_long_ordinary_forward_packed_rows_are_still_single_rows(kind):
    """`dynamic` keeps the angles of the longest row it has seen until a short one comes, or for good (5.10.4)."""
    model = enable_prefix_grouper(build(kind, limit=LONGEST + 1))
    model(input_ids=torch.arange(3, 23).repeat(2)[None])
    after = packed(model).detach()
    assert_packed_equals_single_rows(model)
    assert torch.equal(packed(model), after)


@pytest.mark.parametrize("kind", LONGEST_ROW_COUNTS)
def test_ordinary_forwards_are_not_limited_and_disable_takes_the_check_away(kind):
    model = build(kind, limit=8)
    hooks = {name: dict(m._forward_pre_hooks) for name, m in model.named_modules()}
    before = [row.detach() for row in single_rows(model)]
    for _ in range(2):
        enable_prefix_grouper(model)
    for row, wanted in zip(single_rows(model), before, strict=True):
        assert torch.equal(row, wanted)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        with pytest.raises(ValueError, match="from 8 on rope_type"):
            packed(each)
        disable_prefix_grouper(each)
        assert {name: dict(m._forward_pre_hooks) for name, m in each.named_modules()} == hooks


def test_scoring_refuses_a_row_that_is_too_long():
    model = enable_prefix_grouper(build("longrope", limit=12))
    ids = torch.randint(3, 24, (2, 8), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 5, dtype=torch.long)
    grouped_logps(model, ids[:, :5], ones, ids[:, 5:], ones[:, :3])
    with pytest.raises(ValueError, match="a row reaches 13 tokens, and from 12 on"):
        grouped_logps(model, ids[:, :5], ones, ids, torch.ones(2, 8, dtype=torch.long))


def test_the_limit_is_that_of_the_kind_of_layers_with_the_lowest():
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e2},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    }
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = exact("gemma3_text", rope_parameters=rope, layer_types=kinds, max_position_embeddings=40)
    assert row_limit(model) == (40, "dynamic")
    assert_packed_equals_single_rows(enable_prefix_grouper(model), 1e-6)  # its norms compute in float32
    assert row_limit(tiny.model()) is None


def test_positions_of_padding_count_as_they_do_in_the_model():
    model = enable_prefix_grouper(build("longrope", limit=LONGEST + 1))
    for padding, refused in ((4, False), (LONGEST, True)):
        layout = PrefixLayout.from_rows(ROWS).pad_to(LAYOUT.num_tokens + padding)
        ids = torch.cat([LAYOUT.pack(ROWS), torch.zeros(padding, dtype=torch.long)])
        with pytest.raises(ValueError, match="from 17 on") if refused else contextlib.nullcontext():
            logits = model(**packed_inputs(layout, ids)).logits[0, : LAYOUT.num_tokens]
    torch.testing.assert_close(logits, packed(model), rtol=1e-10, atol=1e-10)
