"""Loading and storing tiles, for all Triton kernels. Imported only when a kernel runs: triton may not be installed."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    pointer, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr
):
    """Rows ``[first, first + ROWS)`` of ``WIDTH`` columns as ``[ROWS, PADDED]``; zeros past ``end`` if BOUNDED."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if BOUNDED:
        inside = (first + rows < end)[:, None]
        if PADDED != WIDTH:
            inside = inside & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif PADDED != WIDTH:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(pointer, tile, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write ``tile [ROWS, PADDED]`` to rows ``[first, end)`` of ``WIDTH`` columns, in the dtype of ``pointer``."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)
