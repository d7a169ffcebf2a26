"""The same claims on a GPU, with the real flash kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forests import Features, assert_all_close, inputs, layout_of, output_and_gradients
from torch import Tensor

from prefix_grouper_plugins.attention import available_backends, flex, shared_prefix_attention
from prefix_grouper_plugins.attention.plan import Request
from prefix_grouper_plugins.layout import PrefixLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TREES = [(70, [(40, [(200, []), (33, [])]), (25, [])]), (150, []), (50, [(9, []), (12, [(3, []), (300, [])])])]
LAYOUTS = {"group": lambda: PrefixLayout.from_groups([500], [[130] * 5]), "forest": lambda: layout_of(TREES)}


def on_cuda(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to("cuda", dtype).requires_grad_() for x in tensors]


def run(layout: PrefixLayout, features: Features, backend: str, tensors: list[Tensor]) -> list[Tensor]:
    options = {**features.options(), "backend": backend}
    return output_and_gradients(
        lambda q, k, v, sinks: shared_prefix_attention(q, k, v, layout, sinks=sinks, **options), tensors
    )


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (96, 64), (128, 128), (20, 20), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_gradients_stay_near_float64(layout_name: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS[layout_name]()
    reason = available_backends("cuda", dtype, head_dim, value_dim=value_dim)["merged_lse"]
    if reason is not None:
        pytest.skip(reason)
    features = Features(heads=8, kv_heads=2, head_dim=head_dim, value_dim=value_dim, sinks=True)
    tensors = inputs(layout, features, dtype)
    actual = run(layout, features, "merged_lse", on_cuda(tensors, dtype))
    expected = run(layout, features, "dense", on_cuda(tensors, torch.float64))
    assert_all_close(actual, expected, 3e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_blockwise_gradients_equal_dense_gradients(layout_name: str) -> None:
    layout = LAYOUTS[layout_name]()
    features = Features(heads=6, kv_heads=2, window=60, softcap=2.0, sinks=True)
    tensors = on_cuda(inputs(layout, features), torch.float64)
    assert_all_close(run(layout, features, "blockwise", tensors), run(layout, features, "dense", tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("options", [{}, {"window": 60}, {"softcap": 2.0}, {"window": 60, "softcap": 2.0}], ids=str)
def test_flex_gradients_stay_near_float64_for_all_lengths(
    options: dict[str, Any], head_dim: int, dtype: torch.dtype
) -> None:
    features = Features(heads=8, kv_heads=2, head_dim=head_dim, value_dim=head_dim, sinks=True, **options)
    request = Request(torch.device("cuda"), dtype, head_dim, head_dim, features.window, features.softcap)
    if (reason := flex.why_not(request)) is not None:
        pytest.skip(reason)
    flex.fallbacks.clear()
    for build in LAYOUTS.values():
        layout = build()
        tensors = inputs(layout, features, dtype)
        actual = run(layout, features, "flex", on_cuda(tensors, dtype))
        expected = run(layout, features, "dense", on_cuda(tensors, torch.float64))
        assert_all_close(actual, expected, 3e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not flex.fallbacks


def test_flash_call_does_not_wait_for_the_device() -> None:
    layout = LAYOUTS["forest"]()
    tensors = on_cuda(inputs(layout, Features(heads=4)), torch.bfloat16)
    shared_prefix_attention(*tensors, layout)  # plans are uploaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = shared_prefix_attention(*tensors, layout, backend="merged_lse")
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")
