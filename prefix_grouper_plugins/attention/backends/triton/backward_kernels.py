"""Triton kernels of the backward: FlashAttention-2 (arXiv 2307.08691, section 3.2) over the spans of `tables`.

dQ and dK/dV are kernels of their own that each recompute the scores: no atomics, so the sums have one order and the
gradients are the same in every run. Where the queries of a block of keys are shared out, ``add_slots_kernel`` adds up.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from prefix_grouper_plugins.attention.backends.triton.scores import scaled_scores, visible
from prefix_grouper_plugins.attention.triton_tiles import load_tile, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_tokens"])
def delta_kernel(
    do_pointer, out_pointer, delta_pointer, do_stride, do_head, out_stride, out_head, num_tokens,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta [H, Q] = sum(dO * O)`` over dims, in float32; grid ``(ceil(Q / BLOCK_M), H)``."""
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    tokens = first + tl.arange(0, BLOCK_M)
    do_pointer += head * do_head
    out_pointer += head * out_head
    grad = load_tile(do_pointer, first, num_tokens, do_stride, BLOCK_M, VALUE_DIM, VALUE_PADDED, True)
    out = load_tile(out_pointer, first, num_tokens, out_stride, BLOCK_M, VALUE_DIM, VALUE_PADDED, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_pointer + head * num_tokens + tokens, delta, mask=tokens < num_tokens)


@triton.jit
def _dq_of_keys(
    total, query, grad, lse, delta, first, end, first_query, k_pointer, v_pointer, k_stride, v_stride,
    ends_pointer, depth_pointer, query_depth, window, inner, outer,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the keys ``[first, first + BLOCK_N)`` add to dQ, less those at or past ``end`` if MASKED."""
    key = load_tile(k_pointer, first, end, k_stride, BLOCK_N, HEAD_DIM, HEAD_PADDED, MASKED)
    value = load_tile(v_pointer, first, end, v_stride, BLOCK_N, VALUE_DIM, VALUE_PADDED, MASKED)
    products = tl.dot(query, tl.trans(key), input_precision="tf32x3")
    scores, tanh = scaled_scores(products, inner, outer, CAPPED)
    weights = tl.exp2(scores - lse[:, None])
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
        weights = tl.where(seen, weights, 0.0)
    if CAPPED:
        weights = weights * (1.0 - tanh * tanh)
    ds = weights * (tl.dot(grad, tl.trans(value), input_precision="tf32x3") - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, total, input_precision="tf32x3")


@triton.jit(do_not_specialize=["num_tokens", "num_given", "window", "group", "size_class"])
def dq_kernel(
    q_pointer, k_pointer, v_pointer, do_pointer, lse_pointer, delta_pointer, dq_pointer,
    ends_pointer, depth_pointer, rows_pointer, spans_pointer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dq_stride, dq_head,
    num_tokens, num_given, group, window, inner, outer, scale, size_class,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TABLE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dq [Q, H, D]``; grid ``(blocks * TABLE_BLOCK / BLOCK_M, H)``."""
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
    head = head.to(tl.int64)
    queries = first_query + tl.arange(0, BLOCK_M)
    query = load_tile(
        q_pointer + head * q_head,
        first_row,
        num_tokens - num_given,
        q_stride,
        BLOCK_M,
        HEAD_DIM,
        HEAD_PADDED,
        True,
    )
    grad = load_tile(
        do_pointer + head * do_head,
        first_row,
        num_tokens - num_given,
        do_stride,
        BLOCK_M,
        VALUE_DIM,
        VALUE_PADDED,
        True,
    )
    statistics = head * (num_tokens - num_given) + first_row + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_pointer + statistics, mask=queries < num_tokens, other=0.0) * LOG2_E
    delta = tl.load(delta_pointer + statistics, mask=queries < num_tokens, other=0.0)
    query_depth = queries
    if WINDOWED:
        query_depth = tl.load(depth_pointer + queries, mask=queries < num_tokens, other=0)
    total = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    for span in range(begin, middle):
        last = tl.load(spans_pointer + 2 * span + 1)
        for first in range(tl.load(spans_pointer + 2 * span), last, BLOCK_N):
            total = _dq_of_keys(
                total, query, grad, lse, delta, first, last, first_query, k_pointer, v_pointer, k_stride, v_stride,
                ends_pointer, depth_pointer, query_depth, window, inner, outer,
                HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    for span in range(middle, end):
        last = tl.minimum(tl.load(spans_pointer + 2 * span + 1), first_query + BLOCK_M)  # no key after its query
        for first in range(tl.load(spans_pointer + 2 * span), last, BLOCK_N):
            total = _dq_of_keys(
                total, query, grad, lse, delta, first, last, first_query, k_pointer, v_pointer, k_stride, v_stride,
                ends_pointer, depth_pointer, query_depth, window, inner, outer,
                HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    store_tile(
        dq_pointer + head * dq_head,
        total * scale,
        first_row,
        num_tokens - num_given,
        dq_stride,
        BLOCK_M,
        HEAD_DIM,
        HEAD_PADDED,
    )


@triton.jit
def _dkdv_of_queries(
    dk, dv, key, value, key_ends, key_depth, first, end, first_key, q_pointer, do_pointer, lse_pointer, delta_pointer,
    q_stride, do_stride, depth_pointer, window, inner, outer,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the queries ``[first, first + BLOCK_M)`` add to dK and dV, less those at or past ``end`` if MASKED.
    Positions of queries and of keys are counted from the first query, so those of given keys are negative.

    Scores are transposed, ``[keys, queries]``, so that the weights enter the second product as they are.
    """
    query = load_tile(q_pointer, first, end, q_stride, BLOCK_M, HEAD_DIM, HEAD_PADDED, MASKED)
    queries = first + tl.arange(0, BLOCK_M)
    if MASKED:
        lse = tl.load(lse_pointer + queries, mask=queries < end, other=0.0)
        delta = tl.load(delta_pointer + queries, mask=queries < end, other=0.0)
    else:
        lse = tl.load(lse_pointer + queries)
        delta = tl.load(delta_pointer + queries)
    products = tl.dot(key, tl.trans(query), input_precision="tf32x3")
    scores, tanh = scaled_scores(products, inner, outer, CAPPED)
    weights = tl.exp2(scores - (lse * LOG2_E)[None, :])
    if MASKED:
        keys = first_key + tl.arange(0, BLOCK_N)
        query_depth = queries
        if WINDOWED:
            query_depth = tl.load(depth_pointer + queries, mask=queries < end, other=0)
        queries = tl.where(queries < end, queries, -0x40000000)  # before all keys, given ones too: sees none
        seen = visible(
            queries[None, :],
            keys[:, None],
            key_ends[:, None],
            query_depth[None, :],
            key_depth[:, None],
            window,
            WINDOWED,
        )
        weights = tl.where(seen, weights, 0.0)
    slopes = weights
    if CAPPED:
        slopes = weights * (1.0 - tanh * tanh)
    grad = load_tile(do_pointer, first, end, do_stride, BLOCK_M, VALUE_DIM, VALUE_PADDED, MASKED)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="tf32x3")
    ds = slopes * (tl.dot(value, tl.trans(grad), input_precision="tf32x3") - delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit(do_not_specialize=["num_tokens", "num_given", "window", "group", "size_class"])
def dkdv_kernel(
    q_pointer, k_pointer, v_pointer, do_pointer, lse_pointer, delta_pointer, dk_pointer, dv_pointer,
    dk_slots_pointer, dv_slots_pointer, ends_pointer, depth_pointer, rows_pointer, spans_pointer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head,
    dk_stride, dk_head, dv_stride, dv_head,
    num_tokens, num_given, group, window, inner, outer, scale, size_class,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, VALUE_PADDED: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, TABLE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV ``[T, H_kv, D]`` of an item, or its partial sums; grid ``(items * TABLE_BLOCK / BLOCK_N, H_kv)``.

    Slots are ``[slots, TABLE_BLOCK, H_kv, D]``. The query heads that share the key head are added in their order.
    """
    parts: tl.constexpr = TABLE_BLOCK // BLOCK_N
    row = rows_pointer + tl.program_id(0) // parts * 5
    kv_head = tl.program_id(1).to(tl.int64)
    block, slot, inside = tl.load(row), tl.load(row + 4), tl.program_id(0) % parts * BLOCK_N
    first_key = block * TABLE_BLOCK + inside
    if first_key >= num_tokens:
        return
    begin, middle, end = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    keys = first_key + tl.arange(0, BLOCK_N)
    key = load_tile(k_pointer + kv_head * k_head, first_key, num_tokens, k_stride, BLOCK_N, HEAD_DIM, HEAD_PADDED, True)
    value = load_tile(
        v_pointer + kv_head * v_head, first_key, num_tokens, v_stride, BLOCK_N, VALUE_DIM, VALUE_PADDED, True
    )
    key_ends = tl.load(ends_pointer + keys, mask=keys < num_tokens, other=0)
    key_depth = key_ends
    if WINDOWED:
        key_depth = tl.load(depth_pointer + keys, mask=keys < num_tokens, other=0)
    key_ends -= num_given
    depth_pointer += num_given
    first_row = first_key - num_given
    dk = tl.zeros([BLOCK_N, HEAD_PADDED], tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE_PADDED], tl.float32)
    for head_in_group in range(0, group):
        head = kv_head * group + head_in_group
        q_base, do_base = q_pointer + head * q_head, do_pointer + head * do_head
        statistics = head * (num_tokens - num_given)
        lse_base, delta_base = lse_pointer + statistics, delta_pointer + statistics
        for span in range(begin, middle):
            last = tl.load(spans_pointer + 2 * span + 1)
            for first in range(tl.load(spans_pointer + 2 * span), last, BLOCK_M):
                dk, dv = _dkdv_of_queries(
                    dk, dv, key, value, key_ends, key_depth, first, last, first_row, q_base, do_base, lse_base,
                    delta_base, q_stride, do_stride, depth_pointer, window, inner, outer,
                    HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, False, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        for span in range(middle, end):
            last = tl.load(spans_pointer + 2 * span + 1)
            start = tl.maximum(tl.load(spans_pointer + 2 * span), first_row)  # no query before its key
            for first in range(start, last, BLOCK_M):
                dk, dv = _dkdv_of_queries(
                    dk, dv, key, value, key_ends, key_depth, first, last, first_row, q_base, do_base, lse_base,
                    delta_base, q_stride, do_stride, depth_pointer, window, inner, outer,
                    HEAD_DIM, VALUE_DIM, HEAD_PADDED, VALUE_PADDED, WINDOWED, CAPPED, True, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    dk = dk * scale
    if slot < 0:
        store_tile(dk_pointer + kv_head * dk_head, dk, first_key, num_tokens, dk_stride, BLOCK_N, HEAD_DIM, HEAD_PADDED)
        store_tile(
            dv_pointer + kv_head * dv_head, dv, first_key, num_tokens, dv_stride, BLOCK_N, VALUE_DIM, VALUE_PADDED
        )
    else:
        first_row = slot * TABLE_BLOCK + inside
        slots_end = (slot + 1) * TABLE_BLOCK
        store_tile(
            dk_slots_pointer + kv_head * dk_head, dk, first_row, slots_end, dk_stride, BLOCK_N, HEAD_DIM, HEAD_PADDED
        )
        store_tile(
            dv_slots_pointer + kv_head * dv_head, dv, first_row, slots_end, dv_stride, BLOCK_N, VALUE_DIM, VALUE_PADDED
        )


@triton.jit(do_not_specialize=["num_tokens"])
def add_slots_kernel(
    slots_pointer, grad_pointer, rows_pointer, stride, head_stride, num_tokens,
    DIM: tl.constexpr, PADDED: tl.constexpr, TABLE_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum of the slots of a block, in their order; grid ``(split blocks * TABLE_BLOCK / BLOCK_M, H_kv)``."""
    parts: tl.constexpr = TABLE_BLOCK // BLOCK_M
    row = rows_pointer + tl.program_id(0) // parts * 3
    inside = tl.program_id(0) % parts * BLOCK_M
    block, slot, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    head = tl.program_id(1).to(tl.int64) * head_stride
    total = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for i in range(slot, slot + count):
        first = i * TABLE_BLOCK + inside
        total += load_tile(slots_pointer + head, first, first + BLOCK_M, stride, BLOCK_M, DIM, PADDED, False)
    store_tile(grad_pointer + head, total, block * TABLE_BLOCK + inside, num_tokens, stride, BLOCK_M, DIM, PADDED)
