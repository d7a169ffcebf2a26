"""Images and videos in a micro-batch of verl: which rows show the same, and which tensors a packed row needs.

verl's agent loop keeps what a processor made of a row's images beside the row (``multi_modal_inputs``, one dict of
tensors for each row), and its engine hands the model all of them, one after the other. The model puts their features,
in order, into the places of the placeholder tokens. A packed row holds the placeholders of each group once, so it takes
the tensors of one row of each group. Positions (mRoPE) come with the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from torch import Tensor

from prefix_grouper_plugins.grouping import prompt_group

# Model types whose images a test has compared with verl's own engine.
COMPARED_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Tensors that belong to the images and videos of a row, and not to its tokens.
_KNOWN = frozenset(
    "pixel_values image_grid_thw images_seqlens pixel_values_videos video_grid_thw second_per_grid_ts".split()
)

ALONE = object()  # leads the key of a row whose images keep it from sharing

RowInputs = dict[str, Any]


def placeholder_ids(config: Any) -> frozenset[int]:
    """Token ids that stand for images and videos, by the model's config."""
    names = ("image_token_id", "video_token_id")
    return frozenset(token for name in names if (token := getattr(config, name, None)) is not None)


def row_inputs(data: TensorDict) -> list[RowInputs]:
    """What belongs to the images of each row; nothing for a row of text."""
    found = data.get("multi_modal_inputs", None)
    if found is None:
        return [{}] * len(data)
    rows = (row.data if isinstance(row, NonTensorData) else row for row in found)
    return [{name: value for name, value in (row or {}).items() if value is not None} for row in rows]


def reason_not_to_share(inputs: Sequence[RowInputs], placeholders: Collection[int]) -> str | None:
    """Why rows with these inputs cannot be shared, None where they can."""
    unknown = {
        name for row in inputs for name, value in row.items() if name not in _KNOWN or not torch.is_tensor(value)
    }
    if unknown:
        return f"`{min(unknown)}` among the multimodal inputs is not known here"
    if any(inputs) and not placeholders:
        return "the model's config names no token that stands for an image"
    return None


def sharing_keys(
    uids: Sequence[Hashable],
    rows: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    inputs: Sequence[RowInputs],
    placeholders: Collection[int],
) -> list[tuple[Hashable, int | None]]:
    """Keys that two rows have in common only if all that they would share is the same, images included.

    Rows with images share if their groups, prompts and images are equal: equal placeholders may stand for different
    images. A row with placeholders behind the part of its prompt that is laid out once (an image in the response, or at
    the very end of the prompt) shares with nobody: what is laid out twice would need features twice.

    Args:
        uids: the group of each row.
        rows: token ids, on the CPU.
        prompt_lengths: how many of each row's tokens are its prompt.
        inputs: see :func:`row_inputs`.
        placeholders: see :func:`placeholder_ids`.
    """
    tokens = torch.tensor(sorted(placeholders), dtype=torch.long)
    seen: dict[Hashable, list[int]] = {}
    keys: list[tuple[Hashable, int | None]] = []
    for i, (uid, row, length) in enumerate(zip(uids, rows, prompt_lengths, strict=True)):
        if not inputs[i]:
            keys.append((uid, None))
        elif torch.isin(row[length - 1 :], tokens).any():
            keys.append((ALONE, i))
        else:
            alike = seen.setdefault(prompt_group(uid, row[:length]), [])
            first = next((j for j in alike if _equal(inputs[i], inputs[j])), i)
            if first == i:
                alike.append(i)
            keys.append((uid, first))
    return keys


def _equal(one: RowInputs, other: RowInputs) -> bool:
    return one is other or (one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one))
