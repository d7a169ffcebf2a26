"""Images and videos in a micro-batch of verl: which rows have the same ones, and which tensors a packed row needs.

verl's agent loop stores the processor's image tensors with each row (``multi_modal_inputs``, one dict of tensors for
each row), and its engine passes all of them to the model, one row after the other. The model puts their features, in
order, into the placeholder tokens. A packed row holds the placeholders of each group once, so it takes the tensors of
one row of each group. Positions (mRoPE) and token kinds (Gemma 3) come with the rows and are packed like the tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from verl.utils import tensordict_utils as tu
from verl.utils.model import extract_multi_modal_inputs

from prefix_grouper_plugins.modeling.model_types import known_of

# Tensors that belong to the images and videos of a row, and not to its tokens.
_OF_IMAGES = frozenset(
    "pixel_values image_grid_thw images_seqlens pixel_values_videos video_grid_thw second_per_grid_ts "
    "image_sizes batch_num_images pixel_attention_mask".split()
)
TOKEN_TYPES = "token_type_ids"

RowInputs = dict[str, Any]


def placeholder_ids(config: Any) -> frozenset[int]:
    """Token ids that stand for images and videos, from the model's config."""
    names = ("image_token_id", "video_token_id")
    return frozenset(token for name in names if (token := getattr(config, name, None)) is not None)


def row_inputs(data: TensorDict) -> list[RowInputs]:
    """The processor's tensors of each row besides its tokens; in most families none for a row of text."""
    found = data.get("multi_modal_inputs", None)
    if found is None:
        return [{}] * len(data)
    rows = (row.data if isinstance(row, NonTensorData) else row for row in found)
    return [{name: value for name, value in (row or {}).items() if value is not None} for row in rows]


def images_of(row: RowInputs) -> RowInputs:
    """The tensors of a row that belong to its images."""
    return {name: value for name, value in row.items() if name != TOKEN_TYPES}


def why_not_share(
    inputs: Sequence[RowInputs], lengths: Sequence[int], placeholders: Collection[int], model_type: str
) -> str | None:
    """Why rows with these inputs cannot be shared; None if they can.

    Args:
        inputs: see :func:`row_inputs`.
        lengths: tokens of each row.
        placeholders: see :func:`placeholder_ids`.
        model_type: the model's.
    """
    if not any(inputs):
        return None
    for row, length in zip(inputs, lengths, strict=True):
        for name, value in row.items():
            if name not in _OF_IMAGES | {TOKEN_TYPES} or not torch.is_tensor(value):
                return f"`{name}` among the multimodal inputs is not known here"
        if reason := _why_not_share_tokens(row, length, model_type):
            return reason
    compared = known_of(model_type).compared_in_verl
    if compared and not any(map(images_of, inputs)):
        return None
    if not compared:  # kinds of tokens alone may change how text is read
        return f"images of {model_type} have not been compared with verl's own engine"
    return None if placeholders else "the model's config names no token that stands for an image"


def _why_not_share_tokens(row: RowInputs, length: int, model_type: str) -> str | None:
    types = row.get(TOKEN_TYPES)
    if types is not None and types.shape != (1, length):
        return f"`{TOKEN_TYPES}` has shape {tuple(types.shape)} for a row of {length} tokens"
    if not known_of(model_type).images_both_ways:
        return None
    if types is None and images_of(row):
        return f"`{TOKEN_TYPES}` is missing, without which the tokens of an image do not see each other"
    if types is not None and bool(types[0, -1] == 1):
        return "a row ends within an image, whose last token is not forwarded but would be seen"
    return None


def token_types(inputs: Sequence[RowInputs], lengths: Sequence[int]) -> list[Tensor] | None:
    """``LongTensor[L]`` for each row, zeros for rows without token kinds; None if no row has any."""
    if not any(TOKEN_TYPES in row for row in inputs):
        return None
    return [
        row[TOKEN_TYPES][0].long().cpu() if TOKEN_TYPES in row else torch.zeros(length, dtype=torch.long)
        for row, length in zip(inputs, lengths, strict=True)
    ]


def merged(rows: Sequence[RowInputs]) -> dict[str, Any]:
    """The image tensors of ``rows``, concatenated by verl.

    verl cannot concatenate rows with different numbers of images (Idefics3, SmolVLM) or of pictures of one image
    (LLaVA-NeXT), since these lie along a second axis. Such tensors are first reshaped to a form that the models accept too.
    """
    rows = [images_of(row) for row in rows]
    return extract_multi_modal_inputs([*map(_one_by_one, rows)] if _counts_along_rows(rows) else _filled_up(rows))


def joined(micro_batch: TensorDict, lengths: Sequence[int], padded: bool) -> TensorDict:
    """``micro_batch`` with the inputs of all rows in its first row, laid out as verl lays out the tokens.

    For the ordinary path, on which verl concatenates the inputs of rows. It stops at unequal shapes, and it reads token
    kinds that lie row by row as if they belonged to packed tokens.

    Args:
        micro_batch: rows for a model that runs its own forward.
        lengths: tokens of each row.
        padded: whether verl pads the rows; otherwise it packs them.
    """
    inputs = row_inputs(micro_batch)
    first, types = merged(inputs), token_types(inputs, lengths)
    if types is not None:
        first[TOKEN_TYPES] = pad_sequence(types, batch_first=True) if padded else torch.cat(types)[None]
    copy = micro_batch.copy()
    tu.assign_non_tensor_stack(copy, "multi_modal_inputs", [first, *({} for _ in inputs[1:])])
    return copy


def _counts_along_rows(rows: Sequence[RowInputs]) -> bool:
    """Whether the images of a row lie along a second axis (Idefics3 and SmolVLM)."""
    return any(row["pixel_values"].dim() == 5 and "image_sizes" not in row for row in rows if "pixel_values" in row)


def _one_by_one(row: RowInputs) -> RowInputs:
    """``[1, images, ...]`` as ``[images, 1, ...]``: as many rows of one image each."""
    return {name: value.transpose(0, 1) for name, value in row.items()}


def _filled_up(rows: Sequence[RowInputs]) -> list[RowInputs]:
    """Rows with equally many pictures for each image, as a processor pads them: ``[images, pictures, 3, H, W]``."""
    most = max((row["pixel_values"].shape[1] for row in rows if "image_sizes" in row), default=0)
    return [
        {
            name: pad(value, (0, 0) * 3 + (0, most - value.shape[1])) if name == "pixel_values" and most else value
            for name, value in row.items()
        }
        for row in rows
    ]
