"""The images of a padded batch, as a vision-language model is called with them: which tokens stand for which image.

Nobody says which row an image belongs to. The model puts features into placeholder tokens one after the other, so the number of
features of each image says it: by its grid or its patches, or, where images have as many features each, by the number of
placeholders in all. The features of equal images are equal, so rows may share placeholders, like any other tokens, where those
of equal images begin alike. Where the tokens of images see each other both ways (Gemma 3 and 4), rows share those of images
that follow one another without a token between them all or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.images import (
    IMAGE_TENSORS,
    TOKEN_TENSORS,
    first_alike,
    image_token_id,
    kind_of_blocks,
    merge_size,
    multimodal_positions,
    number_runs,
    set_blocks,
    why_not_pack,
)
from prefix_grouper_plugins.modeling.model_types import known_of
from prefix_grouper_plugins.padded_rows import PaddedRows

_UNDERSTOOD = ("pixel_values", "image_grid_thw", "image_position_ids")


def image_arguments(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a forward that bring images."""
    about = (name for name in inputs if name in IMAGE_TENSORS or "pixel_values" in name or "video" in name)
    return {name: inputs[name] for name in about if inputs[name] is not None}


def why_not_images(model: nn.Module, inputs: Mapping[str, Any], real: Tensor) -> str | None:
    """Why a batch with images is not shared; None if it may be.

    Args:
        model: that takes token ids and images.
        inputs: the arguments of its forward, with images.
        real: ``BoolTensor[B, W]`` on the CPU, true on real tokens.
    """
    given = image_arguments(inputs)
    kinds = [name for name in TOKEN_TENSORS if inputs.get(name) is not None]
    if (reason := why_not_pack(model, [*given, *kinds])) is not None:
        return reason
    if unknown := [name for name in given if name not in _UNDERSTOOD]:
        return f"the batch has images whose `{unknown[0]}` does not say how many tokens stand for each"
    if "pixel_values" not in given:
        return f"`{next(iter(given))}` came without `pixel_values`"
    kind = kind_of_blocks(model)
    if kind is not None and kind not in kinds:
        return f"`{kind}` is missing, without which the tokens of an image do not see each other"
    if inputs.get("return_dict") is False:
        return "return_dict=False asks for the features of all images in a tuple"
    token = image_token_id(model)
    if token is None:
        return "the model's config names no placeholder of an image"
    placeholders = inputs["input_ids"].cpu() == token
    if bool((placeholders & ~real).any()):
        return "there are placeholders of images at padding"
    sizes, counts = _sizes(model, given, int(placeholders.sum())), placeholders.sum(1).tolist()
    if sizes is None or not set(accumulate(counts)) <= {0, *accumulate(sizes)} or sum(sizes) != sum(counts):
        return "the placeholders of a row do not fit its images"
    if not _follow_one_another(placeholders, sizes):
        return "there are other tokens between the placeholders of an image"
    read_by = kind or "mm_token_type_ids"
    marks = inputs.get(read_by)
    if marks is not None and not torch.equal(marks.cpu() == 1, placeholders):
        return f"`{read_by}` marks other tokens than the placeholders of images"
    return None


def _sizes(model: nn.Module, given: Mapping[str, Tensor], placeholders: int) -> list[int] | None:
    """How many tokens stand for each image, or each tile of one; None where that is not known."""
    if "image_grid_thw" in given:
        return (given["image_grid_thw"].prod(-1) // (merge_size(model) or 1) ** 2).tolist()  # type: ignore[no-any-return]
    if "image_position_ids" in given:  # -1 where an image is padded; so many patches make one feature
        patches = (given["image_position_ids"] != -1).all(-1).sum(-1).tolist()
        each, rest = divmod(sum(patches), placeholders) if placeholders else (0, 1)
        return None if rest or any(count % each for count in patches) else [count // each for count in patches]
    images = len(given["pixel_values"])
    return [placeholders // images] * images if images and placeholders % images == 0 else None


def _follow_one_another(placeholders: Tensor, sizes: list[int]) -> bool:
    """Whether nothing is between the placeholders of an image, so that rows cannot part within it."""
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    steps = placeholders.nonzero()[:, 1].diff()
    return bool((steps[numbers.diff() == 0] == 1).all())


class PaddedImages:
    """The images of a padded batch, for which `why_not_images` has no reason.

    Args:
        model: that takes token ids and images.
        inputs: the arguments of its forward.

    Attributes:
        beginnings (`LongTensor[B, W]`): on the CPU, the token ids, in which equal images, and no others, have equal
            numbers below zero at their placeholders: what rows are compared by. So have equal runs of images whose
            tokens see each other.
        positions (`LongTensor[3, B, W]`): that the model gives the tokens; None where it numbers them as it does text.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._given = image_arguments(inputs)
        self._kinds = {name: inputs[name] for name in TOKEN_TENSORS if inputs.get(name) is not None}
        placeholders = ids.cpu() == image_token_id(model)
        sizes = _sizes(model, self._given, int(placeholders.sum()))
        assert sizes is not None, "why_not_images has a reason against this batch"
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self._numbers = torch.full(ids.shape, -1)
        self._numbers[placeholders] = numbers
        alike = self._first_alike()[numbers]
        self._blocks: Tensor | None = None
        if kind_of_blocks(model) is not None:
            self._blocks = number_runs(placeholders)
            alike = _first_equal_block(self._blocks[placeholders], alike)
        self._blocks_in = known_of(transformers_model(model).config.model_type).images_both_ways_in
        self.beginnings = ids.cpu().long().clone()
        self.beginnings[placeholders] = -1 - alike
        self.positions = multimodal_positions(
            model,
            ids,
            torch.ones_like(ids) if mask is None else mask,
            self._given,
            self._kinds.get("mm_token_type_ids"),
        )

    def _images(self) -> list[dict[str, Tensor]]:
        """The tensors of each image."""
        pixels, grids = self._given["pixel_values"], self._given.get("image_grid_thw")
        if grids is None:
            each = zip(*(tensor.split(1) for tensor in self._given.values()), strict=True)
            return [dict(zip(self._given, image, strict=True)) for image in each]
        patches = grids.prod(-1).tolist()
        spans = pairwise(accumulate(patches, initial=0))
        return [
            {"pixel_values": pixels[start:end], "image_grid_thw": grid}
            for (start, end), grid in zip(spans, grids.split(1), strict=True)
        ]

    def _first_alike(self) -> Tensor:
        """``LongTensor[images]``: for each image the first one that is equal to it."""
        images = self._images()
        sums = torch.stack(
            [image["pixel_values"].double().sum() for image in images]
        ).tolist()  # one read of the device
        among = [(tuple(image["pixel_values"].shape), total) for image, total in zip(images, sums, strict=True)]
        return torch.tensor(first_alike(images, among))

    def packed(self, rows: PaddedRows) -> dict[str, Any]:
        """Arguments of the packed forward of ``rows``, compared by :attr:`beginnings`, that say what the images are.

        The tokens of ``rows.layout`` that see each other both ways are set in it.
        """
        if self._blocks is not None:
            set_blocks(rows.layout, rows.pack(self._blocks), self._blocks_in)
        packed: dict[str, Any] = {name: rows.pack(kinds)[None] for name, kinds in self._kinds.items()}
        if self.positions is not None:
            packed["position_ids"] = rows.pack(self.positions.movedim(0, -1)).T.unsqueeze(1)
        numbers = rows.pack(self._numbers)
        images = self._images()
        shown = [images[number] for number in numbers[numbers >= 0].unique_consecutive().tolist()]
        return packed | {name: torch.cat([image[name] for image in shown]) for name in shown[0]}


def _first_equal_block(blocks: Tensor, alike: Tensor) -> Tensor:
    """``LongTensor[N]``: for each placeholder the first block that has the images of its own.

    Args:
        blocks: ``LongTensor[N]``, the block of each placeholder: 0, 1, ... in order.
        alike: ``LongTensor[N]``, the image of each placeholder, equal for equal images.
    """
    found: dict[tuple[int, ...], int] = {}
    shown = [tuple(own.tolist()) for own in alike.split(blocks.bincount().tolist())]
    return torch.tensor([found.setdefault(images, i) for i, images in enumerate(shown)])[blocks]
