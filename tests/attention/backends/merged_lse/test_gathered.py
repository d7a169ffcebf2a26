"""One causal call over gathered keys: what it gives with emulated kernels, and when it is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends.merged_lse import cuda, gathered, merge
from prefix_grouper_plugins.forest import forest_of
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
SCALE = 8**-0.5
FEATURES = Features(heads=4, kv_heads=2)


def output_and_grads(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor, driver: bool = False) -> list[Tensor]:
    """Of the gathered call, or of the CUDA driver, on the queries behind ``layout.num_given``."""
    forest = forest_of(layout.segments, layout.num_given)
    if driver:
        out, lse = cuda.forward(q, k, v, forest, SCALE)
    else:
        call = gathered.gathered_call(forest, CPU)
        out, lse = gathered.gathered_forward(emulated_flash_forward, q, k, v, call, SCALE)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    if driver:
        return [out, *cuda.backward(do, q, k, v, out, lse, forest, SCALE)]
    return [out, *gathered.gathered_backward(emulated_flash_backward, do, q, k, v, out, lse, call, SCALE)]


def dense(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return output_and_gradients(lambda *x: shared_prefix_attention(*x[:3], layout, backend="dense"), leaves)


def part_of(layout: PrefixLayout, num_given: int) -> tuple[PrefixLayout, list[Tensor]]:
    part = copy.copy(layout)
    part.num_given = num_given
    q, k, v = (x.detach() for x in inputs(layout, FEATURES))
    return part, [q[num_given:], k, v]


@st.composite
def parts(draw: st.DrawFn) -> tuple[PrefixLayout, list[Tensor]]:
    layout = draw(layouts())
    return part_of(layout, draw(st.sampled_from([0, *layout.segments[:-1, 1].tolist()])))


@settings(max_examples=40, deadline=None)
@given(case=parts())
def test_the_gathered_call_gives_the_dense_output_and_gradients(case: tuple[PrefixLayout, list[Tensor]]) -> None:
    layout, tensors = case
    assert_all_close(output_and_grads(layout, *tensors), dense(layout, *tensors))


@pytest.mark.parametrize(
    ("prompt", "response", "group", "forward", "backward"),
    [
        (500, 512, 8, True, True),
        (700, 512, 8, True, False),
        (4608, 1024, 8, True, False),
        (5000, 1024, 8, False, False),
        (8192, 1024, 8, False, False),
        (16384, 1024, 16, False, False),
        (1024, 256, 8, True, False),
        (256, 512, 8, True, True),
        (64, 512, 8, True, True),
    ],
)
def test_keys_are_gathered_where_that_moves_fewer_bytes(
    prompt: int, response: int, group: int, forward: bool, backward: bool
) -> None:
    forest = forest_of(PrefixLayout.from_groups([prompt], [[response] * group]).segments)
    assert gathered.gathers_forward(forest, 28, 4) is forward
    assert gathered.gathers_backward(forest, 28, 4) is backward


def test_counts_are_those_of_the_tables() -> None:
    layout = layout_of([(20, [(9, []), (30, [(4, []), (6, [])])]), (17, [(3, []), (12, [])])])
    forest = forest_of(layout.segments)
    counts = gathered.traffic(forest)
    assert counts.copied == len(gathered.gathered_call(forest, CPU).key_of) - layout.num_tokens
    calls = [call for call in cuda.varlen_calls(forest, CPU) if not call.causal]
    pairs = [(call.cu_q.diff(), call.cu_k.diff()) for call in calls]
    assert counts.reached == sum(int(q[k > 0].sum()) for q, k in pairs)
    assert counts.shared == sum(int(k[q > 0].sum()) for q, k in pairs)


def test_rows_that_share_nothing_are_not_gathered() -> None:
    layout = PrefixLayout.from_groups([1, 1], [[30, 20], [9]])
    forest = forest_of(layout.segments)
    assert not gathered.gathers_forward(forest, 28, 4) and not gathered.gathers_backward(forest, 28, 4)


def one_response_to_a_given_prompt() -> PrefixLayout:
    return PrefixLayout.from_rows([torch.arange(212), torch.arange(200)])  # the second row ends the prompt's segment


# Layout, given tokens, and the calls that are expected: causal or not, and how many keys they get.
DRIVEN: dict[str, tuple[PrefixLayout, int, list[tuple[bool, int]]]] = {
    "short": (PrefixLayout.from_groups([3], [[30, 25]]), 0, [(True, 2 + 2 + 55)]),
    "long": (PrefixLayout.from_groups([200], [[12, 9, 14, 3]]), 0, [(True, 237), (False, 199)]),
    "one_response_to_a_given_prompt": (one_response_to_a_given_prompt(), 199, [(True, 211)]),
}


@pytest.mark.parametrize("name", DRIVEN)
def test_the_driver_takes_the_one_that_moves_fewer_bytes_and_gives_the_dense_results(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, num_given, expected = DRIVEN[name]
    layout, tensors = part_of(layout, num_given)
    seen: list[tuple[bool, int]] = []

    def forward(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((rest[6], len(key)))
        assert not num_given or key.data_ptr() == tensors[1].data_ptr(), "a copy that is not needed"
        return emulated_flash_forward(query, key, *rest, **options)

    monkeypatch.setattr(cuda, "flash_ops", lambda: (forward, emulated_flash_backward))
    assert_all_close(output_and_grads(layout, *tensors, driver=True), dense(layout, *tensors))
    assert seen == expected


def test_gradients_of_copies_are_added_in_float32() -> None:
    call = gathered.gathered_call(forest_of(PrefixLayout.from_groups([5], [[3] * 60]).segments), CPU)
    grad = torch.randn(len(call.key_of), 2, 8, dtype=torch.bfloat16)
    expected = torch.zeros(184, 2, 8).index_add_(0, call.key_of, grad.float()).bfloat16()
    assert torch.equal(merge.sum_copies(grad, call.key_of, call.copies, call.first_copy), expected)
