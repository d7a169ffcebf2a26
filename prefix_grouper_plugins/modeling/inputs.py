"""What a packed call of a model is made of: token ids, positions, and the carriers of the layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.carrier import FALSE_IF_ENABLED, LAYOUT_KWARG, Layout, placeholder_mask
from prefix_grouper_plugins.rows import rows_of


def packed_inputs(layout: PrefixLayout, input_ids: Tensor, position_ids: Tensor | None = None) -> dict[str, Any]:
    """Keyword arguments of a packed forward: ``model(**packed_inputs(layout, layout.pack(rows)))``.

    A model that has not been enabled raises a ``ValueError`` when it reads them.

    Args:
        layout: the layout, on the model's device.
        input_ids: ``LongTensor[T]``, packed token ids, given ones (:meth:`PrefixLayout.given`) left out.
        position_ids: ``LongTensor[T]``, by default the positions in the rows, counted from 0; ``[3, T]`` or ``[4, T]``
            for models with multimodal RoPE.

    Raises:
        ValueError: ``input_ids`` or ``position_ids`` is not of shape ``[T]``.
    """
    positions = layout.position_ids if position_ids is None else position_ids
    for name, value in (
        ("input_ids", input_ids),
        ("position_ids", positions[0] if positions.dim() == 2 else positions),
    ):
        if value.shape != (layout.num_queries,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the layout needs ({layout.num_queries},)")
    return {
        "input_ids": input_ids[None],
        "position_ids": positions.unsqueeze(-2),
        "use_cache": FALSE_IF_ENABLED,
        **layout_inputs(layout, input_ids.device),
    }


def layout_inputs(layout: Layout, device: torch.device) -> dict[str, Any]:
    """The part of :func:`packed_inputs` that carries the layout, for callers who lay out the token ids themselves.

    Args:
        layout: the layout of the packed row, or of the piece of it that this process forwards.
        device: the model's device.
    """
    return {"attention_mask": placeholder_mask(layout, device), LAYOUT_KWARG: layout}


def row_positions(model: nn.Module, layout: PrefixLayout, input_ids: Tensor) -> Tensor:
    """``LongTensor[T]``: the positions that ``model`` gives the tokens of each row where nobody passes any.

    Nearly all models count from 0. RoBERTa and what was made of it count from the id after that of their padding token, and
    give that token no number.

    Args:
        model: the model, bare or wrapped.
        layout: the layout of the packed row.
        input_ids: ``LongTensor[T]``, packed token ids.
    """
    own = next((m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)
    if own is None:
        return layout.position_ids
    rows = rows_of(layout)  # what follows a row does not change the numbers before it
    numbers = own.create_position_ids_from_input_ids(rows.expand(input_ids[None]), own.padding_idx)  # type: ignore[operator]
    return rows.collapse(numbers)[0]
