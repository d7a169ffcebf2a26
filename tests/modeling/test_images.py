"""Vision-language models: packed log-probs and gradients, the vision tower's included, are those of single rows."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins import (
    UnsupportedModelError,
    check_support,
    disable_prefix_grouper,
    enable_prefix_grouper,
    prefix_grouped_logps,
)
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling.images import (
    ImageRows,
    check_placeholders,
    first_alike,
    sharing_keys,
    split_images,
    why_not_pack,
)
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MULTIMODAL_TYPES
from tests.modeling import multimodal_families as families


def single_rows(model, model_type, rows):
    """Log-probabilities of each row's response."""
    scores = []
    for row in rows:
        logits = model(**families.model_inputs(model_type, row), use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(-1, row.response[:, None])[:, 0])
    return scores


def grouped(model, model_type, rows):
    """The batch of the rows, and the inputs of its packed forward."""
    blocks, tensors, counts, tiles = families.batch_inputs(model_type, rows)
    made = ImageRows.from_processor(model, *blocks, tensors, counts, tiles)
    batch = GroupedBatch(*blocks, keys=made.keys)
    return batch, made.packed_inputs(batch)


def packed(model, model_type, rows):
    batch, inputs = grouped(model, model_type, rows)
    logits = model(**inputs).logits[0, batch.positions]
    logps = batch.scatter(logits.log_softmax(-1).gather(-1, batch.labels[batch.positions][:, None])[:, 0])
    return [logp[: len(row.response)] for logp, row in zip(logps, rows, strict=True)]


def gradients(model, scores):
    """Of a sum in which every token has a weight of its own."""
    model.zero_grad()
    sum(((i + 1) * torch.arange(1, len(x) + 1) * x).sum() for i, x in enumerate(scores)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, got_gradients, expected, expected_gradients):
    for row, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        scale = wanted.abs().max().clamp(min=1e-6)
        assert (got_gradients[name] - wanted).abs().max() <= 1e-3 * scale, name


TOWERS = ("visual", "vision_tower", "vision_model", "embed_vision", "img_processor")
# Reentrant checkpointing cuts the gradients of keys that later layers take over, in transformers' own rows too.
NOT_REENTRANT = {"gemma3n"}


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_packed_rows_with_images_equal_single_rows(model_type):
    model = families.build(model_type)
    assert check_support(model).supported, check_support(model).reasons
    rows = families.rows(model_type)
    expected = single_rows(model, model_type, rows)
    expected_gradients = gradients(model, expected)
    seen = [x.abs().max() for name, x in expected_gradients.items() if any(tower in name for tower in TOWERS)]
    assert max(seen) > 1e-3, "the vision tower has no part in it"

    enable_prefix_grouper(model)
    for before, after in zip(expected, single_rows(model, model_type, rows), strict=True):
        assert torch.equal(before, after), "an ordinary forward changed"
    for reentrant in (None, False) if model_type in NOT_REENTRANT else (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        scores = packed(model, model_type, rows)
        assert_same(scores, gradients(model, scores), expected, expected_gradients)

    model.eval()
    disable_prefix_grouper(model)
    assert ":" not in str([m.config._attn_implementation for m in model.modules() if hasattr(m, "config")])


@pytest.mark.parametrize(("model_type", "both_ways"), [("gemma4", "vision"), ("gemma4_unified", None)])
def test_images_of_gemma_4_see_themselves_where_the_config_says_so(model_type, both_ways):
    """The other setting than its default, which the test above has."""
    rows = families.rows(model_type)
    default = families.build(model_type)
    model = families.build(model_type, use_bidirectional_attention=both_ways)
    expected = single_rows(model, model_type, rows)
    other = single_rows(default, model_type, rows)
    assert max(float((x - y).detach().abs().max()) for x, y in zip(expected, other, strict=True)) > 1e-2
    expected_gradients = gradients(model, expected)
    enable_prefix_grouper(model)
    scores = packed(model, model_type, rows)
    assert_same(scores, gradients(model, scores), expected, expected_gradients)


def vision_calls(model, run):
    """What the vision tower is called with during ``run``: the leading size of each call's pixels."""
    sizes = []
    tower = next(m for name, m in model.named_modules() if name.endswith(TOWERS))

    def note(module, args, kwargs):
        sizes.append(len(args[0] if args else kwargs["pixel_values"]))

    hook = tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return sizes


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_the_vision_tower_sees_the_images_of_a_group_once(model_type):
    model = enable_prefix_grouper(families.build(model_type), self_check=False)
    rows = families.rows(model_type)
    batch, inputs = grouped(model, model_type, rows)
    assert (batch.num_rows, batch.num_groups) == (8, 4), "equal ids with different images are two groups"
    one_of_each = [rows[i] for i in (0, 1, 2, 3)]  # the first half holds one row of each group
    expected = vision_calls(
        model, lambda: [model(**families.model_inputs(model_type, row)) for row in one_of_each if row.images]
    )
    assert vision_calls(model, lambda: model(**inputs)) == [sum(expected)]


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_log_probs_by_the_public_function_equal_single_rows(model_type):
    model = enable_prefix_grouper(families.build(model_type), self_check=False)
    rows = families.rows(model_type)
    with torch.no_grad():
        expected = single_rows(model, model_type, rows)
    blocks, tensors, counts, tiles = families.batch_inputs(model_type, rows)
    logps, entropy = prefix_grouped_logps(
        model, *blocks, images=tensors, num_images=counts, num_tiles=tiles, compute_entropy=True
    )
    for row, wanted in zip(logps, expected, strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)
        assert not row[len(wanted) :].any()
    assert entropy is not None
    assert (entropy > 0).sum() == sum(map(len, expected))


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_swapped_images_are_noticed(model_type):
    """Without which the comparison above would say nothing about whose images a group sees."""
    model = enable_prefix_grouper(families.build(model_type), self_check=False)
    rows = families.rows(model_type)
    before = packed(model, model_type, rows)[:2]
    assert torch.equal(rows[0].prompt, rows[1].prompt)
    rows[0].images, rows[1].images = rows[1].images, rows[0].images
    after = packed(model, model_type, rows)[:2]
    assert all((x - y).abs().max() > 1e-2 for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["at the end of the prompt", "in the response"])
def test_an_image_that_a_branch_would_repeat_is_not_shared(where):
    model = enable_prefix_grouper(families.build("qwen2_5_vl"))
    rows = [row for row in families.rows("qwen2_5_vl") if len(row.images) == 1]
    for row in rows:
        text = row.prompt[row.prompt != families.IMAGE]
        image = torch.full((row.images[0].tokens,), families.IMAGE)
        if where == "in the response":
            row.prompt, row.response = text, torch.cat([row.response[:1], image, row.response[1:]])
        else:
            row.prompt = torch.cat([text, image])
    blocks, tensors, counts, _ = families.batch_inputs("qwen2_5_vl", rows)
    ids, mask = (torch.cat([blocks[i], blocks[i + 2]], dim=1) for i in (0, 1))
    tensors["mm_token_type_ids"] = ((ids == families.IMAGE) & (mask != 0)).int()
    made = ImageRows.from_processor(model, *blocks, tensors, counts)
    batch = GroupedBatch(*blocks, keys=made.keys)
    assert batch.num_groups == len(rows)
    logits = model(**made.packed_inputs(batch)).logits[0, batch.positions]
    logps = batch.scatter(logits.log_softmax(-1).gather(-1, batch.labels[batch.positions][:, None])[:, 0])
    for row, wanted in zip(logps, single_rows(model, "qwen2_5_vl", rows), strict=True):
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)


def test_rows_show_the_same_if_all_tensors_of_their_images_are_equal():
    pixels, grid = torch.randn(4, 6), torch.tensor([[1, 2, 2]])
    other = pixels.clone()
    other[3, 5] += 1e-6
    shown = [
        {"pixel_values": pixels, "image_grid_thw": grid},
        {"image_grid_thw": grid.clone(), "pixel_values": pixels.clone()},
        {},
        {"pixel_values": other, "image_grid_thw": grid},
        {"pixel_values": pixels, "image_grid_thw": grid.flip(1)},
        {"pixel_values": pixels},
        {"pixel_values": pixels.double(), "image_grid_thw": grid},
        {"pixel_values": pixels, "image_grid_thw": grid},
    ]
    assert first_alike(shown, ["a"] * 7 + ["b"]) == [0, 0, None, 3, 4, 5, 6, 7]


def test_rows_with_images_share_the_whole_prompt_or_nothing():
    image = {"pixel_values": torch.ones(1)}
    rows = [torch.tensor(ids) for ids in ([5, 9, 8, 7], [5, 9, 8, 6], [5, 9, 3, 7], [9, 8, 5, 7])]
    keys = sharing_keys(["u"] * 4, rows, [3] * 4, [image] * 4, {5})
    assert keys[:3] == [("u", 0), ("u", 0), ("u", 2)]
    assert keys[3][1] == 3 and keys[3][0] != "u", "its prompt ends with a placeholder"
    assert len(set(sharing_keys(["u"] * 2, rows[:2], [3] * 2, [image] * 2, ()))) == 2


def test_ordinary_generation_does_not_notice():
    model = families.build("qwen2_5_vl")
    row = families.rows("qwen2_5_vl")[0]
    row.response = row.response[:0]
    inputs = families.model_inputs("qwen2_5_vl", row)
    before = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(before, enable_prefix_grouper(model).generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["pixel_values_videos"], "`pixel_values_videos` belongs to rows with videos, which are not packed"),
        (["input_features"], "`input_features` is an input that packed rows of images do not know"),
        (["pixel_values", "image_grid_thw"], "`mm_token_type_ids` is missing"),
        (["pixel_values", "image_grid_thw", "mm_token_type_ids"], None),
    ],
)
def test_inputs_that_cannot_be_packed_are_refused(names, reason):
    model = enable_prefix_grouper(families.build("qwen2_5_vl"))
    found = why_not_pack(model, names)
    assert found is None if reason is None else found.startswith(reason)
    if reason:
        blocks, *_ = families.batch_inputs("qwen2_5_vl", families.rows("qwen2_5_vl"))
        with pytest.raises(UnsupportedModelError, match=reason):
            prefix_grouped_logps(model, *blocks, images=dict.fromkeys(names, torch.zeros(1)))


def test_tensors_that_cannot_be_told_apart_by_row_are_an_error():
    with pytest.raises(ValueError, match=r"pixel_values has 5 entries for 2 rows of \[1, 1\] images"):
        split_images({"pixel_values": torch.zeros(5, 3, 8, 8)}, [1, 1])


def placeholders_of(model_type, made):
    """The check's verdict on the rows, from their tensors alone."""
    _, tensors, counts, tiles = families.batch_inputs(model_type, made)
    images = split_images({k: v for k, v in tensors.items() if "token_type" not in k}, counts, tiles)
    config = families.configure(model_type).vision_config
    check_placeholders([row.ids for row in made], images, {families.IMAGE}, getattr(config, "spatial_merge_size", None))


def lose_one(row):
    """One placeholder less, as truncation from the left makes it."""
    first = int((row.prompt == families.IMAGE).nonzero()[0])
    row.prompt = row.prompt[first + 1 :]


def sample_one(row):
    """One placeholder more, as a model may sample it."""
    row.response = torch.cat([row.response[:1], torch.tensor([families.IMAGE]), row.response[1:]])


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_placeholders_are_compared_with_the_images_of_each_row(model_type):
    """In total the rows are right: one lost in a group, and one sampled in a single row of another."""
    placeholders_of(model_type, families.rows(model_type))
    cancelled = families.rows(model_type)
    lose_one(cancelled[0])
    sample_one(cancelled[1])
    sampled_by_text = families.rows(model_type)
    sample_one(next(row for row in sampled_by_text if not row.images))
    for made in (cancelled, sampled_by_text):
        with pytest.raises(ValueError, match=r"Image features and image tokens do not match.*suppress_tokens.*5"):
            placeholders_of(model_type, made)


def test_rows_without_any_images_may_hold_placeholders():
    """Images that were dropped: the model reads their placeholders as text."""
    check_placeholders([torch.tensor([families.IMAGE, 9])], [{}], {families.IMAGE}, 2)


def test_a_prompt_that_is_cut_inside_an_image_is_named_before_positions_are_computed():
    model = enable_prefix_grouper(families.build("qwen2_5_vl"))
    made = families.rows("qwen2_5_vl")
    for row in made:
        if row.images:
            lose_one(row)
    with pytest.raises(ValueError, match=r"do not match in row 0, tokens: 3, features: 4\. Either truncation cut"):
        grouped(model, "qwen2_5_vl", made)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_kinds_that_are_padded_on_another_side_than_the_tokens_are_an_error(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    made = families.rows(model_type)
    blocks, tensors, counts, tiles = families.batch_inputs(model_type, made)
    name = families.FAMILIES[model_type].token_tensor
    kinds = [(row.prompt == families.IMAGE).int() for row in made]
    tensors[name] = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)  # on the right
    with pytest.raises(
        ValueError, match=f"`{name}` of row . marks other tokens than its image placeholders.*padding_side"
    ):
        ImageRows.from_processor(model, *blocks, tensors, counts, tiles)


def test_a_text_part_that_is_not_verified_needs_a_proof():
    model = families.build("qwen2_5_vl")
    model.config.text_config.model_type = model.model.language_model.config.model_type = "qwen2_5_vl_novel"
    (reason,) = check_support(model).unverified
    assert "'qwen2_5_vl_novel' has not been verified" in reason
