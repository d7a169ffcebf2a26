"""A stand-in for flash-attn on a CPU: what verl computes where it is installed, in pure torch.

verl's Ulysses exchanges heads around transformers' flash attention and nowhere else, and its critics ask for it by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "flash_attention_2"


def install() -> None:
    """Let models of this process be loaded with flash attention."""
    from transformers import PreTrainedModel
    from transformers.integrations import flash_attention
    from verl.models.transformers import monkey_patch

    stock: Any = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self: Any, name: str | None, *args: Any, **kwargs: Any) -> Any:
        return name if name == NAME else stock(self, name, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = check  # type: ignore[method-assign]
    flash_attention._flash_attention_forward = monkey_patch._flash_attention_forward = forward  # type: ignore[assignment]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_length: int,
    *args: Any,
    attn_implementation: str,
    position_ids: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """``query [B, T, H, D]``, ``key``/``value [B, T, H_kv, D]`` -> ``[B, T, H, D]``: rows that begin at position 0."""
    assert attn_implementation == NAME and sliding_window is None and query.shape[1] == query_length == key.shape[1]
    visible = torch.ones(query_length, query_length, dtype=torch.bool).tril()[None]
    if mask is not None:
        visible = visible & (mask[:, None] != 0) | torch.eye(query_length, dtype=torch.bool)
    elif position_ids is not None and len(query) == 1:
        row = (position_ids[0] == 0).cumsum(0)
        visible = visible & (row[:, None] == row)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    output = scaled_dot_product_attention(*heads, attn_mask=visible[:, None], scale=softmax_scale, enable_gqa=True)
    return output.transpose(1, 2)
