"""The same claims on a GPU, with the real flash kernels and compiled Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_grouper_plugins.attention import available_backends, shared_prefix_attention
from prefix_grouper_plugins.attention.backends import flex
from prefix_grouper_plugins.attention.registry import fallbacks
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    FEATURES,
    Features,
    assert_all_close,
    features_of,
    inputs,
    layout_of,
    output_and_gradients,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
TREES = [(70, [(40, [(200, []), (33, [])]), (25, [])]), (150, []), (50, [(9, []), (12, [(3, []), (300, [])])])]
LAYOUTS: dict[str, Callable[[], PrefixLayout]] = {
    "group": lambda: PrefixLayout.from_groups([500], [[130] * 5]),
    "forest": lambda: layout_of(TREES),
    "short_prefix_many_responses": lambda: PrefixLayout.from_groups([40], [[90] * 40]),
}
ALL_FEATURES = Features(heads=8, kv_heads=2, head_dim=96, value_dim=64, window=100, softcap=2.0, sinks=True)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def on_device(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(DEVICE, dtype).requires_grad_() for x in tensors]


def run(layout: PrefixLayout, features: Features, backend: str, tensors: list[Tensor]) -> list[Tensor]:
    options = {**features.options(), "backend": backend}
    return output_and_gradients(
        lambda q, k, v, sinks: shared_prefix_attention(q, k, v, layout, sinks=sinks, **options), tensors
    )


def skip_where_unavailable(backend: str, features: Features, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"value_dim": features.value_dim, **features.options()}
    reason = available_backends(DEVICE, dtype, features.head_dim, **options)[backend]
    if reason is not None:
        pytest.skip(reason)


def assert_near_float64(layout: PrefixLayout, features: Features, backend: str, dtype: torch.dtype) -> None:
    skip_where_unavailable(backend, features, dtype)
    tensors = inputs(layout, features, dtype)
    actual = run(layout, features, backend, on_device(tensors, dtype))
    expected = run(layout, features, "dense", on_device(tensors, torch.float64))
    assert_all_close(actual, expected, {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}[dtype])


@pytest.mark.parametrize("backend", ["merged_lse", "triton"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (96, 64), (128, 128), (20, 20), (256, 256)])
@HALF
def test_gradients_stay_near_float64(
    backend: str, layout_name: str, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    features = Features(heads=8, kv_heads=2, head_dim=head_dim, value_dim=value_dim, sinks=True)
    assert_near_float64(LAYOUTS[layout_name](), features, backend, dtype)


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_with_all_features_stays_near_float64(layout_name: str, dtype: torch.dtype) -> None:
    assert_near_float64(LAYOUTS[layout_name](), ALL_FEATURES, "triton", dtype)


@pytest.mark.parametrize("name", FEATURES)
def test_triton_with_each_feature_alone_equals_float64(name: str) -> None:
    assert_near_float64(LAYOUTS["forest"](), features_of((name,)), "triton", torch.float32)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_triton_in_float32_equals_float64(head_dim: int) -> None:
    features = Features(heads=4, kv_heads=2, head_dim=head_dim, value_dim=head_dim)
    assert_near_float64(LAYOUTS["forest"](), features, "triton", torch.float32)


def each_row_alone(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor, sinks: None) -> Tensor:
    """The ordinary path: torch's attention over each row."""
    rows: list[Tensor] = []
    for row in zip(*(layout.unpack(x) for x in (q, k, v)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in row)
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0]
        # A row of L tokens has L - 1 positions; pack() wants L, and never reads the last.
        rows.append(torch.nn.functional.pad(out.transpose(0, 1), (0, 0, 0, 0, 0, 1)))
    return layout.pack(rows)


@pytest.mark.parametrize("backend", ["merged_lse", "triton"])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
@HALF
def test_errors_are_those_of_the_ordinary_path(
    backend: str, layout_name: str, head_dim: int, dtype: torch.dtype
) -> None:
    """Root mean square against float64, of the output and of each gradient: at most 1.3 times that of single rows."""
    layout, features = LAYOUTS[layout_name](), Features(heads=8, kv_heads=2, head_dim=head_dim, value_dim=head_dim)
    skip_where_unavailable(backend, features, dtype)
    tensors = inputs(layout, features, dtype)
    exact = run(layout, features, "dense", on_device(tensors, torch.float64))
    ours = run(layout, features, backend, on_device(tensors, dtype))
    ordinary = output_and_gradients(functools.partial(each_row_alone, layout), on_device(tensors, dtype))
    for name, a, b, reference in zip(("out", "dq", "dk", "dv"), ours, ordinary, exact, strict=True):
        error, allowed = ((x.double() - reference).square().mean().sqrt().item() for x in (a, b))
        assert error <= 1.3 * allowed, f"{name}: {error:.2e}, ordinary {allowed:.2e}"


@pytest.mark.parametrize("features", [Features(heads=8, kv_heads=2, head_dim=64, value_dim=64), ALL_FEATURES], ids=str)
def test_triton_gives_the_same_bits_twice(features: Features) -> None:
    layout = LAYOUTS["short_prefix_many_responses"]()
    skip_where_unavailable("triton", features, torch.bfloat16)
    tensors = on_device(inputs(layout, features), torch.bfloat16)
    first, second = (run(layout, features, "triton", tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_blockwise_gradients_equal_dense_gradients(layout_name: str) -> None:
    layout = LAYOUTS[layout_name]()
    features = Features(heads=6, kv_heads=2, window=60, softcap=2.0, sinks=True)
    tensors = on_device(inputs(layout, features), torch.float64)
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
    torch._dynamo.reset()  # the kinds of layers of all cases together come near the limit of compilations
    fallbacks.clear()
    for build in LAYOUTS.values():
        layout = build()
        tensors = inputs(layout, features, dtype)
        actual = run(layout, features, "flex", on_device(tensors, dtype))
        expected = run(layout, features, "dense", on_device(tensors, torch.float64))
        assert_all_close(actual, expected, 3e-2 if dtype == torch.bfloat16 else 1e-4)
    assert not fallbacks


@pytest.mark.parametrize("backend", ["merged_lse", "triton", "blockwise"])
def test_no_call_waits_for_the_device_also_with_a_layout_that_is_new(backend: str) -> None:
    features = Features(heads=4)
    skip_where_unavailable(backend, features, torch.bfloat16)
    for known in (True, False):  # the first one loads kernels and asks for memory, which may wait
        layout = LAYOUTS["group" if known else "forest"]()
        tensors = on_device(inputs(layout, features), torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if known else "error")
        try:
            out = shared_prefix_attention(*tensors, layout, backend=backend)
            torch.autograd.grad(out, tensors, torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")


PLAIN = Features(heads=8, kv_heads=2, head_dim=64, value_dim=64)


@pytest.mark.parametrize("backend", ["merged_lse", "triton"])
def test_views_into_a_fused_projection_of_odd_width_are_no_trouble(backend: str) -> None:
    layout = LAYOUTS["group"]()
    skip_where_unavailable(backend, PLAIN, torch.bfloat16)
    tensors = inputs(layout, PLAIN, torch.bfloat16)
    widths = [x[0].numel() for x in tensors]
    fused = torch.cat([*(x.detach().flatten(1) for x in tensors), torch.zeros(layout.num_tokens, 3)], 1)
    views = fused.to(DEVICE, torch.bfloat16).split([*widths, 3], 1)[:3]
    heads = [x.unflatten(1, (-1, PLAIN.head_dim)).detach().requires_grad_() for x in views]
    expected = run(layout, PLAIN, "dense", on_device(tensors, torch.float64))
    assert_all_close(run(layout, PLAIN, backend, heads), expected, 3e-2)


@pytest.mark.parametrize("backend", ["merged_lse", "triton"])
def test_a_layout_that_is_known_on_one_stream_is_known_on_another(backend: str) -> None:
    layout = LAYOUTS["forest"]()
    skip_where_unavailable(backend, PLAIN, torch.bfloat16)
    tensors = on_device(inputs(layout, PLAIN), torch.bfloat16)
    first = run(layout, PLAIN, backend, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = run(layout, PLAIN, backend, tensors)
    torch.cuda.synchronize()
    # FA2 adds up dq in any order
    assert_all_close([x.double() for x in second], [x.double() for x in first], 1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("backend", ["merged_lse", "triton", "flex", "blockwise"])
def test_tensors_may_lie_on_another_gpu_than_the_current_one(backend: str) -> None:
    layout = LAYOUTS["forest"]()
    skip_where_unavailable(backend, PLAIN, torch.bfloat16)
    tensors = inputs(layout, PLAIN, torch.bfloat16)
    expected = run(layout, PLAIN, "dense", on_device(tensors, torch.float64))
    there = [x.detach().to("cuda:1").requires_grad_() for x in tensors]
    actual = run(layout, PLAIN, backend, there)
    assert torch.cuda.current_device() == 0
    assert_all_close([x.to("cuda:0") for x in actual], expected, 3e-2)


def test_cuda_graphs_of_torch_compile_follow_the_layout_of_each_batch() -> None:
    """Two layouts with tensors of the same shapes, by turns: compiled, warmed up, recorded and replayed."""
    compiled = torch.compile(
        lambda q, k, v, layout: shared_prefix_attention(q * 2, k, v, layout), mode="reduce-overhead"
    )
    layouts = [PrefixLayout.from_groups([40], [lengths]) for lengths in ([30, 50], [50, 30])]
    for layout in layouts * 4:
        tensors = inputs(layout, PLAIN, torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        actual = output_and_gradients(
            lambda q, k, v, _, layout=layout: compiled(q, k, v, layout), on_device(tensors, torch.bfloat16)
        )
        doubled = [tensors[0] * 2, *tensors[1:]]
        out, dq, *grads = run(layout, PLAIN, "dense", on_device(doubled, torch.float64))
        assert_all_close([x.clone() for x in actual], [out, 2 * dq, *grads], 3e-2)


@pytest.mark.parametrize("prompt", [500, 20], ids=["merged", "copied"])
def test_a_capture_by_hand_is_refused(prompt: int) -> None:
    layout = PrefixLayout.from_groups([prompt], [[130] * 5])
    tensors = on_device(inputs(layout, PLAIN), torch.bfloat16)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captured into a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        shared_prefix_attention(*tensors, layout)
