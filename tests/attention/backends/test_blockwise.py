"""The tiles of the blockwise backend, made once for all layers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import forest as plan
from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends import blockwise
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    Features,
    inputs,
    layouts,
)

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), tile=st.integers(1, 50), window=st.none() | st.integers(1, 60))
def test_tiles_cover_each_visible_pair_once_and_mask_exactly_the_others(
    layout: PrefixLayout, tile: int, window: int | None
) -> None:
    visible = visibility_mask(layout.segments, window)
    seen = torch.zeros_like(visible, dtype=torch.int32)
    finite = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for q0, q1, k0, k1, masked in blockwise.visible_tiles(plan.forest_of(layout.segments), window, tile):
        assert q1 > q0 and k1 > k0 and q1 - q0 <= tile and k1 - k0 <= tile
        assert masked or visible[q0:q1, k0:k1].all()
        assert not finite[q0:q1].any() if q0 == k0 else finite[q0:q1].all(), "a row's diagonal comes first"
        finite[q0:q1] = True
        seen[q0:q1, k0:k1] += visible[q0:q1, k0:k1].int()
    assert torch.equal(seen, visible.int())


def test_window_leaves_out_tiles_beyond_it() -> None:
    layout = PrefixLayout.from_groups([5000], [[500] * 4])
    forest = plan.forest_of(layout.segments)
    area = {
        window: sum((t.q1 - t.q0) * (t.k1 - t.k0) for t in blockwise.visible_tiles(forest, window, 128))
        for window in (None, 128)
    }
    assert area[128] < 3 * 128 * layout.num_tokens < area[None] / 8


def test_plans_are_made_once_for_all_layers() -> None:
    layout = PrefixLayout.from_groups([64], [[16] * 4])
    plan._forest.cache_clear()
    blockwise.visible_tiles.cache_clear()
    tensors = inputs(layout, Features(window=10))
    for _ in range(3):
        out = shared_prefix_attention(*tensors, layout, sliding_window=10)
        torch.autograd.grad(out.sum(), tensors)
    assert plan._forest.cache_info().misses == blockwise.visible_tiles.cache_info().misses == 1
