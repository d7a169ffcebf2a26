"""The tables of the Triton kernels: spans cover what is visible exactly once, and only full ones go without a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import forest as plan
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.attention.backends.triton import tables as triton_tables
from prefix_grouper_plugins.attention.backends.triton.tables import Blocks
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import layouts


def assert_covers(blocks: Blocks, visible: np.ndarray, block_size: int) -> None:
    """``visible[i, j]``: token i of a block sees, or is seen by, token j of a span."""
    times = np.zeros(visible.shape, dtype=int)
    for block, begin, middle, end, _ in blocks.rows.tolist():
        rows = slice(block * block_size, (block + 1) * block_size)
        for index, (first, last) in enumerate(blocks.spans[begin:end].tolist(), begin):
            times[rows, first:last] += 1
            if index < middle:
                assert (last - first) % block_size == 0 and visible[rows, first:last].all()
    assert (times[visible] == 1).all() and times.max() == 1


@settings(max_examples=100, deadline=None)
@given(
    layout=layouts(),
    block=st.sampled_from([4, 8, 16]),
    window=st.none() | st.integers(1, 60),
    kv_heads=st.integers(1, 9),
)
def test_spans_cover_each_visible_pair_once(
    layout: PrefixLayout, block: int, window: int | None, kv_heads: int
) -> None:
    forest = plan.forest_of(layout.segments)
    visible = visibility_mask(layout.segments, window).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tables, "TABLE_BLOCK", block)
        patch.setattr(triton_tables, "SHORTEST_ITEM", 4 * block)
        assert_covers(triton_tables.query_blocks(forest, window), visible, block)
        items, split_rows = triton_tables.key_items(forest, window, kv_heads)
        assert_covers(items, visible.T, block)
    slots = items.rows[items.rows[:, 4] >= 0]
    expected = [(block, slot + i) for block, slot, count in split_rows.tolist() for i in range(count)]
    assert sorted(slots[:, [0, 4]].tolist()) == sorted(map(list, expected))


def test_a_group_has_few_spans_and_masks_only_the_diagonal() -> None:
    layout = PrefixLayout.from_groups([8192], [[1024] * 8])
    forest = plan.forest_of(layout.segments)
    blocks = triton_tables.query_blocks(forest, None)
    lengths = blocks.spans[:, 1] - blocks.spans[:, 0]
    full = np.concatenate([np.arange(begin, middle) for _, begin, middle, _, _ in blocks.rows.tolist()])
    assert len(blocks.spans) < 3 * len(blocks.rows)
    assert np.delete(lengths, full).sum() < 0.06 * lengths.sum()


def test_a_window_leaves_out_what_lies_beyond_it() -> None:
    forest = plan.forest_of(PrefixLayout.from_groups([5000], [[500] * 4]).segments)
    for blocks in (triton_tables.query_blocks(forest, 256), triton_tables.key_items(forest, 256, 1)[0]):
        assert (blocks.spans[:, 1] - blocks.spans[:, 0]).sum() * 128 < 6 * 256 * forest.num_tokens


@pytest.mark.parametrize("responses", [[64] * 1000, [2048] * 16], ids=str)
def test_queries_of_a_short_prefix_are_shared_out(responses: list[int]) -> None:
    """256 tokens of prefix: two blocks of keys have all queries; no item has much more than its share of them."""
    forest = plan.forest_of(PrefixLayout.from_groups([256], [responses]).segments)
    items, split_rows = triton_tables.key_items(forest, None, 4)
    work = [
        (items.spans[begin:end, 1] - items.spans[begin:end, 0]).sum() for _, begin, _, end, _ in items.rows.tolist()
    ]
    assert len(split_rows) >= 2
    assert max(work) <= max(triton_tables.SHORTEST_ITEM, sum(work) * 4 / triton_tables.PROGRAMS) + 2 * 128
    assert work == sorted(work, reverse=True)
    # What partial sums take: at most one slot for each program, and one more for each block that is shared out.
    assert split_rows[:, 2].sum() <= triton_tables.PROGRAMS / 4 + len(split_rows)


def test_tables_are_made_once_for_all_layers() -> None:
    forest = plan.forest_of(PrefixLayout.from_groups([64], [[16] * 4]).segments)
    triton_tables.tables.cache_clear()
    made = [triton_tables.tables(forest, None, 2, torch.device("cpu"), 0) for _ in range(3)]
    assert made[0] is made[2] and triton_tables.tables.cache_info().misses == 1
    assert made[0].key_rows.dtype == torch.int32


@pytest.mark.parametrize("responses", [[7, 9], [33] * 21, [2048] * 16], ids=str)
def test_tables_begin_where_triton_needs_no_other_code(responses: list[int]) -> None:
    """At multiples of 16 bytes: their alignment is part of what Triton compiles for."""
    forest = plan.forest_of(PrefixLayout.from_groups([131], [responses]).segments)
    made = triton_tables.tables(forest, None, 4, torch.device("cpu"), 0)
    assert forest.num_tokens % 4, "else the first tables lie well by chance"
    parts = [part for part in made if isinstance(part, torch.Tensor)]
    assert len(parts) == 7
    assert all(part.storage_offset() % 4 == 0 and part.is_contiguous() for part in parts)
    queries = triton_tables.query_blocks(forest, None)
    for part, expected in zip(
        parts, (forest.token_subtree_end, forest.token_depth, queries.rows, queries.spans), strict=False
    ):
        np.testing.assert_array_equal(part.numpy(), expected)
