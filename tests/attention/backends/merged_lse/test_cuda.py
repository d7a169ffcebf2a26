"""The CUDA driver of merged_lse: its varlen calls, and what they give with emulated flash kernels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from prefix_grouper_plugins import forest as plan
from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends.merged_lse import cuda
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    Features,
    assert_all_close,
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
    # The first response continues the prompt: one triangle.
    assert causal.causal and (causal.max_q, causal.max_k) == (129, 129)
    assert causal.cu_q.tolist() == causal.cu_k.tolist() == [0, *range(129, 340, 30)]
    assert not full.causal and (full.max_q, full.max_k) == (210, 99)
    # One entry, the rectangle: no kernel meets an entry without queries or without keys.
    assert full.cu_q.tolist() == [0, 210] and full.cu_k.tolist() == [0, 99]
    assert full.queries == (129, 339, None) and full.keys == (0, 99, None)


def test_single_queries_are_not_taken_for_decoding() -> None:
    """FA2 with max_q = 1 assumes one query in every entry, which gap entries do not have."""
    layout = layout_of([(1, [(1, []), (1, [])]), (1, [(1, []), (1, [])])])
    assert [call.max_q for call in cuda.varlen_calls(plan.forest_of(layout.segments), CPU)] == [2, 2]
    assert_varlen_equals_dense(layout, poison=False)


def test_a_row_that_goes_on_where_another_ends_needs_one_varlen_call() -> None:
    """An only child continues its parent's triangle, as every first child does."""
    layout = layout_of([(9, [(5, [(7, [])])]), (3, [(8, [])])])
    assert len(layout.segments) == 5
    (call,) = cuda.varlen_calls(plan.forest_of(layout.segments), CPU)
    assert call.cu_q.tolist() == call.cu_k.tolist() == [0, 21, 32]


def test_rows_without_shared_prefix_need_one_varlen_call() -> None:
    layout = PrefixLayout.from_groups([1], [[30] * 8])
    assert len(cuda.varlen_calls(plan.forest_of(layout.segments), CPU)) == 1


@pytest.mark.parametrize("num_given", [0, 40], ids=["whole", "given"])
def test_groups_in_half_precision_round_as_sums_in_float32_do(num_given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: in place and in the kernel's dtype each value of one group is merged or added once."""
    layout = PrefixLayout.from_groups([41], [[30, 7, 22]])
    q, k, v = (x.detach() for x in inputs(layout, Features(heads=4, kv_heads=2), torch.bfloat16))
    q = q[num_given:]
    calls = cuda.varlen_calls(plan.forest_of(layout.segments, num_given), CPU)

    def run() -> list[Tensor]:
        out, lse = cuda.varlen_forward(emulated_flash_forward, q, k, v, calls, 8**-0.5)
        out = out.to(q.dtype)
        return [out, lse, *cuda.varlen_backward(emulated_flash_backward, q, q, k, v, out, lse, calls, 8**-0.5)]

    in_place = run()
    assert [x.dtype for x in in_place] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    monkeypatch.setattr(cuda, "_sum_dtype", lambda calls, dtype: torch.float32)
    for actual, expected in zip(in_place, run(), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))


def test_deeper_trees_keep_sums_in_float32() -> None:
    layout = layout_of([(9, [(5, [(3, []), (6, [])]), (4, [])])])
    q, k, v = (x.detach() for x in inputs(layout, Features(), torch.bfloat16))
    calls = cuda.varlen_calls(plan.forest_of(layout.segments), CPU)
    assert cuda.varlen_forward(emulated_flash_forward, q, k, v, calls, 8**-0.5)[0].dtype == torch.float32
