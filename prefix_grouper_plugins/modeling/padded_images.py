"""The images of a padded batch, as a vision-language model is called with them: which tokens stand for which image.

Nobody says which row an image belongs to. The model puts features into placeholder tokens one after the other, so the number of
features of each image says it: by its grid, or, where images have as many features each, by the number of placeholders in all.
The features of equal images are equal, so rows may share placeholders, like any other tokens, where those of equal images
begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.images import (
    IMAGE_TENSORS,
    TOKEN_TENSORS,
    first_alike,
    image_token_id,
    merge_size,
    multimodal_positions,
    reads_images_both_ways,
    why_not_pack,
)
from prefix_grouper_plugins.padded_rows import PaddedRows

_UNDERSTOOD = ("pixel_values", "image_grid_thw")


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
    if reads_images_both_ways(model):
        return "the tokens of an image see each other in both directions"
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
    marks = inputs.get("mm_token_type_ids")
    if marks is not None and not torch.equal(marks.cpu() == 1, placeholders):
        return "`mm_token_type_ids` marks other tokens than the placeholders of images"
    return None


def _sizes(model: nn.Module, given: Mapping[str, Tensor], placeholders: int) -> list[int] | None:
    """How many tokens stand for each image, or each tile of one; None where that is not known."""
    if "image_grid_thw" in given:
        return (given["image_grid_thw"].prod(-1) // (merge_size(model) or 1) ** 2).tolist()  # type: ignore[no-any-return]
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
            numbers below zero at their placeholders: what rows are compared by.
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
        self.beginnings = ids.cpu().long().clone()
        self.beginnings[placeholders] = -1 - self._first_alike()[numbers]
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
            return [{"pixel_values": one} for one in pixels.split(1)]
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
        """Arguments of the packed forward of ``rows``, compared by :attr:`beginnings`, that say what the images are."""
        packed: dict[str, Any] = {name: rows.pack(kinds)[None] for name, kinds in self._kinds.items()}
        if self.positions is not None:
            packed["position_ids"] = rows.pack(self.positions.movedim(0, -1)).T.unsqueeze(1)
        numbers = rows.pack(self._numbers)
        images = self._images()
        shown = [images[number] for number in numbers[numbers >= 0].unique_consecutive().tolist()]
        return packed | {name: torch.cat([image[name] for image in shown]) for name in shown[0]}
