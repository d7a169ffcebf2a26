"""One bottom-right causal varlen call over gathered keys and values, for forests whose prefixes are short.

Each segment is an entry: its queries, on the keys of all of its ancestors and its own. The keys of a prompt are copied for
each response, as rows would hold them, and nothing has to be merged. That moves fewer bytes than partial outputs where
prefixes are short next to what lies below them; `gathers` counts both (docs/cuda.md derives the counts). Gradients of the
copies of a key are added up in float32, in their order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse.merge import sum_copies
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import rectangles
from prefix_grouper_plugins.attention.device import accumulation_dtype, upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest


class GatheredCall(NamedTuple):
    """One causal varlen call on gathered keys.

    Attributes:
        cu_q, cu_k: ``IntTensor[B + 1]``, cumulative query and key lengths of the segments that have queries.
        max_q, max_k: the longest entry; ``max_q`` is at least 2, for FA2 takes 1 to mean decoding.
        in_place: whether the gathered keys are the keys as they lie; the tables below are then not used.
        key_of: ``IntTensor[C]``, the key that each gathered one is a copy of.
        copies: ``IntTensor[C]``, places among the gathered keys, ordered by the key that they are copies of.
        first_copy: ``IntTensor[T + 1]``, where the copies of each key begin in ``copies``.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    in_place: bool
    key_of: Tensor
    copies: Tensor
    first_copy: Tensor


class Traffic(NamedTuple):
    """What the two ways differ by, in rows: how many of them the passes other than the flash kernels go over.

    Attributes:
        tokens: keys of the forest.
        reached: queries of all rectangles.
        shared: keys of all rectangles.
        copied: keys that gathering makes more of than there are.
        in_place: the one segment with queries sees all keys in their order, so that nothing has to be gathered: one
            response to a given prompt.
    """

    tokens: int
    reached: int
    shared: int
    copied: int
    in_place: bool

    def merged_bytes(self, heads: int, kv_heads: int) -> int:
        """Forward and backward, for one element of a head in half precision.

        Per reached query and head: the level's call reads q and writes a partial output (4 bytes), the merge reads two
        and writes one (6); the second backward reads dO and O for delta (4), clears and converts the float32 dq (10), and
        dq is added (6). Per shared key: dk and dv of each query head, where heads are grouped, are written and read
        again (8), their sums written (4) and added (12).
        """
        grouped = 8 * heads if heads != kv_heads else 0
        return 30 * heads * self.reached + (grouped + 16 * kv_heads) * self.shared

    def gathered_bytes(self, heads: int, kv_heads: int) -> int:
        """The same, of gathering: K and V are read and written in both directions (16 bytes per gathered key and key head).

        The gradients of copies are summed over query heads (8 and 4 per copied key), then read (4 per gathered key) and
        their sums written (4 per key).
        """
        if self.in_place:
            return 0
        gathered = self.tokens + self.copied
        grouped = 8 * heads if heads != kv_heads else 0
        return (20 * gathered + 4 * self.copied + 4 * self.tokens) * kv_heads + grouped * self.copied


@lru_cache(maxsize=CACHED_LAYOUTS)
def traffic(forest: Forest) -> Traffic:
    """The counts of a forest."""
    found = rectangles(forest)
    reached, shared = sum(r.q1 - r.q0 for r in found), sum(r.k1 - r.k0 for r in found)
    above = forest.depth[forest.start >= forest.num_given]
    copied = int(above.sum()) + forest.num_queries - forest.num_tokens
    return Traffic(forest.num_tokens, reached, shared, copied, len(above) == 1 and above[0] == forest.num_given)


def gathers(forest: Forest, heads: int, kv_heads: int) -> bool:
    """Whether gathering keys moves fewer bytes than merging partial outputs, in tensors of at most twice as many keys.

    False where nothing is shared.
    """
    counts = traffic(forest)
    if not counts.reached or counts.copied > counts.tokens:
        return False
    return counts.gathered_bytes(heads, kv_heads) < counts.merged_bytes(heads, kv_heads)


@lru_cache(maxsize=CACHED_LAYOUTS)
def gathered_call(forest: Forest, device: torch.device, stream: int = 0) -> GatheredCall:
    """The call of a forest, made and uploaded once for all layers."""
    paths: list[np.ndarray] = []
    for start, end, parent in zip(*(x.tolist() for x in (forest.start, forest.end, forest.parent)), strict=True):
        own = np.arange(start, end)
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
    entries = np.flatnonzero(forest.start >= forest.num_given)
    index = np.concatenate([paths[entry] for entry in entries])
    q_lengths, k_lengths = (forest.end - forest.start)[entries], np.array([len(paths[entry]) for entry in entries])
    tables = [
        np.concatenate(([0], np.cumsum(q_lengths))),
        np.concatenate(([0], np.cumsum(k_lengths))),
        np.concatenate(([0], np.cumsum(np.bincount(index, minlength=forest.num_tokens)))),
        index,
        np.argsort(index, kind="stable"),
    ]
    padded = [np.pad(table, (0, -len(table) % 4)) for table in tables]  # each begins at 16 bytes
    parts = upload(np.concatenate(padded).astype(np.int32), device).split([len(table) for table in padded])
    cu_q, cu_k, first_copy, rows, copies = (part[: len(table)] for part, table in zip(parts, tables, strict=True))
    longest = max(int(q_lengths.max()), 2), int(k_lengths.max())
    return GatheredCall(cu_q, cu_k, *longest, traffic(forest).in_place, rows, copies, first_copy)


def _gathered(x: Tensor, call: GatheredCall) -> Tensor:
    return x if call.in_place else x.index_select(0, call.key_of)


def gathered_forward(
    op: Any, q: Tensor, k: Tensor, v: Tensor, call: GatheredCall, scale: float
) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D]`` and ``lse [H, Q]``; arguments as in `cuda.varlen_forward`."""
    keys, values = (_gathered(x, call) for x in (k, v))
    out, lse = op(q, keys, values, *call[:4], 0.0, True, False, scale=scale)[:2]
    return out, lse.to(accumulation_dtype(q.dtype))


@lru_cache
def unread_states(device: torch.device) -> tuple[Tensor, Tensor]:
    """The random state and its companion: dropout is off, so the ops never read them and still want the tensors."""
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)


def gathered_backward(
    op: Any,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: GatheredCall,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtype; arguments as in `cuda.varlen_backward`."""
    keys, values = (_gathered(x, call) for x in (k, v))
    grads = op(do, q, keys, values, out, lse, *call[:4], 0.0, True, *unread_states(q.device), scale=scale)
    if call.in_place:
        return grads[0], grads[1], grads[2]
    dk, dv = (sum_copies(grad, call.key_of, call.copies, call.first_copy) for grad in grads[1:3])
    return grads[0], dk, dv
