"""`share_rows` over batches of vision-language models: text, and images that are encoded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prefix_grouper_plugins import share_rows
from tests import tiny
from tests.modeling import multimodal_families
from tests.modeling.comparing import gradients
from tests.padded_batches import assert_gradients_within, assert_shared, logits_of, loss, padded, result_of, same


def assert_text_is_shared(model_type: str, left: int, tolerance: float) -> None:
    model = multimodal_families.build(model_type, vocab_size=120)
    tiny.compute_norms_in_input_dtype(model)
    ids, mask = padded(left)
    ids = ids + 40 * mask  # behind placeholders and special tokens
    model.train()  # in which Gemma 3 asks for the kinds of tokens
    kinds = {"token_type_ids": torch.zeros_like(ids)} if model_type == "gemma3" else {}
    assert_shared(model, ids, mask, tolerance=tolerance, **kinds)


@pytest.mark.parametrize(("model_type", "left"), [("qwen2_5_vl", 4), ("qwen3_vl", 0), ("gemma3", 0), ("llava", 4)])
def test_batches_of_text_are_shared_in_a_vision_language_model(model_type, left):
    assert_text_is_shared(model_type, left, 1e-6 if model_type == "gemma3" else 1e-11)  # whose norms are float32


@pytest.mark.exhaustive
@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("model_type", sorted(multimodal_families.FAMILIES))
def test_batches_of_text_are_shared_in_each_vision_language_model(model_type, left):
    assert_text_is_shared(model_type, left, 1e-5)


def images_of(model_type: str, side: str) -> tuple[list[Any], Tensor, Tensor, dict[str, Any]]:
    """Rows with images, two of each prompt, and the arguments of an ordinary forward of all."""
    made, family = multimodal_families.rows(model_type), multimodal_families.FAMILIES[model_type]
    ids = pad_sequence([row.ids for row in made], batch_first=True, padding_side=side)
    inputs: dict[str, Any] = family.row_tensors([image for row in made for image in row.images])
    if family.token_tensor:
        inputs[family.token_tensor] = (ids == multimodal_families.IMAGE).int()
    return made, ids, (ids != 0).long(), inputs


def size_of_trie(made: list[Any]) -> int:
    """Of the rows' tokens, where placeholders are told apart by their images."""
    rows = []
    for row in made:
        shown = iter([id(image) for image in row.images for _ in range(image.tokens)])
        rows.append([next(shown) if token == multimodal_families.IMAGE else token for token in row.ids.tolist()])
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


@pytest.mark.parametrize(
    ("model_type", "side"),
    [
        ("llava", "right"),
        ("qwen2_vl", "left"),
        ("qwen2_5_vl", "right"),
        ("qwen3_vl", "left"),
        ("gemma3", "right"),
        ("gemma3n", "right"),
        ("gemma4", "right"),
        ("gemma4_unified", "right"),
    ],
)
def test_equal_images_of_rows_that_begin_alike_are_seen_once(monkeypatch, model_type, side):
    model = multimodal_families.build(model_type)
    tiny.compute_norms_in_input_dtype(model)
    multimodal_families.compute_vision_rotary_in_input_dtype(monkeypatch, model)
    made, ids, mask, inputs = images_of(model_type, side)
    expected = logits_of(model, ids, mask, **inputs)
    expected_gradients = gradients(model, loss(expected))
    sizes = []
    with share_rows(model, share="tree") as sharing:
        ends = ("visual", "vision_tower", "embed_vision")
        tower = next(m for name, m in model.named_modules() if name.endswith(ends))
        tower.register_forward_pre_hook(
            lambda _, args, named: sizes.append(len(next(iter([*args, *named.values()])))), with_kwargs=True
        )
        got = logits_of(model, ids, mask, **inputs)
        got_gradients = gradients(model, loss(got))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    def tolerance(name: str) -> float:
        return 1e-7 if model_type == "gemma4" and "vision_tower" in name else 1e-10  # it pools its patches in float32

    assert_gradients_within(got_gradients, expected_gradients, tolerance)
    assert dict(sharing.meter.fallbacks) == {}
    assert sharing.meter.tokens_forwarded == size_of_trie(made)
    assert sizes == [len(inputs["pixel_values"]) // 2]


def test_images_without_a_token_between_them_are_one_where_their_tokens_see_each_other():
    """`A A x` and `A y` begin with the same image, whose tokens see the second one in the first row alone."""
    model = multimodal_families.build("gemma3")
    tiny.compute_norms_in_input_dtype(model)
    make = multimodal_families.FAMILIES["gemma3"].image
    one, other = (make(torch.Generator().manual_seed(seed), False).tensors["pixel_values"] for seed in (0, 1))
    image = [multimodal_families.IMAGE] * 4
    ids = torch.tensor(
        [
            [20, *image, *image, 21, 22],
            [20, *image, 21, 22, 23, 24, 25, 26],
            [20, *image, *image, 21, 23],
            [20, *image, *image, 21, 22],
        ]
    )
    pixels = torch.cat([one, one, one, one, one, one, other]).double()
    inputs = {"pixel_values": pixels, "token_type_ids": (ids == multimodal_families.IMAGE).int()}
    expected = logits_of(model, ids, torch.ones_like(ids), **inputs)
    with share_rows(model, share="tree") as sharing:
        got = logits_of(model, ids, torch.ones_like(ids), **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # The word before the images in all rows, both images and a word in the first and the third.
    assert sharing.meter.tokens_forwarded == ids.numel() - 3 - 9


@pytest.mark.parametrize(
    ("model_type", "change", "reason"),
    [
        ("llava_next", {}, "images whose `image_sizes` does not say how many tokens stand for each"),
        ("gemma3", {"token_type_ids": None}, "`token_type_ids` is missing"),
        ("qwen2_vl", {"mm_token_type_ids": None}, "`mm_token_type_ids` is missing"),
        ("qwen2_vl", {"pixel_values_videos": torch.zeros(1)}, "belongs to rows with videos"),
    ],
)
def test_batches_with_images_that_cannot_be_shared_say_why(model_type, change, reason):
    model = multimodal_families.build(model_type)
    _, ids, mask, inputs = images_of(model_type, "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **inputs, **change}
    expected = result_of(model, inputs)
    with share_rows(model, self_check=False) as sharing:
        assert same(result_of(model, inputs), expected)
    (counted,) = sharing.meter.fallbacks
    assert reason in counted


def test_the_features_of_each_image_are_not_kept():
    model = multimodal_families.build("llava")
    _, ids, mask, inputs = images_of("llava", "right")
    with share_rows(model, self_check=False) as sharing:
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
        assert sharing.meter.packed == 1
        with pytest.raises(AttributeError, match="encoded equal images once"):
            _ = output.image_outputs.pooler_output
        model.model(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=False, **inputs)
        assert list(sharing.meter.fallbacks) == ["return_dict=False asks for the features of all images in a tuple"]


def test_placeholders_and_images_of_a_batch_have_to_fit():
    model = multimodal_families.build("llava")
    _, ids, mask, inputs = images_of("llava", "right")
    moved = ids.clone()  # from one row to another, so that the totals fit
    moved[0, int((ids[0] == multimodal_families.IMAGE).nonzero()[0])] = 20
    moved[1, -1] = multimodal_families.IMAGE
    mask = torch.ones_like(mask)
    expected = model(input_ids=moved, attention_mask=mask, **inputs, use_cache=False).logits
    with share_rows(model, self_check=False) as sharing:
        assert torch.equal(model(input_ids=moved, attention_mask=mask, **inputs, use_cache=False).logits, expected)
        assert list(sharing.meter.fallbacks) == ["the placeholders of a row do not fit its images"]
        kinds = torch.zeros_like(ids)
        model(input_ids=ids[3:4].repeat(2, 1), token_type_ids=kinds[:2], use_cache=False)
        assert sharing.meter.packed == 1
        model(input_ids=ids[3:4].repeat(2, 1), token_type_ids=kinds[:2] + 1, use_cache=False)
        assert "`token_type_ids` marks tokens that are not text" in sharing.meter.fallbacks
