"""Triton kernel of the forward: FlashAttention-2 (arXiv 2307.08691, section 3.1) over the spans of `tables`.

One program holds a tile of queries of one head and goes through its full spans without a mask, then through its masked
ones. Softmax is in base 2. Names in capitals are compile-time constants.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from prefix_grouper_plugins.attention.backends.triton.scores import scaled_scores, visible
from prefix_grouper_plugins.attention.triton_tiles import load_tile, store_tile

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add_keys(
    state, query, first, end, first_query, k_pointer, v_pointer, k_stride, v_stride, ends_pointer, depth_pointer,
    query_depth, window, inner, outer,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys ``[first, first + BLOCK_N)``, less those at or past ``end`` if MASKED."""
    total, top, norm = state
    key = load_tile(k_pointer, first, end, k_stride, BLOCK_N, HEAD_DIM, HEAD_PADDED, MASKED)
    value = load_tile(v_pointer, first, end, v_stride, BLOCK_N, VALUE_DIM, VALUE_PADDED, MASKED)
    products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
    scores, _ = scaled_scores(products, inner, outer, CAPPED)
    if MASKED:
        queries = first_query + tl.arange(0, BLOCK_M)
        keys = first + tl.arange(0, BLOCK_N)
        key_ends = tl.load(ends_pointer + keys, mask=keys < end, other=0)
        key_depth = key_ends
        if WINDOWED:
            key_depth = tl.load(depth_pointer + keys, mask=keys < end, other=0)
        seen = visible(
            queries[:, None],
            keys[None, :],
            key_ends[None, :],
            query_depth[:, None],
            key_depth[None, :],
            window,
            WINDOWED,
        )
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = new_top
    if MASKED:  # a row that has seen no key yet
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(top - shift)
    norm = norm * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(value.dtype), value, total * shrink[:, None], input_precision="tf32x3")
    return total, new_top, norm


@triton.jit(do_not_specialize=["num_tokens", "num_given", "window", "group", "size_class"])
def forward_kernel(
    q_pointer, k_pointer, v_pointer, out_pointer, lse_pointer,
    ends_pointer, depth_pointer, rows_pointer, spans_pointer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    num_tokens, num_given, group, window, inner, outer, size_class,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TABLE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out [Q, H, D_v]`` and ``lse [H, Q]`` (natural log); grid ``(blocks * TABLE_BLOCK / BLOCK_M, H)``."""
    parts: tl.constexpr = TABLE_BLOCK // BLOCK_M
    row = rows_pointer + tl.program_id(0) // parts * 5
    head = tl.program_id(1)
    # Tensors of queries begin at packed position num_given; the mask compares packed positions.
    first_row = tl.load(row) * TABLE_BLOCK + tl.program_id(0) % parts * BLOCK_M
    first_query = num_given + first_row
    if first_query >= num_tokens:
        return
    begin, middle, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    k_pointer += (head // group).to(tl.int64) * k_head
    v_pointer += (head // group).to(tl.int64) * v_head
    queries = first_query + tl.arange(0, BLOCK_M)
    query = load_tile(
        q_pointer + head.to(tl.int64) * q_head,
        first_row,
        num_tokens - num_given,
        q_stride,
        BLOCK_M,
        HEAD_DIM,
        HEAD_PADDED,
        True,
    )
    query_depth = queries
    if WINDOWED:
        query_depth = tl.load(depth_pointer + queries, mask=queries < num_tokens, other=0)
    total = tl.zeros([BLOCK_M, VALUE_PADDED], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    for span in range(begin, middle):
        last = tl.load(spans_pointer + 2 * span + 1)
        for first in range(tl.load(spans_pointer + 2 * span), last, BLOCK_N):
            total, top, norm = _add_keys(
                (total, top, norm), query, first, last, first_query, k_pointer, v_pointer, k_stride, v_stride,
                ends_pointer, depth_pointer, query_depth, window, inner, outer,
                HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    for span in range(middle, end):
        last = tl.minimum(tl.load(spans_pointer + 2 * span + 1), first_query + BLOCK_M)  # no key after its query
        for first in range(tl.load(spans_pointer + 2 * span), last, BLOCK_N):
            total, top, norm = _add_keys(
                (total, top, norm), query, first, last, first_query, k_pointer, v_pointer, k_stride, v_stride,
                ends_pointer, depth_pointer, query_depth, window, inner, outer,
                HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_M)
    num_rows = num_tokens - num_given
    out_pointer += head.to(tl.int64) * out_head
    store_tile(out_pointer, total / norm[:, None], first_row, num_rows, out_stride, BLOCK_M, VALUE_DIM, VALUE_PADDED)
    lse = (top + tl.log2(norm)) * LN_2
    tl.store(lse_pointer + head.to(tl.int64) * num_rows + rows, lse, mask=rows < num_rows)
