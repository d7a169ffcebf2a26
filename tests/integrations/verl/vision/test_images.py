"""Rows with images: gradients and scores are those of verl's own engine, and the vision tower sees each image once.

As in test_equality.py. verl's own attention of Qwen2-VL and Qwen2.5-VL needs flash-attn; the stock engine runs it with a
stand-in that computes the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import numpy as np
import torch
import transformers
import verl.workers.engine.fsdp.transformer_impl  # noqa: F401  first, as in a run: it registers our engine
from tensordict import TensorDict
from verl_on_cpu.tiny import make_tokenizer

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine, PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.engine import gate_of
from prefix_grouper_plugins.integrations.verl.micro_batch import PackedMicroBatch, row_sizes
from prefix_grouper_plugins.integrations.verl.vision import images, model_patches
from tests.integrations.verl.cases import Case, make_batch, make_rows
from tests.integrations.verl.test_equality import BUCKETS, assert_equal
from tests.integrations.verl.vision.rows import IMAGE, make_model, patched_classes

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
    Case(model="qwen3_vl_moe", images="two", lora=True, checkpointing=True),
    Case(model="qwen3_5", images="two", remove_padding=False),
    Case(model="qwen3_5_moe", images="some", remove_padding=False, lora=True, checkpointing=True),
]
# verl makes nothing else of these models than of a text model. Some have no gradient of keys' biases; tied embeddings keep
# verl's FSDP2 from wrapping some towers twice, see below.
OTHERS = [
    Case(model="llava", images="one", tied=True, options={"verify": True}),
    Case(model="llava", images="some", tied=True, remove_padding=False, lora=True, checkpointing=True),
    Case(model="internvl", images="one", token_budget=70),
    Case(model="smolvlm", images="two", v0=True),
    Case(model="gemma3", images="even", tied=True, remove_padding=False),
    Case(model="gemma3", tied=True),  # of text, as verl's agent loop hands over; so of families that are not compared
    Case(model="vipllava", tied=True),
]
# Rows that verl cannot concatenate, or that it mixes up: it gets each in a micro-batch of its own. Here the ordinary path,
# which `verify` compares with, takes them as well.
ONE_BY_ONE = [
    Case(model="gemma3", images="mixed", tied=True, alone=True, options={"verify": True}),
    Case(model="gemma3", images="some", tied=True, alone=True, lora=True, checkpointing=True, engine=BUCKETS),
    Case(model="idefics3", images="mixed", alone=True),
    Case(model="llava_next", images="mixed", tied=True, alone=True),
    Case(model="llava_onevision", images="one", tied=True, alone=True),
    Case(model="qwen3_5", images="one", alone=True, lora=True, token_budget=70),
]
# What verl 0.9.1 does with these by itself; docs/verl.md says so.
STOCK_FAILS = [
    (Case(model="llava", images="one"), "got mixed torch.Tensor and DTensor"),  # a tower's embeddings are wrapped twice
    (Case(model="gemma3", images="one", tied=True), "Failed to concatenate multi-modal input 'token_type_ids'"),
    (Case(model="glm4v", images="one", tied=True), "'BaseModelOutputWithPooling' object has no attribute 'shape'"),
]
STOCK_MIXES_UP = [
    Case(model="gemma3", images="even", tied=True),  # kinds of tokens row by row, tokens end to end
    Case(model="qwen3_5", images="one", lora=True),  # transformers' torch code of gated delta nets ignores cu_seqlens
]
STOCK_LEAVES_OUT = Case(model="llava", images="one", tied=True, fused=True)
TWO_RANKS = [
    Case(model="llava", images="few", tied=True, dynamic=False, micro_batch_size=3),  # one rank would be without any
    Case(model="qwen2_5_vl", images="some"),
    Case(model="qwen2_5_vl", images="one", sequence_parallel=2, lora=True),
    Case(model="qwen3_vl", images="some", sequence_parallel=2),
]
# Patches that the vision tower gets in each of its calls. The pictures of the three groups have 4 x 4, 4 x 6 and 4 x 8.
PATCHES = [
    (Case(model="qwen2_vl", images="one", token_budget=70), [16, 24, 32]),  # a micro-batch for each group
    (Case(model="qwen2_5_vl", images="one"), [16 + 24 + 32]),
    (Case(model="qwen3_vl", images="two"), [16 + 24 + 32 + 3 * 24]),
    (Case(model="internvl", images="one"), [1 + 3 + 3]),  # tiles
]
ROWS_PER_GROUP = [
    (Case(model="qwen3_vl", images="twins"), 4),  # equal tokens and uids, other pictures
    (Case(model="qwen2_5_vl", images="response"), 4 / 3),  # two rows of each group stay alone, two share
    (Case(model="smolvlm", images="twins"), 4),
    (Case(model="gemma3", images="response", tied=True, alone=True), 4 / 3),
    (Case(model="qwen3_vl", images="end"), 1),  # what repeats the last prompt token would repeat a placeholder
]
FALLBACKS = [
    (Case(model="qwen2_5_vl", images="one", temperature=[0.7, 1.0]), "each row has its own temperature"),
    (Case(model="qwen3_vl", images="unknown"), "`pixel_mask` among the multimodal inputs is not known here"),
    (
        Case(model="gemma3", images="even", tied=True, alone=True, temperature=[0.7, 1.0]),  # which verl would mix up
        "each row has its own temperature",
    ),
    (
        Case(model="idefics3", images="mixed", alone=True, temperature=[0.7, 1.0], remove_padding=False),
        "each row has its own temperature",
    ),
    (
        Case(model="vipllava", images="one", tied=True),
        "images of vipllava have not been compared with verl's own engine",
    ),
    (Case(model="qwen3_vl", images="shifted"), "rows that share a prompt number its tokens differently"),
]


@pytest.fixture(scope="module")
def result_of(results):
    """Results of the cases of one process, which start together."""
    given = [
        *COMPARED,
        *OTHERS,
        *ONE_BY_ONE,
        *STOCK_MIXES_UP,
        STOCK_LEAVES_OUT,
        *(case for case, _ in PATCHES + ROWS_PER_GROUP + FALLBACKS + STOCK_FAILS),
    ]
    found = results(given, 1)
    by_case = {str(case): result for case, result in zip(given, found, strict=True)}
    return lambda case: by_case[str(case)]


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPARED + OTHERS + ONE_BY_ONE, ids=str)
def test_gradients_and_scores_with_images_equal_those_of_verl(case, result_of):
    result = result_of(case)
    assert_equal(case, result)
    assert result["fallbacks"] == {}
    assert result["metrics"]["prefix_grouper/token_ratio"] < 0.5
    assert result["metrics"]["prefix_grouper/rows_per_group"] == case.rows_per_group
    assert result["proved"]


@pytest.mark.slow
def test_they_do_on_two_ranks_too_data_parallel_or_of_one_sequence(results):
    for case, result in zip(TWO_RANKS, results(TWO_RANKS, 2), strict=True):
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


@pytest.mark.slow
@pytest.mark.parametrize(("case", "error"), STOCK_FAILS, ids=str)
def test_verl_itself_stops_where_the_documentation_says_so(case, error, result_of):
    assert error in result_of(case)["error"]


@pytest.mark.slow
@pytest.mark.parametrize("case", STOCK_MIXES_UP, ids=str)
def test_verl_itself_mixes_up_rows_that_are_right_here(case, result_of):
    assert result_of(case)["gradient"] > 0.1  # and its rows one by one agree with ours, see ONE_BY_ONE


@pytest.mark.slow
def test_fused_kernels_that_leave_images_out_are_refused(result_of):
    assert "verl's fused kernels leave the images of llava out of the forward" in result_of(STOCK_LEAVES_OUT)["error"]


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


PIXELS = {"pixel_values": torch.ones(1)}
KINDS = torch.zeros(1, 9, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "placeholders", "model", "reason"),
    [
        (PIXELS, {7}, "qwen3_vl", None),
        ({}, (), "qwen3_vl", None),
        ({}, (), "mistral3", None),
        (PIXELS, {7}, "mistral3", "images of mistral3 have not been compared with verl's own engine"),
        (PIXELS, (), "llava", "the model's config names no token that stands for an image"),
        ({"image_bound": [1]}, {7}, "llava", "`image_bound` among the multimodal inputs is not known here"),
        ({"pixel_values": [1]}, {7}, "llava", "`pixel_values` among the multimodal inputs is not known here"),
        ({"token_type_ids": KINDS}, {7}, "gemma3", None),
        (
            PIXELS,
            {7},
            "gemma3",
            "`token_type_ids` is missing, without which the tokens of an image do not see each other",
        ),
        ({"token_type_ids": KINDS[:, 1:]}, {7}, "gemma3", "`token_type_ids` has shape (1, 8) for a row of 9 tokens"),
        (
            {**PIXELS, "token_type_ids": KINDS + 1},
            {7},
            "gemma3",
            "a row ends within an image, whose last token is not forwarded but would be seen",
        ),
    ],
)
def test_inputs_that_nobody_knows_are_not_shared(inputs, placeholders, model, reason):
    assert images.why_not_share([{}, inputs], [5, 9], placeholders, model) == reason


def test_rows_that_do_not_agree_which_shared_tokens_are_images_are_not_shared():
    case = Case(model="gemma3", images="one")
    rows = make_rows(case)
    assert PackedMicroBatch(make_batch(case, rows, len(rows)), {IMAGE}).reason_not_to_share is None
    rows[0]["inputs"]["token_type_ids"][0, 0] = 1
    reason = PackedMicroBatch(make_batch(case, rows, len(rows)), {IMAGE}).reason_not_to_share
    assert reason == "rows that share a prompt do not agree which of its tokens are images"


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


def refusal(kind: str, ulysses: bool = False) -> str:
    """What an engine says that is given a tiny model of the type ``kind``."""
    engine = object.__new__(PrefixGrouperEngine)
    engine.options, engine._model_type, engine.use_ulysses_sp = PrefixGrouperOptions(), kind, ulysses
    engine.gate = gate_of(engine.options, ulysses)
    with pytest.raises(UnsupportedModelError) as error:
        engine._build_fsdp_module(make_model(kind, make_tokenizer(), tied=False))
    return str(error.value)


def test_models_with_another_forward_by_verl_are_refused_before_training(monkeypatch):
    from transformers import Glm4vForConditionalGeneration
    from verl.models.transformers.glm4v import forward_with_normal_backend

    monkeypatch.setattr(Glm4vForConditionalGeneration, "forward", forward_with_normal_backend)
    assert "verl has its own forward for glm4v, which no test has compared with packed rows" in refusal("glm4v")


def test_rows_that_verl_does_not_cut_for_ulysses_are_refused():
    assert "verl does not cut the rows of internvl for Ulysses" in refusal("internvl", ulysses=True)


@pytest.mark.parametrize("name", ["Llava", "LlavaNext", "LlavaOnevision", "Gemma3", "InternVL", "SmolVLM", "Idefics3"])
def test_verl_itself_makes_no_processor_for_the_other_families(name, monkeypatch):
    """So its agent loop hands no images of theirs to any engine; docs/verl.md says so."""
    from verl.utils.tokenizer import hf_processor

    cls = getattr(transformers, f"{name}Processor")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: object.__new__(cls))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda path: None)
    with pytest.warns(UserWarning, match=f"Unsupported processor type: {name}Processor"):
        assert hf_processor("a model") is None


def in_the_agent_loop(processor, shown, text):
    """What verl's agent loop keeps of the images of a conversation."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    tokens = processor(text=[text], images=[shown], return_tensors="pt")["input_ids"]
    loop = SimpleNamespace(
        processor=processor, tokenizer=processor.tokenizer, _get_mm_processor_kwargs=lambda audio: {}
    )
    output = SimpleNamespace(multi_modal_data={"images": [shown]}, mm_processor_kwargs=None)
    return AgentLoopWorker._compute_multi_modal_inputs(loop, output, tokens)


def with_special_tokens(**names):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(names.values())})
    for name, token in names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def test_verls_agent_loop_keeps_images_of_llava_and_strips_the_placeholders_of_gemma_3():
    """Were their processors made, see above."""
    shown = np.zeros((16, 16, 3), dtype=np.uint8)
    llava = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        with_special_tokens(image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    assert list(in_the_agent_loop(llava, shown, "see <image>")) == ["pixel_values"]
    gemma = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 8, "width": 8}),
        with_special_tokens(image_token="<image_soft_token>", boi_token="<boi>", eoi_token="<eoi>"),
        image_seq_length=4,
    )
    with pytest.raises(ValueError, match="Prompt contained 0 image tokens but received 1 images"):
        in_the_agent_loop(gemma, shown, "see <boi>")


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
