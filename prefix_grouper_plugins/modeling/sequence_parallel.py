"""Attention of a packed row whose tokens lie on several processes (sequence parallelism).

DeepSpeed-Ulysses (arXiv 2309.14509): every process holds an equal consecutive piece of the row and all heads. Before
attention an all-to-all exchanges pieces for heads, so that each process has the whole row and a share of the heads;
after it, a second one undoes the first. What runs in between is ordinary shared-prefix attention with the layout of the
whole row. Everything else in a transformer acts on single tokens and does not notice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.layout import PrefixLayout


class ShardedLayout:
    """A layout whose packed row is cut into equal consecutive pieces, the ``r``-th on process ``r`` of a group.

    Args:
        layout: of the whole row; ``layout.num_tokens`` is a multiple of the group's size (:meth:`PrefixLayout.pad_to`).
        group: the processes that hold the row.

    Raises:
        ValueError: the row cannot be cut into equal pieces.
    """

    def __init__(self, layout: PrefixLayout, group: dist.ProcessGroup) -> None:
        self.layout, self.group = layout, group
        self.world_size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if layout.num_tokens % self.world_size:
            raise ValueError(
                f"{layout.num_tokens} tokens cannot be cut into {self.world_size} equal pieces: pad the layout with "
                "layout.pad_to()"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of this process's piece."""
        return self.layout.num_tokens // self.world_size


def sequence_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ShardedLayout,
    *,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`~prefix_grouper_plugins.shared_prefix_attention` of a row that lies on the processes of ``layout.group``.

    With fewer key heads than processes the key heads are repeated, as in verl's Ulysses attention.

    Args:
        query (`Tensor[t, H, D]`): the piece of this process, ``t = T / world_size``.
        key, value (`Tensor[t, H_kv, D]`): likewise.
        layout: of the row.
        sinks (`Tensor[H]`): as there, for all heads.
        options: as there.

    Returns:
        `Tensor[t, H, D]`.

    Raises:
        ValueError: heads cannot be dealt out evenly.
    """
    size, rank = layout.world_size, layout.rank
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % size or (key_heads % size and size % key_heads):
        raise ValueError(
            f"{heads} query heads and {key_heads} key heads cannot be dealt out to {size} processes: "
            "choose a sequence-parallel size that divides both"
        )
    if key_heads < size:
        key, value = (x.repeat_interleave(size // key_heads, dim=1) for x in (key, value))
    if sinks is not None:
        sinks = sinks.chunk(size)[rank]
    query, key, value = (_pieces_to_heads(x, layout) for x in (query, key, value))
    output = shared_prefix_attention(query, key, value, layout.layout, sinks=sinks, **options)
    return _heads_to_pieces(output, layout)


def _pieces_to_heads(x: Tensor, layout: ShardedLayout) -> Tensor:
    """``[t, H, D]`` of all heads to ``[T, H / size, D]`` of the whole row."""
    tokens, heads, width = x.shape
    by_head = x.reshape(tokens, layout.world_size, heads // layout.world_size, width).transpose(0, 1)
    return _exchange(by_head, layout).flatten(0, 1)


def _heads_to_pieces(x: Tensor, layout: ShardedLayout) -> Tensor:
    """``[T, H / size, D]`` of the whole row to ``[t, H, D]`` of all heads."""
    by_piece = x.unflatten(0, (layout.world_size, -1))
    return _exchange(by_piece, layout).transpose(0, 1).flatten(1, 2)


def _exchange(x: Tensor, layout: ShardedLayout) -> Tensor:
    """All-to-all over the leading axis, ``[size, ...]`` -> ``[size, ...]``. Differentiable."""
    return _AllToAll.apply(x, layout.group)  # type: ignore[no-any-return, no-untyped-call]


class _AllToAll(torch.autograd.Function):
    """``output[r]`` is what process ``r`` had at this process's index: its own inverse, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        output = torch.empty_like(x)
        dist.all_to_all_single(output, x, group=group)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.group), None  # type: ignore[no-untyped-call]
