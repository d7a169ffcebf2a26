"""The Triton kernels give the outputs and gradients of dense attention in float64: interpreted, without a GPU."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from prefix_grouper_plugins.attention import available_backends, shared_prefix_attention
from prefix_grouper_plugins.attention import device as attention_device
from prefix_grouper_plugins.attention.backends import triton as triton_backend
from prefix_grouper_plugins.attention.backends.merged_lse import cuda, gathered, merge
from prefix_grouper_plugins.attention.backends.triton import configs as triton_configs
from prefix_grouper_plugins.attention.backends.triton import tables as triton_tables
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.forest import forest_of
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention import interpreter
from tests.attention.forests import (
    FEATURES,
    Features,
    assert_all_close,
    emulated_flash_backward,
    emulated_flash_forward,
    features_of,
    inputs,
    layout_of,
    layouts,
    output_and_gradients,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_interpreter = pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))
Call = Callable[..., Any]

FORESTS: dict[str, Callable[[], PrefixLayout]] = {
    "deep": lambda: layout_of([(70, [(30, [(5, [(3, [(20, []), (1, [])])]), (33, [])]), (9, [])]), (12, [(7, [])])]),
    "one_token_segments": lambda: layout_of([(1, [(1, [(1, []), (1, [])]), (1, [])]), (1, []), (1, [(1, [])])]),
    "short_prefix_many_responses": lambda: PrefixLayout.from_groups([12], [[25] * 10]),
    "long_prefix": lambda: PrefixLayout.from_groups([150], [[11, 40, 3]]),
}
PLAIN = Features(heads=1, kv_heads=1)
ALL_FEATURES = Features(heads=2, kv_heads=1, head_dim=20, value_dim=12, window=30, softcap=2.0, sinks=True)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with interpreter.interpreter() as call:
        yield call


def attend(layout: PrefixLayout, features: Features, backend: str) -> Callable[..., Tensor]:
    options = {**features.options(), "backend": backend}
    return lambda q, k, v, sinks: shared_prefix_attention(q, k, v, layout, sinks=sinks, **options)


def assert_equals_dense(
    layout: PrefixLayout, features: Features, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5
) -> None:
    tensors = inputs(layout, features, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = output_and_gradients(attend(layout, features, "triton"), tensors)
    assert [x.dtype for x in actual] == [dtype] * len(actual)
    assert_all_close(actual, output_and_gradients(attend(layout, features, "dense"), exact), tolerance)


@needs_interpreter
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES], ids=["plain", "all_features"])
def test_gradients_equal_dense_gradients(interpreted: Call, forest: str, features: Features) -> None:
    interpreted(assert_equals_dense, FORESTS[forest](), features)


@needs_interpreter
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_alone_equals_dense(interpreted: Call, name: str) -> None:
    interpreted(assert_equals_dense, layout_of([(30, [(25, []), (9, [(20, [])])])]), features_of((name,)))


@needs_interpreter
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 64), (40, 128), (256, 256)])
def test_head_dims_equal_dense(interpreted: Call, head_dim: int, value_dim: int) -> None:
    features = Features(heads=2, kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    precision = (torch.float16, 4e-3) if head_dim == 256 else (torch.float32, 2e-5)
    interpreted(assert_equals_dense, layout_of([(30, [(20, []), (17, [])])]), features, *precision)


@needs_interpreter
def test_half_precision_stays_near_float64(interpreted: Call) -> None:
    features = Features(heads=2, kv_heads=1, head_dim=16, value_dim=16, sinks=True)
    interpreted(assert_equals_dense, FORESTS["deep"](), features, torch.float16, 4e-3)


def bfloat16_is_refused() -> None:
    reason = available_backends("cpu", torch.bfloat16, 64)["triton"]
    assert reason == "Triton's interpreter does not multiply bfloat16 matrices; take float16 or float32"


@needs_interpreter
def test_the_interpreter_refuses_bfloat16(interpreted: Call) -> None:
    interpreted(bfloat16_is_refused)


def random_forests_equal_dense(features: Features) -> None:
    @settings(max_examples=4, deadline=None)
    @given(layout=layouts(max_length=30, max_segments=8))
    def check(layout: PrefixLayout) -> None:
        assert_equals_dense(layout, features)

    check()


@needs_interpreter
@pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES], ids=["plain", "all_features"])
def test_random_forests_equal_dense(interpreted: Call, features: Features) -> None:
    interpreted(random_forests_equal_dense, features)


def strided_inputs_equal_dense() -> None:
    layout, features = layout_of([(30, [(20, []), (17, [])])]), Features(head_dim=16, value_dim=16)
    tensors = inputs(layout, features, torch.float32)
    expected = output_and_gradients(attend(layout, features, "dense"), tensors)
    head_major = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in tensors]
    sliced = [torch.cat([x, x], -1).detach()[..., :16].requires_grad_() for x in tensors]
    no_dense_dim = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    for views in (head_major, sliced, no_dense_dim):
        assert not any(x.is_contiguous() for x in views)
        assert_all_close(output_and_gradients(attend(layout, features, "triton"), views), expected, 2e-5)


@needs_interpreter
def test_strided_inputs_equal_dense(interpreted: Call) -> None:
    """Models hand over ``[H, T, D]`` transposed."""
    interpreted(strided_inputs_equal_dense)


def scaled(layout: PrefixLayout, scale: float, backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v, _: shared_prefix_attention(q, k, v, layout, scale=scale, backend=backend)


def any_scale_equals_dense() -> None:
    layout = layout_of([(30, [(20, []), (17, [])])])
    tensors = inputs(layout, PLAIN, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for scale, tolerance in ((300.0, 1e-3), (0.0, 2e-5), (-0.5, 2e-5)):
        actual, expected = (
            output_and_gradients(scaled(layout, scale, backend), some)
            for backend, some in (("triton", tensors), ("dense", exact))
        )
        assert_all_close(actual, expected, tolerance)


@needs_interpreter
def test_any_scale_equals_dense(interpreted: Call) -> None:
    interpreted(any_scale_equals_dense)


def number_of_slots(layout: PrefixLayout) -> int:
    return triton_tables.tables(forest_of(layout.segments), None, 2, torch.device("cpu"), 0).num_slots


@needs_interpreter
def test_the_forests_above_have_shared_out_and_whole_key_blocks(interpreted: Call) -> None:
    assert interpreted(number_of_slots, FORESTS["short_prefix_many_responses"]()) >= 3
    assert interpreted(number_of_slots, FORESTS["one_token_segments"]()) == 0


def fused_merge_equals_torch(dtype: torch.dtype, gaps: bool) -> None:
    """With NaN in the gaps, in strided tensors of an odd number of rows."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, dim = 75, 3, 20
    where = torch.rand(rows, generator=generator) < 0.3 if gaps else None
    out, partial_out = (torch.randn(rows, heads, dim, generator=generator) for _ in range(2))
    lse, partial_lse = (torch.randn(heads, rows, generator=generator) * 9 for _ in range(2))
    partial_out = partial_out.to(dtype)
    if where is not None:
        partial_out[where], partial_lse[:, where] = torch.nan, torch.nan
    used = slice(5, rows)
    gap_rows = None if where is None else where[used]
    assert merge._fused(out, lse) is triton_merge()
    results = []
    for fused in (True, False):
        tensors = [x.clone() for x in (out, lse, out)]
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(merge, "_fused", lambda x, sums: None)
            merge.merge(tensors[0][used], tensors[1][:, used], partial_out[used], partial_lse[:, used], gap_rows)
            merge.add([tensors[2][used]], [partial_out[used]], [gap_rows])
        results.append(tensors)
    for actual, expected, before in zip(*results, (out, lse, out), strict=True):
        assert not torch.equal(expected, before)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def triton_merge() -> Any:
    from prefix_grouper_plugins.attention.backends.merged_lse import fused as triton_merge

    return triton_merge


@needs_interpreter
@pytest.mark.parametrize("gaps", [False, True], ids=["no_gaps", "nan_in_gaps"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_fused_merge_of_flash_partials_equals_the_torch_merge(
    interpreted: Call, dtype: torch.dtype, gaps: bool
) -> None:
    interpreted(fused_merge_equals_torch, dtype, gaps)


def varlen_driver_equals_dense() -> None:
    layout, features = layout_of([(5, [(4, [(3, []), (6, [])]), (2, [])]), (7, [])]), Features(heads=2, kv_heads=1)
    tensors = [x.detach() for x in inputs(layout, features, torch.float32)]
    calls = cuda.varlen_calls(forest_of(layout.segments), torch.device("cpu"))
    out, lse = cuda.varlen_forward(emulated_flash_forward, *tensors, calls, 8**-0.5)
    grads = cuda.varlen_backward(emulated_flash_backward, out, *tensors, out, lse, calls, 8**-0.5)
    expected_out = shared_prefix_attention(*(leaves := [x.requires_grad_() for x in tensors]), layout, backend="dense")
    expected = [expected_out, *torch.autograd.grad(expected_out, leaves, out)]
    assert_all_close([out, *grads], expected, 2e-5)


@needs_interpreter
def test_the_varlen_driver_with_fused_merges_equals_dense(interpreted: Call) -> None:
    interpreted(varlen_driver_equals_dense)


def sum_of_copies_equals_torch() -> None:
    """With a key that has no copies, and rows wider than a program."""
    layout = layout_of([(9, [(3, []), (40, [(2, []), (5, [])])]), (7, [(2, []), (8, [])])])
    for num_given in (0, 9):
        forest = forest_of(layout.segments, num_given)
        copies = gathered.copies_of(forest, frozenset(forest.level.tolist()), torch.device("cpu"))
        grad = torch.randn(len(copies.key_of), 3, 400)
        assert merge._fused(grad, grad) is triton_merge()
        expected = torch.zeros(layout.num_tokens, 3, 400).index_add_(0, copies.key_of, grad)
        torch.testing.assert_close(copies.sum(grad), expected)


@needs_interpreter
def test_the_fused_sum_of_copies_equals_torch(interpreted: Call) -> None:
    interpreted(sum_of_copies_equals_torch)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cuda", torch.float64, 64), "float16, bfloat16 and float32, not torch.float64"),
        (
            ("cuda", torch.bfloat16, 320),
            "head dim 320 is above 256, the most that the Triton kernels take in torch.bfloat16",
        ),
        (
            ("cuda", torch.float32, 192),
            "head dim 192 is above 128, the most that the Triton kernels take in torch.float32",
        ),
        pytest.param(("cpu", torch.float32, 64), "need an NVIDIA CUDA device, not cpu", marks=needs_triton),
    ],
)
def test_why_not_tells_the_reason(arguments: tuple[Any, ...], reason: str) -> None:
    assert reason in str(available_backends(*arguments)["triton"])


@needs_triton
@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        (
            (10, 0),
            (3, 4),
            "Triton 3.4 does not compile the kernels for compute capability 10.0 and above: upgrade it to 3.5",
        ),
        ((10, 3), (3, 5), None),
        ((9, 0), (3, 4), None),
        ((12, 0), (3, 4), None),  # without the tensor memory that the compiler stumbles over
    ],
    ids=str,
)
def test_a_triton_that_cannot_compile_the_kernels_is_told(
    capability: tuple[int, int], version: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(triton_backend, "triton_version", lambda: version)
    monkeypatch.setattr(attention_device, "_why_not_started", lambda: None)
    assert triton_backend.why_not(Request(torch.device("cuda"), torch.bfloat16, 64, 64)) == reason
    assert attention_device.why_not_triton(torch.device("cuda"), "they") is None  # for the kernels that only add


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton starts here")
def test_a_triton_that_does_not_start_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is a driver that is missing. The merge is then made of torch's own kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    attention_device._why_not_started.cache_clear()
    reason = triton_backend.why_not(Request(torch.device("cuda"), torch.bfloat16, 64, 64))
    assert re.fullmatch(r"Triton does not start on this machine \(\w+Error: .+\)", str(reason))
    assert attention_device.why_not_triton(torch.device("cuda"), "they") is not None
    attention_device._why_not_started.cache_clear()


@needs_triton
@pytest.mark.parametrize(
    ("compiler", "found", "remedy"),
    [
        (None, "Failed to find C compiler", "it needs a C compiler: install one (apt-get install gcc), or set CC to"),
        ("/no/cc", "No such file", "it needs a C compiler, and CC='/no/cc' is none: install one (apt-get install gcc)"),
    ],
    ids=["empty_PATH", "wrong_CC"],
)
def test_without_a_c_compiler_the_remedy_is_said_once(
    compiler: str | None,
    found: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Triton's own build, as its driver runs it in a container without a compiler; only the GPU is made up."""
    import triton.runtime
    from triton.runtime.build import compile_module_from_src

    class Driver:
        @property
        def utils(self) -> Any:
            return compile_module_from_src("int nothing;", f"nothing_{tmp_path.name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Driver()))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    attention_device._why_not_started.cache_clear()
    reasons = {attention_device.why_not_triton(torch.device("cuda"), "they") for _ in range(3)}
    attention_device._why_not_started.cache_clear()
    (reason,) = reasons
    assert found in str(reason) and remedy in str(reason)
    assert [record.getMessage() for record in caplog.records] == [
        f"prefix grouper: {reason}. Layers that need its kernels run on slower ones"
    ]


@needs_triton
def test_the_version_of_triton_is_read() -> None:
    assert attention_device.triton_version() >= (3, 4)


def test_without_triton_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_backends("cuda", torch.bfloat16, 64)["triton"] == "the package triton is not installed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forward=128x64", "'forward=128x64' is not KERNEL=QUERIESxKEYSxWARPSxSTAGES of forward, dq, dkdv"),
        ("backward=64x64x4x2", "'backward=64x64x4x2' is not KERNEL"),
        ("dq=96x64x4x2", "tiles of 'dq=96x64x4x2' must be 16 or more and divide 128"),
        ("dkdv=256x64x4x2", "must be 16 or more and divide 128"),
    ],
)
def test_wrong_pins_are_refused(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv(triton_configs.ENVIRONMENT, text)
    with pytest.raises(ValueError, match=message):
        triton_configs.pinned("forward")


def test_a_pin_holds_for_its_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(triton_configs.ENVIRONMENT, "forward=128x32x8x3, dq=64x64x4x2")
    assert triton_configs.pinned("forward") == triton_configs.Tiles(128, 32, 8, 3)
    assert triton_configs.pinned("dkdv") is None


class Recorder:
    """Stands for a kernel or an autotuner: keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((grid, options))


@pytest.mark.parametrize(
    ("capability", "pin", "tokens", "chosen"),
    [
        ((9, 0), "", 1024, None),
        ((9, 0), "", 100_000, None),
        ((9, 0), "", 1023, triton_configs.Tiles(64, 32, 4, 2)),  # the last one
        ((9, 0), "dq=64x16x4x2", 1024, triton_configs.Tiles(64, 16, 4, 2)),
        (None, "", 1024, triton_configs.Tiles(128, 32, 8, 2)),  # the first one
    ],
    ids=str,
)
def test_configurations_are_timed_on_a_gpu_by_long_calls_unless_pinned(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    pin: str,
    tokens: int,
    chosen: triton_configs.Tiles | None,
) -> None:
    kernel, tuner = Recorder(), Recorder()
    monkeypatch.setenv(triton_configs.ENVIRONMENT, pin)
    monkeypatch.setattr(triton_configs, "_tuned", lambda kernel, choices, capability: tuner)
    dims = {"HEAD_DIM": 96, "VALUE_DIM": 64}
    triton_configs.launch("dq", kernel, lambda blocks: (blocks["BLOCK_M"], 1), (), dims, 2, capability, tokens)
    size_class = {1023: 0, 1024: 0, 100_000: 3}[tokens]
    if chosen is None:
        assert [options for _, options in tuner.launches] == [
            {**dims, "size_class": size_class}
        ] and not kernel.launches
        return
    blocks = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n}
    options = {**dims, **blocks, "num_warps": chosen.warps, "num_stages": chosen.stages, "size_class": size_class}
    assert kernel.launches == [((chosen.block_m, 1), options)] and not tuner.launches


@needs_triton
def test_one_layout_does_not_choose_for_batches_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autotuner itself, with kernels that run nothing: it times anew in each class of lengths, and once in each."""
    from triton.runtime.autotuner import Autotuner

    from prefix_grouper_plugins.attention.backends.triton.backward_kernels import dkdv_kernel

    timed: list[int] = []
    tuner = triton_configs._tuned.__wrapped__(
        dkdv_kernel, triton_configs.configurations("dkdv", 128, 2, (9, 0)), (9, 0)
    )
    tuner.cache_results = False  # the disk's key asks the driver
    tuner.fn = type("Kernel", (), {"run": lambda self, *arguments, **options: None})()
    monkeypatch.setattr(
        Autotuner, "_bench", lambda self, *a, config, **options: timed.append(options["size_class"]) or 1.0
    )
    monkeypatch.setattr(triton_configs, "_tuned", lambda kernel, choices, capability: tuner)
    dims = {"HEAD_DIM": 128, "VALUE_DIM": 128, "WINDOWED": False, "CAPPED": False}
    for tokens in (1024, 1500, 4095, 4096, 30_000, 65_536, 500_000, 1024):
        triton_configs.launch("dkdv", dkdv_kernel, lambda blocks: (1, 1), (), dims, 2, (9, 0), tokens)
    assert timed == [size for size in range(4) for _ in tuner.configs]


@needs_triton
def test_the_autotuner_has_the_shipped_configurations_and_keeps_its_choice() -> None:
    from prefix_grouper_plugins.attention.backends.triton.forward_kernel import forward_kernel

    choices = triton_configs.configurations("forward", 128, 2, (9, 0))
    tuner = triton_configs._tuned(forward_kernel, choices, (9, 0))
    made = [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps, c.num_stages) for c in tuner.configs]
    assert made == list(choices) and len(made) > 1
    assert tuner.cache_results and set(tuner.keys) <= set(forward_kernel.arg_names)
    assert {"group", "size_class"} <= set(tuner.keys)
    assert triton_configs._tuned(forward_kernel, choices, (9, 0)) is tuner
    half = triton_configs.configurations("forward", 128, 2, (8, 0))  # the same for an A100 and a 4090
    assert half == triton_configs.configurations("forward", 128, 2, (8, 9))
    assert triton_configs._tuned(forward_kernel, half, (8, 0)) is not triton_configs._tuned(
        forward_kernel, half, (8, 9)
    )
