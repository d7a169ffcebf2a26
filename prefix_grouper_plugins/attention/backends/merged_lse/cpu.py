"""The path of `merged_lse` on the CPU: a call of torch's flash kernel for each triangle and each rectangle.

The backward of the kernel computes some of the hidden pairs of a triangle too, so in float32 and float64 long triangles are
halved there, again and again, into two triangles and the rectangle between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends.merged_lse.merge import merge
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import rectangles
from prefix_grouper_plugins.attention.device import accumulation_dtype, dense_rows
from prefix_grouper_plugins.attention.first_derivative import first_derivative_only
from prefix_grouper_plugins.forest import CACHED_LAYOUTS, Forest
from prefix_grouper_plugins.layout import MAX_TOKENS

# Longer triangles are halved in the backward, by bytes of an element. Measured on Intel Xeon, 319 to 2,559 tokens: in
# float32 and float64 64 to 256 do about equally well, and whole triangles take up to 1.2 times as long. In half precision
# a call costs so much that whole triangles are the fastest, up to 2.4 times. So they are in every forward.
LONGEST_TRIANGLE = {2: MAX_TOKENS, 4: 128, 8: 128}


class _Triangle(NamedTuple):
    """Tokens ``[start, end)`` among themselves, causally."""

    start: int
    end: int


class _Call(NamedTuple):
    """Queries ``[q0, q1)`` on keys ``[k0, k1)``, never empty: the CPU op dies of empty ones."""

    q0: int
    q1: int
    k0: int
    k1: int


class _Plan(NamedTuple):
    """By packed position. The triangles set each row, in packed order; then the rectangles merge into it."""

    triangles: tuple[_Triangle, ...]
    rectangles: tuple[_Call, ...]

    @property
    def is_one_call(self) -> bool:
        """Whether one triangle of all keys is all there is: its results need neither copies nor merging.

        Given keys that no query sees are in no rectangle either.
        """
        return len(self.triangles) == 1 and self.triangles[0].start == 0 and not self.rectangles


def copies_for_both(q: Tensor, k: Tensor, forest: Forest) -> None:
    """No keys are copied here; see `cuda.copies_for_both`."""


@lru_cache(maxsize=CACHED_LAYOUTS)
def plan(forest: Forest, longest: int) -> _Plan:
    """Triangles of at most ``longest`` tokens (at least 2), and the rectangles left of and below them."""
    if forest.is_one_row and not forest.num_given and forest.num_tokens <= longest:
        return _Plan((_Triangle(0, forest.num_tokens),), ())
    triangles, between = [], []
    for start, end in zip(forest.start.tolist(), forest.end.tolist(), strict=True):
        waiting = [(start, end)] if start >= forest.num_given else []
        while waiting:
            first, behind = waiting.pop()
            if behind - first <= longest:
                triangles.append(_Triangle(first, behind))
                continue
            step = longest // 2  # the kernel works in blocks of a power of two
            middle = first + ((behind - first) // 2 + step // 2) // step * step
            between.append(_Call(middle, behind, first, middle))
            waiting += [(middle, behind), (first, middle)]
    below = [_Call(r.q0, r.q1, r.k0, r.k1) for r in rectangles(forest)]
    return _Plan(tuple(triangles), tuple(sorted(below + between, key=lambda call: (call.k0, -call.q1))))


@lru_cache
def kernel_groups_heads() -> bool:
    """Whether torch's CPU flash kernel knows that query heads may share key heads. That of torch 2.8 does not.

    It reads past the keys instead, without an error, so it is asked with keys that others follow.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    query = torch.zeros(1, 2, 1, 8)
    other = torch.tensor([1.0, 2.0])[None, :, None, None].expand(1, 2, 1, 8).contiguous()
    out, _ = op(query, other[:, :1], other[:, :1], 0.0, False)  # one key: its value is the output
    return bool((out == 1.0).all())


def _for_each_head(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values for ``heads`` query heads, repeated where the kernel does not share them."""
    if k.shape[1] == heads or kernel_groups_heads():
        return k, v
    return k.repeat_interleave(heads // k.shape[1], 1), v.repeat_interleave(heads // v.shape[1], 1)


def _heads(x: Tensor) -> Tensor:
    """``[N, H, D]`` to a view ``[1, H, N, D]``, as the kernel takes it: made once, since each call takes a part of it."""
    return x.transpose(0, 1).unsqueeze(0)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``out [T, H, D]`` of causal attention, of ``[T, H, D]``, ``[T, H_kv, D]`` twice. torch knows its derivative."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = (dense_rows(x) for x in (q, k, v))
    out, _ = op(_heads(q), *map(_heads, _for_each_head(k, v, q.shape[1])), 0.0, True, scale=scale)
    if out.grad_fn is not None:
        out.grad_fn.register_hook(first_derivative_only)
    return out[0].transpose(0, 1)  # type: ignore[no-any-return]


def forward(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float) -> tuple[Tensor, Tensor]:
    """``out [Q, H, D]`` and ``lse [H, Q]`` of ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D]``.

    In float32 or float64; ``out`` is in the dtype of ``q`` where nothing is merged.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    acc, given = accumulation_dtype(q.dtype), forest.num_given
    q, k, v = (dense_rows(x) for x in (q, k, v))
    k, v = _for_each_head(k, v, q.shape[1])
    q_, k_, v_ = map(_heads, (q, k, v))
    steps = plan(forest, MAX_TOKENS)
    if steps.is_one_call:
        whole_out, whole_lse = op(q_, k_, v_, 0.0, True, scale=scale)
        return whole_out[0].transpose(0, 1), whole_lse[0].to(acc)
    out = torch.empty(q.shape, dtype=acc)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=acc)
    out_, lse_ = _heads(out), lse[None]
    for start, end in steps.triangles:
        length, row = end - start, start - given
        keys, values = k_.narrow(2, start, length), v_.narrow(2, start, length)
        partial_out, partial_lse = op(q_.narrow(2, row, length), keys, values, 0.0, True, scale=scale)
        out_.narrow(2, row, length).copy_(partial_out)
        lse_.narrow(2, row, length).copy_(partial_lse)
    for q0, q1, k0, k1 in steps.rectangles:
        rows = slice(q0 - given, q1 - given)
        keys, values = k_.narrow(2, k0, k1 - k0), v_.narrow(2, k0, k1 - k0)
        partial_out, partial_lse = op(q_.narrow(2, rows.start, q1 - q0), keys, values, 0.0, False, scale=scale)
        merge(out[rows], lse[:, rows], partial_out[0].transpose(0, 1), partial_lse[0].to(acc))
    return out, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, forest: Forest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32 or float64, or in their dtype where there is nothing to add up.

    Args:
        do, out: ``[Q, H, D]``, the gradient of the merged output, and that output; lse: ``[H, Q]``, merged.
        q, k, v, forest, scale: as in `forward`.
    """
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    given, kv_heads = forest.num_given, k.shape[1]
    do, q, k, v, out = (dense_rows(x) for x in (do, q, k, v, out))
    k, v = _for_each_head(k, v, q.shape[1])
    steps = plan(forest, LONGEST_TRIANGLE[q.itemsize])
    (do_, q_, k_, v_, out_), lse_ = map(_heads, (do, q, k, v, out)), lse[None]
    if steps.is_one_call:
        grads = op(do_, q_, k_, v_, out_, lse_, 0.0, True, scale=scale)
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return _of_groups(dq, dk, dv, kv_heads)
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype) for x in (q, k, v))
    dk[:given], dv[:given] = 0, 0  # the only rows without a triangle
    dq_, dk_, dv_ = map(_heads, (dq, dk, dv))

    def partial(q0: int, q1: int, k0: int, k1: int, causal: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a call's gradients of q, k and v belong, and these."""
        row, rows, keys = q0 - given, q1 - q0, k1 - k0
        of_rows = [x.narrow(2, row, rows) for x in (do_, q_, out_, lse_, dq_)]
        of_keys = [x.narrow(2, k0, keys) for x in (k_, v_, dk_, dv_)]
        grads = op(*of_rows[:2], *of_keys[:2], *of_rows[2:4], 0.0, causal, scale=scale)
        return zip((of_rows[4], *of_keys[2:]), grads, strict=True)

    for start, end in steps.triangles:
        for total, grad in partial(start, end, start, end, True):
            total.copy_(grad)
    for rectangle in steps.rectangles:
        for total, grad in partial(*rectangle, False):
            total.add_(grad)
    return _of_groups(dq, dk, dv, kv_heads)


def _of_groups(dq: Tensor, dk: Tensor, dv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, those of keys and values for the heads that they had before :func:`_for_each_head`."""
    if dk.shape[1] != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv
