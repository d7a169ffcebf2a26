"""TRL's image arguments, row by row.

TRL passes the images of a micro-batch to ``_get_per_token_logps_and_entropies`` as the processor returned them, with the
numbers of images and tiles of each row, and splits them where it splits the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prefix_grouper_plugins.modeling.images import (
    IMAGE_TENSORS,
    TOKEN_TENSORS,
    ImageRows,
    RowTensors,
    merge_images,
    split_images,
    why_not_pack,
)

_COUNTS = ("num_images", "num_tiles")


def why_not_share(model: Any, given: dict[str, Any]) -> str | None:
    """Why images cannot be packed, given the arguments that are not None; None if they can."""
    names = [name for name in given if name not in (*_COUNTS, "compute_aux_loss")]
    if not names:
        return None
    if "pixel_values" in names and "num_images" not in given:
        return "`pixel_values` came without `num_images`, so that images cannot be told apart by row"
    return why_not_pack(model, names)


class RowsOfImages:
    """The image tensors and token kinds of each row. Slicing selects rows.

    Args:
        given: the arguments of the stock method that are not None.
        num_rows: rows of the batch.
    """

    def __init__(self, given: dict[str, Any], num_rows: int) -> None:
        self.counts: dict[str, Sequence[int]] = {name: given[name] for name in _COUNTS if name in given}
        self.token_tensors: dict[str, Tensor] = {name: given[name] for name in TOKEN_TENSORS if name in given}
        tensors = {name: given[name] for name in IMAGE_TENSORS if name in given}
        self.images: Sequence[RowTensors] = (
            split_images(tensors, given["num_images"], given.get("num_tiles")) if tensors else [{}] * num_rows
        )

    def __getitem__(self, rows: slice) -> RowsOfImages:
        part = object.__new__(RowsOfImages)
        part.counts = {name: counts[rows] for name, counts in self.counts.items()}
        part.token_tensors = {name: tensor[rows] for name, tensor in self.token_tensors.items()}
        part.images = self.images[rows]
        return part

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the stock method."""
        return {**self.counts, **self.token_tensors, **merge_images(self.images)}

    def image_rows(self, model: Any, blocks: tuple[Tensor, Tensor, Tensor, Tensor]) -> ImageRows | None:
        """The inputs of the packed forward besides tokens; None if there are none.

        Args:
            model: the vision-language model.
            blocks: ids and mask of the prompts and of the completions.
        """
        if not self.token_tensors and not any(self.images):
            return None
        return ImageRows(model, *blocks, self.images, self.token_tensors)
