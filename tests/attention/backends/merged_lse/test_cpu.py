"""The triangles and rectangles of merged_lse on the CPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import forest as plan
from prefix_grouper_plugins.attention import api, shared_prefix_attention
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.attention.backends.merged_lse import cpu
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    Features,
    assert_all_close,
    attend,
    inputs,
    layouts,
    output_and_gradients,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("num_given", [0, 29])
def test_heads_are_repeated_for_a_kernel_that_does_not_group_them(
    num_given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.8 reads past the keys there, without an error; `make test-versions` runs the other tests on it."""
    layout = PrefixLayout.from_groups([30], [[20, 15]])
    layout.num_given = num_given
    query, *keys = inputs(layout, Features(heads=6, kv_heads=2))
    tensors = [query.detach()[num_given:].requires_grad_(), *keys]
    expected = output_and_gradients(
        lambda q, k, v, s: shared_prefix_attention(q, k, v, layout, backend="dense"), tensors
    )
    shapes: list[int] = []
    real = cpu._heads
    monkeypatch.setattr(cpu, "kernel_groups_heads", lambda: False)
    monkeypatch.setattr(cpu, "_heads", lambda x, *rows: (shapes.append(x.shape[1]), real(x, *rows))[1])
    actual = output_and_gradients(
        lambda q, k, v, s: shared_prefix_attention(q, k, v, layout, backend="merged_lse"), tensors
    )
    assert set(shapes) == {6}
    assert_all_close(actual, expected)


def test_whether_the_kernel_groups_heads_is_found_by_asking_it() -> None:
    query, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    if cpu.kernel_groups_heads():
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, _ = op(query, keys, keys, 0.0, False)
        repeated = keys.repeat_interleave(2, 1)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated))


@pytest.mark.parametrize("kernel_groups_heads", sorted({False, cpu.kernel_groups_heads()}))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[301], [201, 301]], ids=["one row", "a row and its beginning"])
def test_one_row_is_one_causal_call_past_the_operator(
    lengths: list[int],
    dtype: torch.dtype,
    kernel_groups_heads: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = PrefixLayout.from_rows([torch.arange(length) for length in lengths])
    monkeypatch.setattr(cpu, "kernel_groups_heads", lambda: kernel_groups_heads)
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(layout, Features(heads=4, kv_heads=2))[:3]]
    expected = output_and_gradients(
        lambda q, k, v, _: shared_prefix_attention(q, k, v, layout, backend="dense"),
        [x.detach().double().requires_grad_() for x in tensors],
    )
    monkeypatch.setattr(api, "attention_op", None)
    monkeypatch.setattr(api, "attend", None)
    actual = output_and_gradients(lambda q, k, v, _: shared_prefix_attention(q, k, v, layout), tensors)
    assert actual[0].dtype == dtype and actual[0].is_contiguous()
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for ours, dense in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=tolerance, atol=tolerance)


def test_the_operator_runs_what_is_more_than_one_causal_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls_of(layout: PrefixLayout, **options: Any) -> int:
        calls: list[int] = []
        real = api.attend
        with monkeypatch.context() as patch:
            patch.setattr(api, "attend", lambda *args: (calls.append(1), real(*args))[1])
            query, key, value = inputs(layout, Features(heads=4, kv_heads=2))[:3]
            shared_prefix_attention(query[layout.num_given :], key, value, layout, **options)
        return len(calls)

    row = PrefixLayout.from_rows([torch.arange(31)])
    given = row.given(19)
    assert calls_of(row) == calls_of(row, sliding_window=30) == calls_of(row, backend="merged_lse") == 0
    assert calls_of(row, sliding_window=29) == calls_of(row, backend="blockwise") == calls_of(row, softcap=5.0) == 1
    assert calls_of(row, sinks=torch.zeros(4)) == calls_of(given) == 1
    assert calls_of(PrefixLayout.from_groups([20], [[11, 3]])) == 1
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    assert calls_of(row) == 1
