"""Rows with images: gradients and scores are those of verl's own engine, and the vision tower sees each image once.

As in test_equality.py. verl's own attention of Qwen2-VL and Qwen2.5-VL needs flash-attn; the stock engine runs it with a
stand-in that computes the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import torch
import verl.workers.engine.fsdp.transformer_impl  # noqa: F401  first, as in a run: it registers our engine
from tensordict import TensorDict

from prefix_grouper_plugins.integrations.verl import images, model_patches
from prefix_grouper_plugins.integrations.verl.micro_batch import row_sizes
from tests.integrations.verl.engines import Case, make_batch, make_rows
from tests.integrations.verl.test_equality import BUCKETS, assert_equal, results
from tests.integrations.verl.vision import IMAGE, patched_classes

COMPARED = [
    Case(model="qwen2_vl", images="one", lora=True),
    Case(model="qwen2_vl", images="video", remove_padding=False),
    Case(model="qwen2_5_vl", images="two", token_budget=70),
    Case(model="qwen2_5_vl", images="some", dynamic=False, micro_batch_size=4),
    Case(model="qwen2_5_vl", images="one", v0=True, fused=True, tied=True),
    Case(model="qwen3_vl", images="two", lora=True, checkpointing=True),
    Case(model="qwen3_vl", images="some", engine=BUCKETS),
    Case(model="qwen3_vl", images="video", options={"verify": True}),
    Case(model="qwen3_vl", images="even"),
]
TWO_RANKS = [
    Case(model="qwen2_5_vl", images="some"),
    Case(model="qwen2_5_vl", images="one", sequence_parallel=2, lora=True),
    Case(model="qwen3_vl", images="some", sequence_parallel=2),
]
# Patches that the vision tower gets in each of its calls. The pictures of the three groups have 4 x 4, 4 x 6 and 4 x 8.
PATCHES = [
    (Case(model="qwen2_vl", images="one", token_budget=70), [16, 24, 32]),  # a micro-batch for each group
    (Case(model="qwen2_5_vl", images="one"), [16 + 24 + 32]),
    (Case(model="qwen3_vl", images="two"), [16 + 24 + 32 + 3 * 24]),
]
ROWS_PER_GROUP = [
    (Case(model="qwen3_vl", images="twins"), 4),  # equal tokens and uids, other pictures
    (Case(model="qwen2_5_vl", images="response"), 4 / 3),  # two rows of each group stay alone, two share
    (Case(model="qwen3_vl", images="end"), 1),  # what repeats the last prompt token would repeat a placeholder
]
FALLBACKS = [
    (Case(model="qwen2_5_vl", images="one", temperature=[0.7, 1.0]), "each row has a temperature of its own"),
    (Case(model="qwen3_vl", images="unknown"), "`pixel_mask` among the multimodal inputs is not known here"),
    (Case(model="qwen3_vl", images="shifted"), "rows that share a prompt number its tokens differently"),
]


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """Results of the cases of one process, which start together."""
    given = [*COMPARED, *(case for case, _ in PATCHES + ROWS_PER_GROUP + FALLBACKS)]
    found = results(given, 1, tmp_path_factory.mktemp("images"))
    by_case = {str(case): result for case, result in zip(given, found, strict=True)}
    return lambda case: by_case[str(case)]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_gradients_and_scores_with_images_equal_those_of_verl(case, result_of):
    result = result_of(case)
    assert_equal(case, result)
    assert result["fallbacks"] == {}
    assert result["metrics"]["prefix_grouper/token_ratio"] < 0.5
    assert result["metrics"]["prefix_grouper/rows_per_group"] == case.rows_per_group


@pytest.mark.slow
def test_they_do_on_two_ranks_too_data_parallel_or_of_one_sequence(tmp_path):
    for case, result in zip(TWO_RANKS, results(TWO_RANKS, 2, tmp_path), strict=True):
        assert_equal(case, result)
        assert result["fallbacks"] == {}, (str(case), result)
        assert result["metrics"]["prefix_grouper/token_ratio"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("case", "patches"), PATCHES, ids=str)
def test_the_vision_tower_sees_each_image_once(case, patches, result_of):
    result = result_of(case)
    assert_equal(case, result)
    assert sorted(result["patches"]) == patches


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rows"), ROWS_PER_GROUP, ids=str)
def test_rows_share_only_what_shows_the_same(case, rows, result_of):
    result = result_of(case)
    assert_equal(case, result)
    assert result["metrics"]["prefix_grouper/rows_per_group"] == pytest.approx(rows)
    assert result["metrics"]["prefix_grouper/fallbacks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("case", "reason"), FALLBACKS, ids=str)
def test_what_cannot_be_shared_takes_verls_own_path_and_is_counted(case, reason, result_of):
    result = result_of(case)
    assert_equal(case, result)
    assert list(result["fallbacks"]) == [reason]
    assert result["metrics"]["prefix_grouper/token_ratio"] == 1


# ------------------------------------------------------------------------------------------------------ without engines


def batch(what: str, **changes) -> TensorDict:
    case = Case(model="qwen3_vl", images=what, **changes)
    rows = make_rows(case)
    return make_batch(case, rows, len(rows))


def test_planning_tells_groups_by_their_images():
    groups = [size.group for size in row_sizes(batch("twins"), {IMAGE})]
    assert len(set(groups)) == 3
    assert groups[0] == groups[3] != groups[1]  # rows come in turns, one of each group


def test_a_row_whose_image_came_with_a_tool_is_planned_alone():
    groups = [size.group for size in row_sizes(batch("response"), {IMAGE})]
    assert sorted(map(groups.count, set(groups))) == [1] * 6 + [2] * 3


@pytest.mark.parametrize(
    ("inputs", "placeholders", "reason"),
    [
        ({"pixel_values": torch.ones(1)}, {7}, None),
        ({}, (), None),
        ({"pixel_values": torch.ones(1)}, (), "the model's config names no token that stands for an image"),
        ({"image_bound": [1]}, {7}, "`image_bound` among the multimodal inputs is not known here"),
        ({"pixel_values": [1]}, {7}, "`pixel_values` among the multimodal inputs is not known here"),
    ],
)
def test_inputs_that_nobody_knows_are_not_shared(inputs, placeholders, reason):
    assert images.reason_not_to_share([{}, inputs], placeholders) == reason


def test_rows_of_text_and_rows_without_entries_have_no_images():
    assert images.row_inputs(TensorDict({"input_ids": torch.ones(2, 3)}, batch_size=[2])) == [{}, {}]
    given = [{"pixel_values": None}, None]
    assert images.row_inputs(SimpleNamespace(get=lambda name, default: given)) == [{}, {}]


def test_positions_of_rows_of_one_length_are_mended_before_verl_selects_rows():
    from verl.utils import tensordict_utils as tu

    from prefix_grouper_plugins.integrations.verl.worker import _mending

    case = Case(model="qwen3_vl", images="even")
    rows = make_rows(case)
    data = make_batch(case, rows, len(rows))
    with pytest.raises(RuntimeError):
        tu.index_select_tensor_dict(data, [5])
    _mending(tu.maybe_fix_3d_position_ids)(data)
    for i, row in enumerate(rows):
        assert torch.equal(tu.index_select_tensor_dict(data, [i])["position_ids"].values(), row["positions"])


def test_other_models_with_images_are_refused_before_training():
    from transformers import AutoConfig, AutoModelForImageTextToText

    from prefix_grouper_plugins import UnsupportedModelError
    from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine, PrefixGrouperOptions

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "model_type": "llama", "vocab_size": 64}
    config = AutoConfig.for_model("llava", text_config=text, vision_config={**sizes, "model_type": "clip_vision_model"})
    engine = object.__new__(PrefixGrouperEngine)
    engine.options, engine.use_ulysses_sp, engine.rank, engine._warned = PrefixGrouperOptions(), False, 0, set()
    with pytest.raises(UnsupportedModelError, match="images of llava have not been compared with verl's own engine"):
        engine._build_fsdp_module(AutoModelForImageTextToText.from_config(config))


def test_attention_that_verl_has_already_replaced_is_refused(monkeypatch):
    """As if another engine of verl had been built first, in the same process."""
    from verl.models.transformers.qwen2_vl import qwen2_vl_attn_forward

    attention = next(cls for cls in patched_classes() if cls.__name__ == "Qwen2_5_VLAttention")
    monkeypatch.setattr(model_patches, "_original", {})
    monkeypatch.setattr(attention, "forward", qwen2_vl_attn_forward)
    layer = attention.__new__(attention)
    torch.nn.Module.__init__(layer)
    (reason,) = model_patches.lost_attention(torch.nn.ModuleList([layer]))
    assert reason.startswith("verl has replaced Qwen2_5_VLAttention.forward for another engine of this process")
