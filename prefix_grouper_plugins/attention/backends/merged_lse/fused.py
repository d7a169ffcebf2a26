"""Triton kernels for `merged_lse`: merging partial outputs, adding partial gradients, summing those of copies, in one pass each.

Torch makes each of them out of several kernels with float32 copies between them; these read what a flash kernel wrote, in
its dtype, compute in float32, and update the sums in place. Rows in gaps are left alone, whatever a kernel wrote there.
Imported only where `device.why_not_triton` has no reason against it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefix_grouper_plugins.attention.triton_tiles import load_tile, store_tile

# Rows of a program.
ROWS = tl.constexpr(32)
# Elements of a row that a program of `sum_copies` adds up.
COLUMNS = 1024


def merge(out: Tensor, lse: Tensor, partial_out: Tensor, partial_lse: Tensor, gaps: Tensor | None) -> None:
    """Merge one partial into ``out`` and ``lse``, in place.

    Args:
        out: ``[N, H, D]`` in any dtype but float64, each row finite.
        lse: ``[H, N]`` float32, finite.
        partial_out: ``[N, H, D]`` in any dtype; partial_lse: ``[H, N]`` float32.
        gaps: ``BoolTensor[N]``, True where the partial has nothing to say; None for no such row.
    """
    rows, heads, dim = out.shape
    with torch.cuda.device_of(out):
        _merge_kernel[(triton.cdiv(rows, ROWS.value), heads)](
            out, lse, partial_out, partial_lse, lse if gaps is None else gaps.view(torch.uint8),
            *out.stride()[:2], *lse.stride(), *partial_out.stride()[:2], *partial_lse.stride(), rows,
            DIM=dim, PADDED=triton.next_power_of_2(dim), GAPS=gaps is not None,
        )  # fmt: skip


def accumulate(total: Tensor, partial: Tensor, gaps: Tensor | None) -> None:
    """``total += partial`` outside ``gaps``, ``[N, H, D]`` each, in any dtype but float64."""
    rows, heads, dim = total.shape
    with torch.cuda.device_of(total):
        _accumulate_kernel[(triton.cdiv(rows, ROWS.value), heads)](
            total, partial, total if gaps is None else gaps.view(torch.uint8), *total.stride()[:2], *partial.stride()[:2], rows,
            DIM=dim, PADDED=triton.next_power_of_2(dim), GAPS=gaps is not None,
        )  # fmt: skip


def sum_copies(grad: Tensor, copies: Tensor, first_copy: Tensor, total: Tensor) -> None:
    """Write the sum over its copies of each key's gradient, in the order of ``copies``.

    Args:
        grad: ``[C, H, D]``, contiguous; copies: ``IntTensor[C]``, its rows by key; first_copy: ``IntTensor[T + 1]``.
        total: ``[T, H, D]``, contiguous.
    """
    width = total.shape[1] * total.shape[2]
    block = min(COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(total):
        _sum_copies_kernel[(len(total), triton.cdiv(width, block))](
            grad, copies, first_copy, total, width, COLUMNS=block
        )  # fmt: skip


# The stride of heads in `lse` is the number of tokens, and rows begin anywhere: neither is worth compiling another kernel.
@triton.jit(
    do_not_specialize=["num_rows", "lse_head", "partial_lse_head"],
    do_not_specialize_on_alignment=["lse_pointer", "partial_lse_pointer"],
)
def _merge_kernel(
    out_pointer, lse_pointer, partial_out_pointer, partial_lse_pointer, gaps_pointer,
    out_stride, out_head, lse_head, lse_stride, partial_stride, partial_head, partial_lse_head, partial_lse_stride,
    num_rows, DIM: tl.constexpr, PADDED: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    used = rows < num_rows
    lse_pointers = lse_pointer + head * lse_head + rows * lse_stride
    partial_lse_pointers = partial_lse_pointer + head * partial_lse_head + rows * partial_lse_stride
    lse = tl.load(lse_pointers, mask=used, other=0.0)
    partial_lse = tl.load(partial_lse_pointers, mask=used, other=0.0)
    if GAPS:
        used = used & (tl.load(gaps_pointer + rows, mask=used, other=1) == 0)
    top = tl.maximum(lse, partial_lse)
    merged = top + tl.log(tl.exp(lse - top) + tl.exp(partial_lse - top))
    out_pointer += head * out_head
    partial_out_pointer += head * partial_head
    out = load_tile(out_pointer, first, num_rows, out_stride, ROWS, DIM, PADDED, True).to(tl.float32)
    partial = load_tile(partial_out_pointer, first, num_rows, partial_stride, ROWS, DIM, PADDED, True)
    both = out * tl.exp(lse - merged)[:, None] + partial.to(tl.float32) * tl.exp(partial_lse - merged)[:, None]
    store_tile(out_pointer, tl.where(used[:, None], both, out), first, num_rows, out_stride, ROWS, DIM, PADDED)
    tl.store(lse_pointers, merged, mask=used)


@triton.jit(do_not_specialize=["num_rows"])
def _accumulate_kernel(
    total_pointer, partial_pointer, gaps_pointer, total_stride, total_head, partial_stride, partial_head,
    num_rows, DIM: tl.constexpr, PADDED: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
    total_pointer += head * total_head
    total = load_tile(total_pointer, first, num_rows, total_stride, ROWS, DIM, PADDED, True).to(tl.float32)
    partial_pointer += head * partial_head
    partial = load_tile(partial_pointer, first, num_rows, partial_stride, ROWS, DIM, PADDED, True).to(tl.float32)
    if GAPS:
        in_gap = tl.load(gaps_pointer + rows, mask=rows < num_rows, other=1) != 0
        partial = tl.where(in_gap[:, None], 0.0, partial)
    store_tile(total_pointer, total + partial, first, num_rows, total_stride, ROWS, DIM, PADDED)


@triton.jit
def _sum_copies_kernel(grad_pointer, copies_pointer, first_pointer, total_pointer, width, COLUMNS: tl.constexpr):
    key = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([COLUMNS], tl.float32)
    for place in range(tl.load(first_pointer + key), tl.load(first_pointer + key + 1)):
        row = tl.load(copies_pointer + place).to(tl.int64)
        total += tl.load(grad_pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_pointer + key * width + columns, total.to(total_pointer.dtype.element_ty), mask=inside)
