"""The flex backend: its block mask bit by bit, its results against the oracle, and what happens when torch gives up.

FlexAttention refuses gradients on a CPU. Its definition in plain torch has them, so the tests lift that check and run
what is compiled on a GPU through the same tracing and the same autograd, with that definition in place of the kernel.
"""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.exc import InductorError
from torch._inductor.runtime.triton_heuristics import NoTritonConfigsError
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefix_grouper_plugins.attention.backends import flex
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.attention.registry import fallbacks
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.forest import Forest, forest_of
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import Features, assert_all_close, attend, inputs, layout_of, layouts, output_and_gradients

CPU = torch.device("cpu")
FEATURES = {
    "gqa_sinks": Features(heads=6, kv_heads=2, sinks=True),
    "all": Features(heads=4, kv_heads=2, head_dim=12, value_dim=5, window=9, softcap=1.5, sinks=True),
}


def padded(layout: PrefixLayout, block: int) -> Forest:
    return flex.padded_forest(forest_of(layout.segments), -(-layout.num_tokens // block) * block)


def segments_of(forest: Forest) -> Tensor:
    return torch.from_numpy(np.stack([forest.start, forest.end, forest.parent, forest.subtree_end], 1)).int()


# ---------------------------------------------------------------------------------------------------- the block mask


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), block=st.sampled_from([2, 5, 16]), window=st.none() | st.integers(1, 60))
def test_block_tables_are_those_of_the_dense_mask(layout: PrefixLayout, block: int, window: int | None) -> None:
    forest = padded(layout, block)
    pairs = visibility_mask(segments_of(forest), window).unflatten(0, (-1, block)).unflatten(2, (-1, block))
    some, every = pairs.any(3).any(1), pairs.all(3).all(1)
    partial, full = flex.block_tables(forest, window, block)
    assert torch.equal(torch.from_numpy(full), every)
    assert torch.equal(torch.from_numpy(partial), some & ~every)


@pytest.mark.parametrize("window", [None, 150, 400])
def test_the_block_mask_is_the_one_that_torch_builds_from_all_pairs(window: int | None) -> None:
    layout = layout_of([(300, [(150, [(20, []), (200, [])]), (70, [])]), (90, []), (40, [(9, []), (260, [])])])
    mask = flex.block_mask(forest_of(layout.segments), window, CPU)
    length = mask.seq_lengths[0]
    visible = visibility_mask(segments_of(flex.padded_forest(forest_of(layout.segments), length)), window)
    expected = torch_flex.create_block_mask(lambda b, h, q, k: visible[q, k], None, None, length, length, "cpu")
    positions = torch.arange(length)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, positions[:, None], positions), visible)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, blocks = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        assert counts.dtype == blocks.dtype == torch.int32
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), name
        used = torch.arange(blocks.shape[-1]) < counts[..., None]  # entries behind the count are never read
        assert torch.equal(blocks[used], getattr(expected, f"{name}_indices")[used]), name
    assert bool(mask.full_kv_num_blocks.any()) == (window != 150)  # no block of 128 x 128 fits into a window of 150


class Elements(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("window", [None, 4096])
def test_a_mask_of_131072_tokens_stays_quadratic_in_blocks(window: int | None) -> None:
    """T x T would be 1.7e10 elements; (T / 128)^2 is 1e6."""
    layout = PrefixLayout.from_groups([16385], [[8192] * 14])
    assert layout.num_tokens == 131_072
    arrays: list[int] = []
    with pytest.MonkeyPatch.context() as patch, Elements() as made:
        for name in ("zeros", "argsort", "concatenate", "append"):
            real = getattr(np, name)
            patch.setattr(np, name, lambda *a, _real=real, **k: (r := _real(*a, **k), arrays.append(r.size))[0])
        mask = flex.block_mask(forest_of(layout.segments), window, CPU)
    blocks = 1024
    assert max(made.largest, *arrays) <= blocks * (blocks + 1)
    kept = sum(x.numel() for x in mask.as_tuple() if isinstance(x, Tensor))
    assert kept == 4 * (blocks * blocks + blocks)
    flex.block_mask.cache_clear()


# ------------------------------------------------------------------------------------------------- results and torch


def assert_equals_dense(layout: PrefixLayout, features: Features) -> None:
    tensors = inputs(layout, features)
    actual = output_and_gradients(attend(layout, features, "flex"), tensors)
    assert_all_close(actual, output_and_gradients(attend(layout, features, "dense"), tensors))


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_equal_dense_gradients_with_two_compilations_for_all_lengths(name: str, on_cpu: list[int]) -> None:
    """One compilation for the forward and one for the backward, whatever the layout. 3, 4, 5, 9 and 2 blocks."""
    sizes = ([300], [[60, 20]]), ([257, 30], [[90, 8], [70]]), ([9, 500], [[60], [40, 1, 1]]), ([1000], [[50, 60]])
    for groups in (*sizes, ([20], [[3, 4]])):
        assert_equals_dense(PrefixLayout.from_groups(*groups), FEATURES[name])
    assert len(on_cpu) == 2 and not fallbacks


def test_gradients_equal_dense_gradients_on_trees_across_block_borders(on_cpu: list[int]) -> None:
    deep = (150, [(40, [(200, []), (33, [])]), (25, [(130, []), (5, [])])])
    for layout in (layout_of([deep, (129, [])]), layout_of([(127, [(1, []), (1, [(255, []), (3, [])])]), deep])):
        assert_equals_dense(layout, FEATURES["all"])


def test_whole_blocks_need_no_padding_and_give_the_same(on_cpu: list[int]) -> None:
    layout = PrefixLayout.from_groups([257], [[64, 64]])
    assert layout.num_tokens == 384 and flex._padded_length(384) == 384
    assert_equals_dense(layout, FEATURES["gqa_sinks"])


def test_a_mask_built_in_inference_mode_serves_training(on_cpu: list[int]) -> None:
    layout = PrefixLayout.from_groups([300], [[60, 20]])
    features = FEATURES["gqa_sinks"]
    tensors = inputs(layout, features)
    with torch.inference_mode():
        scored = attend(layout, features, "flex")(*tensors)
    assert_equals_dense(layout, features)
    assert_all_close([scored], [attend(layout, features, "dense")(*tensors)])
    assert flex.block_mask.cache_info().misses == 1


def test_half_precision_gradients_stay_near_float64(on_cpu: list[int]) -> None:
    layout, features = PrefixLayout.from_groups([200], [[60, 20]]), FEATURES["gqa_sinks"]
    tensors = inputs(layout, features, torch.bfloat16)
    actual = output_and_gradients(attend(layout, features, "flex"), tensors)
    assert [x.dtype for x in actual] == [torch.bfloat16] * 5
    exact = [x.detach().double().requires_grad_() for x in tensors]
    assert_all_close(actual, output_and_gradients(attend(layout, features, "dense"), exact), 2.5e-2)


def test_at_the_recompile_limit_the_layer_runs_on_blockwise_and_says_so(
    on_cpu: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit comes between a forward and its backward, so that one runs here and the other there."""
    monkeypatch.setattr(flex, "RECOMPILE_LIMIT", 1)
    with caplog.at_level(logging.WARNING, "prefix_grouper_plugins"):
        for length in (300, 700):
            assert_equals_dense(PrefixLayout.from_groups([length], [[60, 20]]), FEATURES["gqa_sinks"])
    assert len(on_cpu) == 1
    assert fallbacks["flex"] == {"torch has compiled it 1 times": 3}  # a backward, a forward, a backward
    assert [r.message for r in caplog.records if r.name == "prefix_grouper_plugins"] == [
        "prefix grouper: flex is not used, layers of this kind run on blockwise: torch has compiled it 1 times"
    ]


@pytest.mark.parametrize("broken_pass", ["forward", "backward"])
def test_a_kernel_that_does_not_compile_is_replaced_once_and_for_all(
    broken_pass: str, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def broken(graph: Any, example_inputs: Any) -> Any:
        attempts.append(1)
        raise InductorError(RuntimeError("out of shared memory"), None)

    def works(graph: Any, example_inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    forward, backward = (broken, works) if broken_pass == "forward" else (works, broken)
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    compiled = torch.compile(flex._attention, dynamic=True, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for _ in range(2):
        assert_equals_dense(PrefixLayout.from_groups([300], [[60, 20]]), FEATURES["gqa_sinks"])
    ((reason, calls),) = fallbacks["flex"].items()
    assert reason == "torch could not compile it (RuntimeError: out of shared memory)"
    assert calls == {"forward": 4, "backward": 3}[broken_pass]  # of two forwards and two backwards
    assert len(attempts) <= 2  # torch tries to compile a backward at once, and again when it is needed


def test_a_kernel_that_fits_no_gpu_of_this_kind_is_replaced_when_its_first_run_says_so(
    on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any) -> Any:
        raise NoTritonConfigsError("No valid triton configs. OutOfResources: out of resource: shared memory")

    monkeypatch.setattr(flex, "_compiled", lambda: too_large)
    assert_equals_dense(PrefixLayout.from_groups([300], [[60, 20]]), FEATURES["gqa_sinks"])
    ((reason, calls),) = fallbacks["flex"].items()
    assert (
        reason.startswith("torch could not compile it (NoTritonConfigsError: No valid triton configs. OutOfRes")
        and calls == 2
    )


def test_a_fault_that_is_no_compilation_is_not_swallowed(on_cpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(flex, "_compiled", lambda: wrong)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        assert_equals_dense(PrefixLayout.from_groups([300], [[60, 20]]), FEATURES["gqa_sinks"])


def test_it_runs_inside_a_compiled_model(on_cpu: list[int]) -> None:
    layout, features = PrefixLayout.from_groups([300], [[60, 20]]), FEATURES["gqa_sinks"]
    tensors = inputs(layout, features)
    compiled = torch.compile(attend(layout, features, "flex"), fullgraph=True, backend="eager")
    expected = output_and_gradients(attend(layout, features, "dense"), tensors)
    assert_all_close(output_and_gradients(compiled, tensors), expected)


def test_the_gradient_of_the_log_sum_exp_is_needed(on_cpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the comparisons above must be able to see: with sinks, ``out`` depends on the kernel's lse too."""
    monkeypatch.setattr(Tensor, "expm1", lambda self: torch.zeros_like(self))
    with pytest.raises(AssertionError, match="dq is off"):
        assert_equals_dense(PrefixLayout.from_groups([300], [[60, 20]]), FEATURES["gqa_sinks"])


def kernel_lse(mask: torch_flex.BlockMask, scores: Tensor, tile: int, options: dict[str, Any]) -> Tensor:
    """Log-sum-exp of each query as torch's Triton kernel takes it: partial blocks first, tile after tile of their keys.

    Without ``ROWS_GUARANTEED_SAFE`` the kernel looks after queries that have seen no key yet (forward_block_mn in
    torch/_inductor/kernel/flex/templates/common.py.jinja).
    """
    found = []
    for block in range(scores.shape[0] // flex.BLOCK):
        queries = torch.arange(block * flex.BLOCK, (block + 1) * flex.BLOCK)
        top, total = torch.full((flex.BLOCK,), -torch.inf), torch.zeros(flex.BLOCK)
        for kind in ("kv", "full_kv"):
            count = int(getattr(mask, f"{kind}_num_blocks")[0, 0, block])
            for first in (getattr(mask, f"{kind}_indices")[0, 0, block, :count] * flex.BLOCK).tolist():
                for keys in torch.arange(first, first + flex.BLOCK).split(tile):
                    seen = mask.mask_mod(*torch.zeros(2), queries[:, None], keys)
                    s = scores[queries[:, None], keys].masked_fill(~seen, -torch.inf)
                    new_top = torch.maximum(top, s.amax(1))
                    shift = new_top
                    if not options.get("ROWS_GUARANTEED_SAFE"):
                        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
                    total = total * (top - shift).exp() + (s - shift[:, None]).exp().sum(1)
                    top = new_top
        found.append(top + total.log())
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_is_promised_nothing_that_a_forest_does_not_hold(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled on a GPU is not run here: responses begin within a block, so that their first tile shows them no key."""
    layout = layout_of([(150, [(40, []), (25, []), (90, [])]), (30, [])])
    mask = flex.block_mask(forest_of(layout.segments), window, CPU)
    asked: dict[str, Any] = {}

    def kernel(*tensors: Tensor, **options: Any) -> Any:
        asked.update(options)
        lse = tensors[0]
        return tensors[0], lse if "return_lse" in options else SimpleNamespace(lse=lse)  # torch 2.8, and later

    monkeypatch.setattr(torch_flex, "flex_attention", kernel)
    flex._attention(*torch.zeros(3, 1), mask, 1.0, None)
    scores = torch.randn(mask.seq_lengths, generator=torch.Generator().manual_seed(0))
    seen = visibility_mask(segments_of(flex.padded_forest(forest_of(layout.segments), len(scores))), window)
    expected = scores.masked_fill(~seen, -torch.inf).logsumexp(1)
    torch.testing.assert_close(kernel_lse(mask, scores, 32, asked.get("kernel_options") or {}), expected)
    assert kernel_lse(mask, scores, 32, {"ROWS_GUARANTEED_SAFE": True}).isnan().any()


# ------------------------------------------------------------------------------------------------------------ why not


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "no backward on the CPU"),
        ({"device": torch.device("mps")}, "need an NVIDIA CUDA device, not mps"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 8}, "head dim 8 is not between 16 and 256"),
        ({"value_dim": 512}, "head dim 512 is not between 16 and 256"),
    ],
)
def test_why_not_names_the_value(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    request = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, **changes}
    assert reason in str(flex.why_not(Request(**request)))


def test_why_not_asks_for_a_gpu_and_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(torch.device("cuda"), torch.bfloat16, 64, 64, window=5, softcap=3.0)
    gpu: dict[str, Any] = {"is_available": lambda: True, "get_device_capability": lambda device: (7, 5)}
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in gpu.items():
            patch.setattr(torch.cuda, name, value)
        assert "compute capability 8.0" in str(flex.why_not(request))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr("torch.utils._triton.has_triton", lambda: False)
        assert "Triton, which is not installed" in str(flex.why_not(request))
        patch.setattr("torch.utils._triton.has_triton", lambda: True)
        with torch._dynamo.config.patch(disable=True):
            assert "torch.compile is switched off" in str(flex.why_not(request))
        assert flex.why_not(request) is None
