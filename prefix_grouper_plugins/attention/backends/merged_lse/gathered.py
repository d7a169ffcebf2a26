"""One bottom-right causal varlen call over gathered keys and values, for forests whose prefixes are short.

Each chain of segments (`rectangles.Chains`) is an entry: its queries, on the keys of all of its ancestors and its own. The
keys of a prompt are copied for each response but the first, as rows would hold them, and nothing has to be merged. That moves
fewer bytes than partial outputs where prefixes are short beside what lies below them; `gathers_forward` and
`gathers_backward` count both (docs/cuda.md derives the counts). Gradients of the copies of a key are added up in float32, in
their order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse.merge import sum_copies
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import chain_ends, chains, rectangles
from prefix_grouper_plugins.attention.device import accumulation_dtype, upload
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest


class GatheredCall(NamedTuple):
    """One causal varlen call on gathered keys.

    Attributes:
        cu_q, cu_k: ``IntTensor[B + 1]``, cumulative query and key lengths of the chains that have queries.
        max_q, max_k: the longest entry; ``max_q`` is at least 2, for FA2 takes 1 to mean decoding.
        key_of: ``IntTensor[C]``, the key behind each gathered one.
        copies: ``IntTensor[C]``, places among the gathered keys, ordered by the key behind them.
        first_copy: ``IntTensor[T + 1]``, where the copies of each key begin in ``copies``.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
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
    """

    tokens: int
    reached: int
    shared: int
    copied: int

    def merged_forward(self, heads: int) -> int:
        """Bytes of a forward that merges, for one element of a head in half precision.

        Per reached query and head: the level's call reads q and writes a partial output (4), the merge reads two and writes
        one (6).
        """
        return 10 * heads * self.reached

    def merged_backward(self, heads: int, kv_heads: int) -> int:
        """The same, of a backward.

        Per reached query and head: the level's call reads dO and O for delta (4), clears and converts the float32 dq (10),
        and dq is added (6). Per shared key: dk and dv of each query head, where heads are grouped, are written and read
        again (8), their sums written (4) and added (12).
        """
        return 20 * heads * self.reached + (_grouped(heads, kv_heads) + 16 * kv_heads) * self.shared

    def gathered_forward(self, kv_heads: int) -> int:
        """Of a forward that gathers: K and V are read and written (8 per gathered key and key head), and the flash kernel
        reads the copies too (4)."""
        return kv_heads * (8 * (self.tokens + self.copied) + 4 * self.copied)

    def gathered_backward(self, heads: int, kv_heads: int) -> int:
        """Of a backward that gathers: the same again, then gradients.

        Those of copies are summed over query heads (8 and 4 per copied key), then read (4 per gathered key) and their sums
        written (4 per key).
        """
        sums = kv_heads * (4 * self.copied + 4 * (self.tokens + self.copied) + 4 * self.tokens)
        return self.gathered_forward(kv_heads) + _grouped(heads, kv_heads) * self.copied + sums


def _grouped(heads: int, kv_heads: int) -> int:
    """Per key: dk and dv of the query heads of a key head, which FA2 writes apart and then sums."""
    return 8 * heads if heads != kv_heads else 0


@lru_cache(maxsize=CACHED_LAYOUTS)
def traffic(forest: Forest) -> Traffic:
    """The counts of a forest."""
    found, entries = rectangles(forest, chain_ends(forest)), chains(forest)
    reached, shared = sum(r.q1 - r.q0 for r in found), sum(r.k1 - r.k0 for r in found)
    gathered = int((entries.depth + entries.end - entries.start).sum())
    return Traffic(forest.num_tokens, reached, shared, gathered - forest.num_tokens)


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def gathers_forward(forest: Forest, heads: int, kv_heads: int) -> bool:
    """Whether a forward that gathers keys moves fewer bytes than one that merges partial outputs; False where nothing is shared.

    The copies of keys and values then take at most about as much memory as the queries and outputs.
    """
    counts = traffic(forest)
    return bool(counts.reached) and counts.gathered_forward(kv_heads) < counts.merged_forward(heads)


@lru_cache(maxsize=2 * CACHED_LAYOUTS)
def gathers_backward(forest: Forest, heads: int, kv_heads: int) -> bool:
    """The same of a backward. Gradients of copies are made for each query head, so there are at most as many copies as keys."""
    counts = traffic(forest)
    if not counts.reached or counts.copied > counts.tokens:
        return False
    return counts.gathered_backward(heads, kv_heads) < counts.merged_backward(heads, kv_heads)


@lru_cache(maxsize=CACHED_LAYOUTS)
def gathered_call(forest: Forest, device: torch.device, stream: int = 0) -> GatheredCall:
    """The call of a forest, made and uploaded once for all layers."""
    entries = chains(forest)
    index: list[np.ndarray] = []
    for first, end, top in zip(*(x.tolist() for x in (entries.start, entries.end, entries.top)), strict=True):
        path = [np.arange(first, end)]
        while (top := int(forest.parent[top])) >= 0:
            path.append(np.arange(forest.start[top], forest.end[top]))
        index += reversed(path)
    key_of = np.concatenate(index)
    q_lengths = entries.end - np.maximum(entries.start, forest.num_given)
    k_lengths = entries.depth + entries.end - entries.start
    tables = [
        np.concatenate(([0], np.cumsum(q_lengths))),
        np.concatenate(([0], np.cumsum(k_lengths))),
        np.concatenate(([0], np.cumsum(np.bincount(key_of, minlength=forest.num_tokens)))),
        key_of,
        np.argsort(key_of, kind="stable"),
    ]
    padded = [np.pad(table, (0, -len(table) % 4)) for table in tables]  # each begins at 16 bytes
    parts = upload(np.concatenate(padded).astype(np.int32), device).split([len(table) for table in padded])
    cu_q, cu_k, first_copy, rows, copies = (part[: len(table)] for part, table in zip(parts, tables, strict=True))
    return GatheredCall(cu_q, cu_k, max(int(q_lengths.max()), 2), int(k_lengths.max()), rows, copies, first_copy)


def gathered_forward(
    op: Any, q: Tensor, k: Tensor, v: Tensor, call: GatheredCall, scale: float
) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D]`` and ``lse [H, Q]``; arguments as in `cuda.varlen_forward`."""
    keys, values = (x.index_select(0, call.key_of) for x in (k, v))
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
    keys, values = (x.index_select(0, call.key_of) for x in (k, v))
    grads = op(do, q, keys, values, out, lse, *call[:4], 0.0, True, *unread_states(q.device), scale=scale)
    dk, dv = (sum_copies(grad, call.key_of, call.copies, call.first_copy) for grad in grads[1:3])
    return grads[0], dk, dv
