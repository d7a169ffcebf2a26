"""The forest of a layout: the pairs of a query and a key that it counts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.forest import forest_of, visible_pairs
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.test_given_keys import given_layouts


@settings(max_examples=60, deadline=None)
@given(case=given_layouts(), window=st.none() | st.integers(1, 60))
def test_visible_pairs_are_those_of_the_mask(case: tuple[PrefixLayout, int], window: int | None) -> None:
    layout, num_given = case
    mask = visibility_mask(layout.segments, window, num_given)
    assert mask.shape == (layout.num_tokens - num_given, layout.num_tokens)
    assert torch.equal(mask, visibility_mask(layout.segments, window)[num_given:])
    assert visible_pairs(layout.segments, window, num_given) == int(mask.sum())


def test_segments_off_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"segments are on meta: keep layout\.segments on the CPU"):
        forest_of(torch.empty(2, 4, dtype=torch.int32, device="meta"))
