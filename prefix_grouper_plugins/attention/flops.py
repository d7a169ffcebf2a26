"""FLOPs of the custom operators for ``torch.utils.flop_counter``: matrix products over visible pairs, and nothing else.

Whatever else the backend computes (masked halves of tiles, recomputation) does not count, just as torch's own
formulas count an algorithm and not a kernel. They do count the masked half of causal attention, though: an ordinary
forward is charged for ``L * L`` pairs where ``L * (L + 1) / 2`` are visible; and they do not know the flash op of the CPU,
which counts as nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from prefix_grouper_plugins.attention import op as op  # makes the operators
from prefix_grouper_plugins.forest import visible_pairs


@register_flop_formula(torch.ops.prefix_grouper.shared_prefix_attention, get_raw=True)
def forward_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    *options: Any,
    **kwargs: Any,
) -> int:
    """Scores, and their product with the values."""
    return 2 * query.shape[1] * visible_pairs(segments, window, num_given) * (query.shape[2] + value.shape[2])


@register_flop_formula(torch.ops.prefix_grouper.shared_prefix_attention_backward, get_raw=True)
def backward_flops(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    num_given: int,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    *options: Any,
    **kwargs: Any,
) -> int:
    """The scores again, then the gradients of probabilities, value, query and key."""
    return 2 * query.shape[1] * visible_pairs(segments, window, num_given) * (3 * query.shape[2] + 2 * value.shape[2])
