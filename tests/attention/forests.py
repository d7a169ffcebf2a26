"""Helpers of the attention tests: random forests, inputs, a row-by-row reference and emulated CUDA flash ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.layout import PrefixLayout

CPU_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A tree is (tokens of its root, its children).
Tree = tuple[int, list[Any]]


def layout_of(trees: list[Tree]) -> PrefixLayout:
    """A layout whose forest is ``trees``, each segment with tokens of its own.

    Rows end at the leaves, and at inner segments of odd length too, so that chains of only children occur. By the
    branch rule a row of L tokens has L - 1 positions: each row starts with one token more than its path is long.
    """
    rows: list[Tensor] = []
    keys: list[int] = []
    fresh = 1

    def walk(tree: Tree, above: list[int], key: int) -> None:
        nonlocal fresh
        length, children = tree
        tokens = above + list(range(fresh, fresh + length))
        fresh += length
        for child in children:
            walk(child, tokens, key)
        if not children or length % 2:
            rows.append(torch.tensor(tokens))
            keys.append(key)

    for key, tree in enumerate(trees):
        walk(tree, [0], key)
    return PrefixLayout.from_rows(rows, keys)


@st.composite
def layouts(draw: st.DrawFn, max_depth: int = 4, max_length: int = 40, max_segments: int = 14) -> PrefixLayout:
    """Random forests of one to three trees, up to ``max_depth`` levels below a root, small enough for the oracle."""
    left = max_segments

    def tree(depth: int) -> Tree:
        nonlocal left
        left -= 1
        length = draw(st.integers(1, max_length))
        children = min(draw(st.integers(0, 3)), left) if depth else 0
        return length, [tree(depth - 1) for _ in range(children) if left > 0]

    return layout_of([tree(draw(st.integers(0, max_depth))) for _ in range(draw(st.integers(1, 3))) if left > 0])


@dataclass(frozen=True)
class Features:
    """What one attention layer asks for."""

    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def options(self) -> dict[str, Any]:
        return {"sliding_window": self.window, "softcap": self.softcap}


FEATURES: dict[str, dict[str, Any]] = {
    "gqa": {"heads": 6, "kv_heads": 2},
    "window": {"window": 9},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "value_dim": {"head_dim": 12, "value_dim": 5},
}
PAIRS = [(a, b) for i, a in enumerate(FEATURES) for b in list(FEATURES)[i:]]


def features_of(names: tuple[str, ...]) -> Features:
    features = Features()
    for name in names:
        features = replace(features, **FEATURES[name])
    return features


def inputs(layout: PrefixLayout, features: Features, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Query, key, value and, if asked for, sinks; leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.num_tokens
    shapes: list[tuple[int, ...]] = [
        (tokens, features.heads, features.head_dim),
        (tokens, features.kv_heads, features.head_dim),
        (tokens, features.kv_heads, features.value_dim),
    ]
    if features.sinks:
        shapes.append((features.heads,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def attend(layout: PrefixLayout, features: Features, backend: str) -> Any:
    """``(q, k, v, sinks) -> out`` on ``layout``."""
    return lambda q, k, v, sinks: shared_prefix_attention(
        q, k, v, layout, sinks=sinks, backend=backend, **features.options()
    )


def output_and_gradients(attend: Any, tensors: list[Tensor], seed: int = 1) -> list[Tensor]:
    """``attend(q, k, v, sinks)`` and the gradients of all ``tensors`` under a random ``grad_out``."""
    out = attend(*tensors, *[None] * (4 - len(tensors)))
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, tensors, grad_out)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), actual, expected, strict=False):
        assert a.shape == b.shape, name
        error = (a.double() - b.double()).abs().max().item()
        assert error <= tolerance * max(1.0, b.double().abs().max().item()), f"{name} is off by {error:.1e}"
    assert len(actual) == len(expected)


def row_by_row(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, f: Features) -> Tensor:
    """Packed output, each row attended on its own with a loop over its queries; shares no code with the package."""
    scale = f.head_dim**-0.5
    rows: list[Tensor] = []
    for q_row, k_row, v_row in zip(*(layout.unpack(x) for x in (q, k, v)), strict=True):
        queries: list[Tensor] = []
        for t in range(len(q_row)):
            first = 0 if f.window is None else max(0, t - f.window + 1)
            heads: list[Tensor] = []
            for h in range(f.heads):
                kv = h * f.kv_heads // f.heads
                scores = k_row[first : t + 1, kv] @ q_row[t, h] * scale
                if f.softcap is not None:
                    scores = f.softcap * torch.tanh(scores / f.softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                heads.append((weights / total) @ v_row[first : t + 1, kv])
            queries.append(torch.stack(heads))
        # A row of L tokens has L - 1 positions; pack() wants L, and never reads the last.
        rows.append(torch.stack([*queries, torch.zeros_like(queries[0])]))
    return layout.pack(rows)


def _entries(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[int, int, int, int]]:
    """Entries ``(q0, q1, k0, k1)`` of a varlen call; checks what a kernel would rely on."""
    q, k = cu_q.tolist(), cu_k.tolist()
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(q) == len(k) and q[0] == k[0] == 0
    assert max_q == max(2, np.diff(q).max()) and max_k == np.diff(k).max(), "host lengths are not the cumulative ones'"
    assert np.diff(q).min() >= 0 and np.diff(k).min() >= 0
    return list(zip(q, q[1:], k, k[1:], strict=False))


def _heads(x: Tensor, start: int, end: int, repeats: int = 1) -> Tensor:
    """``[1, H, N, D]``, each head ``repeats`` times: the CPU kernel of torch 2.8 reads past keys of fewer heads."""
    return x[start:end].repeat_interleave(repeats, 1).transpose(0, 1).unsqueeze(0)


def _visibility(is_causal: bool, like: Tensor, queries: int, keys: int) -> dict[str, Any]:
    """Causal as the CUDA kernels have it: the last query sees the last key. The CPU kernel aligns the first ones."""
    if not is_causal or queries == keys:
        return {"is_causal": is_causal}
    hidden = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).logical_not()
    return {"is_causal": False, "attn_mask": like.new_zeros(queries, keys).masked_fill(hidden, -torch.inf)}


def emulated_flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    gap_out: float = 0.0,
    gap_lse: float = torch.inf,
) -> tuple[Tensor, ...]:
    """``aten::_flash_attention_forward`` on the CPU; where a query has no keys it writes what FA2 writes."""
    assert cum_seq_q[-1] == len(query) and cum_seq_k[-1] == len(key) == len(value) and dropout_p == 0.0
    out = torch.full_like(query, gap_out)
    lse = query.new_full((query.shape[1], query.shape[0]), gap_lse)
    for q0, q1, k0, k1 in _entries(cum_seq_q, cum_seq_k, max_q, max_k):
        if q1 > q0 and k1 > k0:
            tensors = (_heads(query, q0, q1), *(_heads(x, k0, k1, query.shape[1] // x.shape[1]) for x in (key, value)))
            o, l_ = CPU_FORWARD(*tensors, 0.0, **_visibility(is_causal, query, q1 - q0, k1 - k0), scale=scale)
            out[q0:q1], lse[:, q0:q1] = o[0].transpose(0, 1), l_[0]
    empty = torch.empty(0)
    return out, lse, empty, empty, empty


def emulated_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    gap_grad: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_flash_attention_backward`` on the CPU; where an entry is empty it writes zeros, as FA2 does."""
    grads = (torch.full_like(query, gap_grad), torch.full_like(key, gap_grad), torch.full_like(value, gap_grad))
    for q0, q1, k0, k1 in _entries(cum_seq_q, cum_seq_k, max_q, max_k):
        if q1 > q0 and k1 > k0:
            do, q, o = (_heads(x, q0, q1) for x in (grad_out, query, out))
            k, v = (_heads(x, k0, k1, query.shape[1] // x.shape[1]) for x in (key, value))
            seen = _visibility(is_causal, query, q1 - q0, k1 - k0)
            parts = CPU_BACKWARD(do, q, k, v, o, logsumexp[None, :, q0:q1], 0.0, **seen, scale=scale)
            for grad, part, rows in zip(grads, parts, (slice(q0, q1), slice(k0, k1), slice(k0, k1)), strict=True):
                grad[rows] = part[0].transpose(0, 1).unflatten(1, (grad.shape[1], -1)).sum(2)
    return grads


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operator makes, and the most keys in one that has K's or V's shape."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.numel = self.tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
                if x.dim() >= 2 and x.shape[-1] == self.head_dim:
                    self.tokens = max(self.tokens, x.numel() // (self.kv_heads * self.head_dim))
        return result
