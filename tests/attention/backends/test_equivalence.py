"""Every backend equals the dense oracle, and the oracle equals rows attended one by one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends import blockwise, merged_lse
from prefix_grouper_plugins.attention.request import Options
from prefix_grouper_plugins.forest import forest_of
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    PAIRS,
    Features,
    LargestTensor,
    assert_all_close,
    attend,
    features_of,
    inputs,
    layout_of,
    layouts,
    output_and_gradients,
    row_by_row,
)


def names_of(names: tuple[str, ...]) -> str:
    return "-".join(dict.fromkeys(names))


pair = pytest.mark.parametrize("names", PAIRS, ids=names_of)


def assert_equals_dense(layout: PrefixLayout, features: Features, backend: str) -> None:
    tensors = inputs(layout, features)
    expected = output_and_gradients(attend(layout, features, "dense"), tensors)
    assert_all_close(output_and_gradients(attend(layout, features, backend), tensors), expected)


@pair
@settings(max_examples=2, deadline=None)
@given(layout=layouts(max_depth=2, max_length=8))
def test_dense_gradients_equal_row_by_row_gradients(names: tuple[str, ...], layout: PrefixLayout) -> None:
    features = features_of(names)
    tensors = inputs(layout, features)
    reference = output_and_gradients(lambda q, k, v, s: row_by_row(layout, q, k, v, s, features), tensors)
    assert_all_close(output_and_gradients(attend(layout, features, "dense"), tensors), reference)


def test_dense_equals_torch_attention_of_each_row() -> None:
    layout = PrefixLayout.from_groups([9, 1, 4], [[5, 3], [2, 7, 1], [6]])
    features = features_of(("gqa",))
    q, k, v = (x.detach() for x in inputs(layout, features))
    out = shared_prefix_attention(q, k, v, layout, backend="dense")
    for q_row, k_row, v_row, out_row in zip(*(layout.unpack(x) for x in (q, k, v, out)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in (q_row, k_row, v_row))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out_row, expected[0].transpose(0, 1))


@pair
@pytest.mark.parametrize("tile", [5, 32])
@settings(max_examples=8, deadline=None)
@given(layout=layouts())
def test_blockwise_gradients_equal_dense_gradients(names: tuple[str, ...], tile: int, layout: PrefixLayout) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "CPU_TILE", tile)
        assert_equals_dense(layout, features_of(names), "blockwise")


@pytest.mark.parametrize("names", [p for p in PAIRS if not {"window", "softcap"} & set(p)], ids=names_of)
@settings(max_examples=15, deadline=None)
@given(layout=layouts())
def test_merged_lse_gradients_equal_dense_gradients(names: tuple[str, ...], layout: PrefixLayout) -> None:
    assert_equals_dense(layout, features_of(names), "merged_lse")


@pair
@settings(max_examples=2, deadline=None)
@given(layout=layouts())
def test_auto_gradients_equal_dense_gradients(names: tuple[str, ...], layout: PrefixLayout) -> None:
    assert_equals_dense(layout, features_of(names), "auto")


@pytest.mark.parametrize("backend", ["blockwise", "merged_lse"])
@pytest.mark.parametrize("names", [(), ("gqa", "sinks", "value_dim")], ids=str)
def test_value_dim_above_head_dim_equals_dense(backend: str, names: tuple[str, ...]) -> None:
    layout = PrefixLayout.from_groups([30, 12], [[14, 8, 21], [5, 3]])
    features = Features(heads=4, head_dim=5, value_dim=12, sinks="sinks" in names)
    assert_equals_dense(layout, features, backend)


@pytest.mark.parametrize("backend", ["blockwise", "merged_lse"])
def test_all_features_pass_gradcheck(backend: str) -> None:
    layout = layout_of([(4, [(3, [(2, []), (3, [])]), (2, [])]), (3, [])])
    windowed = backend == "blockwise"
    options: dict[str, Any] = {"window": 4, "softcap": 2.0} if windowed else {}
    features = Features(heads=4, kv_heads=2, head_dim=3, value_dim=2, sinks=True, **options)
    assert torch.autograd.gradcheck(attend(layout, features, backend), inputs(layout, features))


@pytest.mark.parametrize("backend", ["blockwise", "merged_lse"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2.5e-2)], ids=str
)
def test_lower_precision_stays_near_float64(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    layout = layout_of([(70, [(40, [(20, []), (33, [])]), (25, [])]), (50, [(9, []), (12, [])])])
    features = Features(heads=4, kv_heads=2, head_dim=16, value_dim=16, sinks=True)
    tensors = inputs(layout, features, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = output_and_gradients(attend(layout, features, backend), tensors)
    assert [x.dtype for x in actual] == [dtype] * 5
    expected = output_and_gradients(attend(layout, features, "dense"), exact)
    assert_all_close(actual, expected, tolerance)


def test_half_precision_blockwise_is_as_near_as_the_dense_formula_in_float32() -> None:
    layout = PrefixLayout.from_groups([200], [[40] * 4])
    features = Features()
    tensors = inputs(layout, features, torch.bfloat16)
    out = attend(layout, features, "blockwise")(*tensors, None)
    expected = attend(layout, features, "dense")(*tensors, None)
    torch.testing.assert_close(out, expected, rtol=2**-8, atol=1e-5)  # one rounding of the output


@pytest.mark.parametrize("backend", ["blockwise", "merged_lse"])
def test_large_scores_do_not_overflow(backend: str) -> None:
    layout = PrefixLayout.from_groups([40], [[20, 20]])
    features = features_of(("sinks",))
    tensors = inputs(layout, features)
    run = functools.partial(output_and_gradients, tensors=tensors)
    actual = run(lambda q, k, v, s: shared_prefix_attention(q, k, v, layout, sinks=s, scale=300.0, backend=backend))
    expected = run(lambda q, k, v, s: shared_prefix_attention(q, k, v, layout, sinks=s, scale=300.0, backend="dense"))
    assert_all_close(actual, expected, 1e-9)


@pytest.mark.parametrize("backend", ["blockwise", "merged_lse", "auto", "dense"])
def test_window_as_wide_as_the_longest_row_changes_nothing(backend: str) -> None:
    layout = PrefixLayout.from_groups([12], [[7, 9]])  # longest row: 11 + 9 packed positions
    tensors = inputs(layout, Features())
    free = attend(layout, Features(), backend)(*tensors, None)
    assert torch.equal(attend(layout, Features(window=20), backend)(*tensors, None), free)


def test_window_counts_depth_in_the_row_and_ignores_position_ids() -> None:
    layout = PrefixLayout.from_groups([12], [[7, 9]])
    features = Features(window=5)
    tensors = inputs(layout, features)
    expected = attend(layout, features, "dense")(*tensors, None)
    layout.position_ids += 1000
    layout.position_ids[12:] += 50
    assert torch.equal(attend(layout, features, "dense")(*tensors, None), expected)
    torch.testing.assert_close(attend(layout, features, "blockwise")(*tensors, None), expected)


def test_auto_takes_flash_partials_where_they_can_serve() -> None:
    layout = PrefixLayout.from_groups([12], [[7, 9]])
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for backend, module in (("blockwise", blockwise), ("merged_lse", merged_lse)):
            real = module.forward

            def spy(*args: Any, _real: Any = real, _name: str = backend, **kwargs: Any) -> Any:
                calls.append(_name)
                return _real(*args, **kwargs)

            patch.setattr(module, "forward", spy)
        for features in (Features(), Features(window=3), Features(softcap=2.0), Features(window=100)):
            attend(layout, features, "auto")(*inputs(layout, features), None)
    assert calls == ["merged_lse", "blockwise", "blockwise", "merged_lse"]


@pytest.mark.parametrize("backend", [blockwise, merged_lse], ids=["blockwise", "merged_lse"])
def test_no_square_tensor_and_no_repeated_keys_are_made(backend: Any) -> None:
    layout = PrefixLayout.from_groups([1501], [[100] * 8])  # 2300 tokens; repeated rows would be 12,800
    forest, tokens = forest_of(layout.segments), layout.num_tokens
    q, k, v = (torch.randn(tokens, 2, 24) for _ in range(3))
    with LargestTensor(2, 24) as largest, torch.no_grad():
        out, lse = backend.forward(q, k, v, forest, Options(0.2))
        backend.backward(out, q, k, v, out, lse, forest, Options(0.2))
    assert largest.numel < tokens * tokens / 2
    assert largest.tokens <= tokens
