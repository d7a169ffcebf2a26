"""The host-side plans: tiles of blockwise, varlen calls of merged_lse, and what neither may allocate."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_grouper_plugins import forest as plan
from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends import blockwise, merged_lse
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.attention.backends.merged_lse import cpu, cuda
from prefix_grouper_plugins.attention.request import Options
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    Features,
    assert_all_close,
    attend,
    emulated_flash_backward,
    emulated_flash_forward,
    inputs,
    layout_of,
    layouts,
    output_and_gradients,
)

CPU = torch.device("cpu")


class VarlenAttention(torch.autograd.Function):
    """The CUDA driver of merged_lse with emulated flash ops."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Any, scale: float, poison: bool) -> Tensor:
        gaps = {"gap_out": torch.nan, "gap_lse": torch.nan} if poison else {}
        op = functools.partial(emulated_flash_forward, **gaps)
        out, lse = cuda.varlen_forward(op, q, k, v, calls, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale, ctx.poison = calls, scale, poison
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        op = functools.partial(emulated_flash_backward, gap_grad=torch.nan if ctx.poison else 0.0)
        grads = cuda.varlen_backward(op, grad_outputs[0], *ctx.saved_tensors, ctx.calls, ctx.scale)
        return *grads, None, None, None


def assert_varlen_equals_dense(layout: PrefixLayout, poison: bool) -> None:
    tensors = inputs(layout, Features(heads=4, kv_heads=2))
    calls = cuda.varlen_calls(plan.forest_of(layout.segments), CPU)
    actual = output_and_gradients(lambda q, k, v, _: VarlenAttention.apply(q, k, v, calls, 8**-0.5, poison), tensors)
    expected = output_and_gradients(
        lambda q, k, v, _: shared_prefix_attention(q, k, v, layout, backend="dense"), tensors
    )
    assert_all_close(actual, expected)


@pytest.mark.parametrize(("before", "behind"), [(1, 1), (0, 1), (0, 2)], ids=["offset", "stride", "aligned"])
def test_flash_kernels_get_rows_that_begin_at_16_bytes(before: int, behind: int) -> None:
    """They read 16 bytes at once, unchecked: views into a fused projection of odd width would end the process."""
    layout = PrefixLayout.from_groups([9], [[5, 4]])
    calls = cuda.varlen_calls(plan.forest_of(layout.segments), CPU)
    plain = [x.detach() for x in inputs(layout, Features())]
    edges = [torch.zeros(layout.num_tokens, width, dtype=torch.float64) for width in (before, behind)]
    fused = torch.cat([edges[0], *(x.flatten(1) for x in plain), edges[1]], 1)
    views = [x.unflatten(1, (2, 8)) for x in fused[:, before : before + 48].split(16, 1)]
    taken: list[Tensor] = []

    def forward(*tensors: Any, **options: Any) -> Any:
        taken.extend(tensors[:3])
        return emulated_flash_forward(*tensors, **options)

    def backward(*tensors: Any, **options: Any) -> Any:
        taken.extend(tensors[:5])
        return emulated_flash_backward(*tensors, **options)

    out, lse = cuda.varlen_forward(forward, *views, calls, 8**-0.5)
    grads = cuda.varlen_backward(backward, views[0], *views, out, lse, calls, 8**-0.5)
    assert all(x.data_ptr() % 16 == 0 and all(stride % 2 == 0 for stride in x.stride()[:2]) for x in taken)
    assert (taken[0].data_ptr() == views[0].data_ptr()) == (behind == 2)  # what lies well is not copied
    expected = cuda.varlen_forward(emulated_flash_forward, *plain, calls, 8**-0.5)
    assert_all_close([out, lse], list(expected))
    expected = cuda.varlen_backward(emulated_flash_backward, plain[0], *plain, *expected, calls, 8**-0.5)
    assert_all_close(list(grads), list(expected))


@pytest.mark.parametrize("poison", [False, True], ids=["fa2_gaps", "nan_in_gaps"])
@settings(max_examples=40, deadline=None)
@given(layout=layouts())
def test_varlen_calls_give_the_dense_output_and_gradients(poison: bool, layout: PrefixLayout) -> None:
    """With NaN wherever an entry is empty too: nothing that a kernel writes there is read."""
    assert_varlen_equals_dense(layout, poison)


@pytest.mark.parametrize("poison", [False, True], ids=["fa2_gaps", "nan_in_gaps"])
def test_varlen_levels_with_gaps_in_the_middle_equal_dense(poison: bool) -> None:
    deep = (5, [(4, [(3, []), (6, [])]), (2, [])])
    assert_varlen_equals_dense(layout_of([deep, (7, []), (3, [(2, []), (8, [(4, []), (2, [])])])]), poison)


def test_a_group_needs_two_varlen_calls_and_no_gap_mask() -> None:
    layout = PrefixLayout.from_groups([100], [[30] * 8])
    causal, full = cuda.varlen_calls(plan.forest_of(layout.segments), CPU)
    assert causal.causal and (causal.max_q, causal.max_k) == (99, 99)
    assert not full.causal and (full.max_q, full.max_k) == (240, 99)
    # One entry, the rectangle: no kernel meets an entry without queries or without keys.
    assert full.cu_q.tolist() == [0, 240] and full.cu_k.tolist() == [0, 99]
    assert full.queries == (99, 339, None) and full.keys == (0, 99, None)


def test_single_queries_are_not_taken_for_decoding() -> None:
    """FA2 with max_q = 1 assumes one query in every entry, which gap entries do not have."""
    layout = layout_of([(1, [(1, [])]), (1, [(1, [])])])
    assert [call.max_q for call in cuda.varlen_calls(plan.forest_of(layout.segments), CPU)] == [2, 2]
    assert_varlen_equals_dense(layout, poison=False)


def test_rows_without_shared_prefix_need_one_varlen_call() -> None:
    layout = PrefixLayout.from_groups([1], [[30] * 8])
    assert len(cuda.varlen_calls(plan.forest_of(layout.segments), CPU)) == 1


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), longest=st.integers(2, 40))
def test_triangles_and_rectangles_of_the_cpu_cover_each_visible_pair_once(layout: PrefixLayout, longest: int) -> None:
    visible = visibility_mask(layout.segments)
    seen = torch.zeros_like(visible, dtype=torch.int32)
    triangles, rectangles = cpu.plan(plan.forest_of(layout.segments), longest)
    assert [t.start for t in triangles] == [0, *(t.end for t in triangles[:-1])] and triangles[-1].end == len(visible)
    for start, end in triangles:
        assert 0 < end - start <= longest
        seen[start:end, start:end] += torch.ones(end - start, end - start, dtype=torch.int32).tril()
    for q0, q1, k0, k1 in rectangles:
        assert q1 > q0 and k1 > k0
        seen[q0:q1, k0:k1] += 1
    assert torch.equal(seen, visible.int())


@settings(max_examples=30, deadline=None)
@given(layout=layouts(), longest=st.integers(2, 40))
def test_halved_triangles_give_the_dense_output_and_gradients(layout: PrefixLayout, longest: int) -> None:
    features = Features(heads=4, kv_heads=2)
    tensors = inputs(layout, features)
    with mock.patch.dict(cpu.LONGEST_TRIANGLE, {8: longest}):
        halved = output_and_gradients(attend(layout, features, "merged_lse"), tensors)
    assert_all_close(halved, output_and_gradients(attend(layout, features, "dense"), tensors))


def test_a_triangle_is_halved_where_the_kernel_has_its_blocks() -> None:
    layout = PrefixLayout.from_groups([64], [[500] * 8])
    triangles, rectangles = cpu.plan(plan.forest_of(layout.segments), 128)
    assert [t.end - t.start for t in triangles[:5]] == [63, 128, 128, 128, 116]
    assert rectangles[:2] == ((63, 63 + 8 * 500, 0, 63), (63 + 256, 63 + 500, 63, 63 + 256))


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


@pytest.mark.parametrize("backend", [blockwise, merged_lse], ids=["blockwise", "merged_lse"])
def test_no_square_tensor_and_no_repeated_keys_are_made(backend: Any) -> None:
    layout = PrefixLayout.from_groups([1501], [[100] * 8])  # 2300 tokens; repeated rows would be 12,800
    forest, tokens = plan.forest_of(layout.segments), layout.num_tokens
    q, k, v = (torch.randn(tokens, 2, 24) for _ in range(3))
    with LargestTensor(2, 24) as largest, torch.no_grad():
        out, lse = backend.forward(q, k, v, forest, Options(0.2))
        backend.backward(out, q, k, v, out, lse, forest, Options(0.2))
    assert largest.numel < tokens * tokens / 2
    assert largest.tokens <= tokens


def test_plans_are_made_once_for_all_layers() -> None:
    layout = PrefixLayout.from_groups([64], [[16] * 4])
    plan._forest.cache_clear()
    blockwise.visible_tiles.cache_clear()
    tensors = inputs(layout, Features(window=10))
    for _ in range(3):
        out = shared_prefix_attention(*tensors, layout, sliding_window=10)
        torch.autograd.grad(out.sum(), tensors)
    assert plan._forest.cache_info().misses == blockwise.visible_tiles.cache_info().misses == 1
