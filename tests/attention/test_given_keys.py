"""Given tokens have keys and values only: every backend gives their queries' successors what the whole row gives them.

The reference packs the whole row, queries of the given tokens included, and takes what the other queries get: their
outputs, and the gradients of their queries and of all keys and values. It runs on the dense oracle in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends import blockwise
from prefix_grouper_plugins.attention.backends.merged_lse import cuda
from prefix_grouper_plugins.attention.bidirectional import blocks_of
from prefix_grouper_plugins.attention.op import attention_op
from prefix_grouper_plugins.attention.registry import fallbacks
from prefix_grouper_plugins.forest import forest_of
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention import interpreter
from tests.attention.forests import (
    PAIRS,
    Features,
    LargestTensor,
    assert_all_close,
    emulated_flash_backward,
    emulated_flash_forward,
    features_of,
    inputs,
    layout_of,
    layouts,
    output_and_gradients,
)

ALL = Features(heads=4, kv_heads=2, head_dim=12, value_dim=5, window=9, softcap=1.5, sinks=True)
PLAIN = Features(heads=4, kv_heads=2, sinks=True)
CPU = torch.device("cpu")
# A prompt of two segments below which everything lies; a group, its prompt given; a given tree beside another one.
CASES: dict[str, Callable[[], tuple[PrefixLayout, int]]] = {
    "path": lambda: (layout_of([(70, [(40, [(20, []), (33, [(5, []), (9, [])])])])]), 110),
    "group": lambda: (PrefixLayout.from_groups([64], [[25, 1, 30]]), 63),
    "beside_a_tree": lambda: (layout_of([(20, [(9, []), (30, [])]), (17, [(3, []), (12, [])])]), 20),
    "padded": lambda: (PrefixLayout.from_groups([40], [[9, 12]]).pad_to(70), 39),
}


def given_keys(layout: PrefixLayout, num_given: int) -> PrefixLayout:
    shorter = copy.copy(layout)
    shorter.num_given = num_given
    return shorter


def attend(layout: PrefixLayout, features: Features, backend: str) -> Callable[..., Tensor]:
    options = {**features.options(), "backend": backend}
    return lambda q, k, v, sinks: shared_prefix_attention(q, k, v, layout, sinks=sinks, **options)


def whole_row(layout: PrefixLayout, num_given: int, features: Features) -> Callable[..., Tensor]:
    """On the same keys, with made-up queries for the given tokens, whose outputs are thrown away."""

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        queries = torch.cat([torch.ones(num_given, *q.shape[1:], dtype=q.dtype), q])
        return attend(layout, features, "dense")(queries, k, v, sinks)[num_given:]

    return run


def queries_of(tensors: list[Tensor], num_given: int) -> list[Tensor]:
    query, *rest = tensors
    return [query.detach()[num_given:].clone().requires_grad_(), *rest]


def assert_given_equals_whole_row(
    layout: PrefixLayout,
    num_given: int,
    features: Features,
    backend: str,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
) -> None:
    tensors = queries_of(inputs(layout, features, dtype), num_given)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = output_and_gradients(attend(given_keys(layout, num_given), features, backend), tensors)
    assert_all_close(actual, output_and_gradients(whole_row(layout, num_given, features), exact), tolerance)


@st.composite
def given_layouts(draw: st.DrawFn) -> tuple[PrefixLayout, int]:
    layout = draw(layouts())
    ends = [0, *layout.segments[:-1, 1].tolist()]
    return layout, draw(st.sampled_from(ends))


@pytest.mark.parametrize("backend", ["dense", "blockwise", "auto"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@settings(max_examples=3, deadline=None)
@given(case=given_layouts())
def test_outputs_and_gradients_are_those_of_the_whole_row(
    backend: str, names: tuple[str, ...], case: tuple[PrefixLayout, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "CPU_TILE", 16)
        assert_given_equals_whole_row(*case, features_of(names), backend)


@pytest.mark.parametrize("backend", ["dense", "blockwise", "merged_lse"])
@pytest.mark.parametrize("name", CASES)
def test_prompts_of_trainers_are_those_of_the_whole_row(backend: str, name: str) -> None:
    for features in (PLAIN,) if backend == "merged_lse" else (PLAIN, ALL):
        assert_given_equals_whole_row(*CASES[name](), features, backend)


@settings(max_examples=40, deadline=None)
@given(case=given_layouts(), poison=st.booleans())
def test_varlen_calls_on_cuda_are_those_of_the_whole_row(case: tuple[PrefixLayout, int], poison: bool) -> None:
    """The driver of the CUDA kernels, with emulated ones; NaN in gaps shows that nothing there is read."""
    layout, num_given = case
    features = Features(heads=4, kv_heads=2)
    q, k, v = (x.detach() for x in queries_of(inputs(layout, features), num_given))
    calls = cuda.varlen_calls(forest_of(layout.segments, num_given), CPU)
    gap = {"gap_out": torch.nan, "gap_lse": torch.nan} if poison else {}
    gap_grad = {"gap_grad": torch.nan} if poison else {}
    out, lse = cuda.varlen_forward(lambda *x, **y: emulated_flash_forward(*x, **y, **gap), q, k, v, calls, 8**-0.5)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    backward = lambda *x, **y: emulated_flash_backward(*x, **y, **gap_grad)  # noqa: E731
    grads = cuda.varlen_backward(backward, do, q, k, v, out, lse, calls, 8**-0.5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert_all_close([out, *grads], output_and_gradients(whole_row(layout, num_given, features), leaves))


def test_a_given_prompt_of_several_segments_is_one_call_without_gaps() -> None:
    layout, num_given = CASES["path"]()
    causal, prompt, *deeper = cuda.varlen_calls(forest_of(layout.segments, num_given), CPU)
    # The first response continues the prompt: its queries see the keys as they lie.
    assert causal.queries == (0, 67, None) and causal.keys == (0, 177, None)
    assert causal.cu_q.tolist()[:2] == [0, 20] and causal.cu_k.tolist()[:2] == [0, 130]
    assert prompt.cu_q.tolist() == [0, 47] and prompt.cu_k.tolist() == [0, 110]
    assert len(deeper) == 1  # of the response that branches


@pytest.mark.parametrize("features", [PLAIN, ALL], ids=["plain", "all_features"])
def test_operator_passes_opcheck(features: Features) -> None:
    layout, num_given = CASES["group"]()
    q, k, v, *sinks = queries_of(inputs(layout, features), num_given)
    options = (sinks[0] if sinks else None, 0.3, features.window, features.softcap, "auto")
    library.opcheck(attention_op, (q, k, v, layout.segments, num_given, *options))


@pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))
def test_triton_kernels_are_those_of_the_whole_row() -> None:
    with interpreter.interpreter() as call:
        for make in CASES.values():
            for features in (PLAIN, Features(heads=2, kv_heads=1, window=30, softcap=2.0, sinks=True)):
                call(assert_given_equals_whole_row, *make(), features, "triton", torch.float32, 2e-5)


def test_flex_is_that_of_the_whole_row(on_cpu: Any) -> None:
    cases = [*(make() for make in CASES.values()), (PrefixLayout.from_groups([300], [[60, 150]]), 299)]
    for layout, num_given in cases:
        assert_given_equals_whole_row(layout, num_given, ALL, "flex")
    assert not fallbacks


def test_blocks_of_given_tokens_have_no_queries_and_others_keep_theirs() -> None:
    layout = PrefixLayout.from_groups([9], [[6, 5]])
    layout.blocks = blocks_of(
        torch.tensor([-1, 0, 0, 0, -1, -1, -1, -1, -1, 1, 1, 1, -1, -1, -1, 2, 2, -1, -1]), layout
    )
    q, k, v = inputs(layout, Features())
    expected = shared_prefix_attention(q, k, v, layout)[8:]
    torch.testing.assert_close(shared_prefix_attention(q[8:], k, v, given_keys(layout, 8)), expected)


@pytest.mark.parametrize(
    ("num_given", "message"), [(5, r"num_given=5 is not where one.*whole segments"), (19, "num_given=19")]
)
def test_given_tokens_that_are_not_whole_segments_are_refused(num_given: int, message: str) -> None:
    layout = PrefixLayout.from_groups([9], [[6, 5]])
    q, k, v = inputs(layout, Features())
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(q[num_given:], k, v, given_keys(layout, num_given))


@pytest.mark.parametrize("backend", ["auto", "blockwise"])
def test_given_keys_that_no_query_sees_change_nothing(backend: str) -> None:
    """Two rows that share nothing, and the first one is given as a whole."""
    layout = PrefixLayout.from_groups([4, 3], [[2], [3]]).given(5)
    generator = torch.Generator().manual_seed(0)
    sizes = ((layout.num_queries, 4), (layout.num_tokens, 2), (layout.num_tokens, 2))
    tensors = [torch.randn(n, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for n, h in sizes]
    actual = output_and_gradients(lambda *x: shared_prefix_attention(*x[:3], layout, backend=backend), tensors)
    rows = [x[-layout.num_queries :].transpose(0, 1) for x in tensors]
    expected = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(0, 1)
    torch.testing.assert_close(actual[0], expected)
    assert not actual[2][:5].any() and not actual[3][:5].any()


def test_queries_of_given_tokens_are_refused() -> None:
    layout = PrefixLayout.from_groups([9], [[6, 5]])
    with pytest.raises(
        ValueError, match="query has 19 tokens and the layout 19, of which 8 are given and have no query"
    ):
        shared_prefix_attention(*inputs(layout, Features()), given_keys(layout, 8))


def test_keys_and_values_are_not_copied() -> None:
    """No tensor of the shape of K and V has more tokens than the packed row."""
    layout, num_given = PrefixLayout.from_groups([1501], [[100] * 8]), 1500
    q, k, v = (
        x.detach() for x in queries_of(inputs(layout, Features(head_dim=24, value_dim=24), torch.float32), num_given)
    )
    for backend in ("merged_lse", "blockwise"):
        with LargestTensor(2, 24) as largest:
            attend(given_keys(layout, num_given), Features(head_dim=24, value_dim=24), backend)(q, k, v, None)
        assert largest.tokens <= layout.num_tokens
