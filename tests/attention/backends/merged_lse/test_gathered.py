"""Keys that are copied for the chains below them: what the calls give with emulated kernels, and which levels are copied."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.attention.backends.merged_lse import cuda, gathered
from prefix_grouper_plugins.forest import Forest, forest_of
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


def output_and_grads(layout: PrefixLayout, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Of the CUDA driver, on the queries behind ``layout.num_given``."""
    forest = forest_of(layout.segments, layout.num_given)
    out, lse = cuda.forward(q, k, v, forest, SCALE)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *cuda.backward(do, q, k, v, out, lse, forest, SCALE)]


def with_copies(copied: frozenset[int], layout: PrefixLayout, *tensors: Tensor) -> list[Tensor]:
    """The same where these levels are copied, forward and backward, and NaN is in every gap."""
    forward = functools.partial(emulated_flash_forward, gap_out=torch.nan, gap_lse=torch.nan)
    backward = functools.partial(emulated_flash_backward, gap_grad=torch.nan)
    with (
        mock.patch.object(cuda, "copied_forward", return_value=copied),
        mock.patch.object(cuda, "copied_backward", return_value=copied),
        mock.patch.object(cuda, "flash_ops", return_value=(forward, backward)),
    ):
        return output_and_grads(layout, *tensors)


def every_level(layout: PrefixLayout) -> frozenset[int]:
    return frozenset(forest_of(layout.segments).level.tolist())


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


@settings(max_examples=25, deadline=None)
@given(case=parts())
def test_copies_of_all_levels_give_the_dense_output_and_gradients(case: tuple[PrefixLayout, list[Tensor]]) -> None:
    layout, tensors = case
    assert_all_close(with_copies(every_level(layout), layout, *tensors), dense(layout, *tensors))


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), copied=st.frozensets(st.integers(0, 4)))
def test_copies_of_any_levels_give_the_dense_output_and_gradients(layout: PrefixLayout, copied: frozenset[int]) -> None:
    _, tensors = part_of(layout, 0)
    assert_all_close(with_copies(copied, layout, *tensors), dense(layout, *tensors))


def test_copies_of_one_level_in_a_forest_of_many_give_the_dense_output_and_gradients() -> None:
    """Chains of several segments, of which some are copied; prompts that are tops of chains, and first children."""
    deep = (5, [(4, [(3, [(2, []), (6, [])]), (6, [])]), (2, [(3, []), (4, [(1, []), (2, [])])])])
    layout = layout_of([deep, (7, []), (3, [(2, []), (8, [(4, []), (2, [])])])])
    _, tensors = part_of(layout, 0)
    expected = dense(layout, *tensors)
    for copied in ([0], [1], [2], [3], [0, 2], [1, 3]):
        assert_all_close(with_copies(frozenset(copied), layout, *tensors), expected)


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
    assert bool(gathered.copied_forward(forest, 28, 4)) is forward
    assert bool(gathered.copied_backward(forest, 28, 4)) is backward


def below(beginning: int, prompt: int, response: int, groups: int = 4, group: int = 8) -> Forest:
    """Groups whose prompts begin alike."""
    lengths, parents = [beginning], [-1]
    for _ in range(groups):
        parents += [0, *[len(parents)] * group]
        lengths += [prompt, *[response] * group]
    return forest_of(PrefixLayout.from_segments(lengths, parents).segments)


@pytest.mark.parametrize(
    ("beginning", "prompt", "response", "forward", "backward"),
    [
        (24, 4096, 256, {0}, {0}),  # of a chat template: its few tokens are copied for each prompt, the prompts merged
        (4096, 24, 256, {1}, {1}),  # a long system prompt, below which questions are short
        (24, 64, 512, {0, 1}, {0, 1}),
        (65536, 16384, 64, {0}, set()),
    ],
)
def test_levels_are_copied_each_for_itself(
    beginning: int, prompt: int, response: int, forward: set[int], backward: set[int]
) -> None:
    forest = below(beginning, prompt, response)
    found = gathered.copied_forward(forest, 28, 4), gathered.copied_backward(forest, 28, 4)
    assert [set(levels) & {0, 1} for levels in found] == [forward, backward]


def test_a_copied_beginning_of_prompts_is_in_their_rectangles_and_not_copied_for_each_response() -> None:
    forest = below(5, 100, 20, groups=2, group=3)
    causal, level = cuda.varlen_calls(forest, CPU, copied=frozenset([0]))
    # The first prompt goes on where the beginning ends, the second one gets a copy; both have it in their rectangles.
    assert causal.cu_k.diff().tolist() == [125, 20, 20, 125, 20, 20]
    assert causal.cu_q.diff().tolist() == [125, 20, 20, 120, 20, 20]
    assert level.cu_q.diff().tolist() == [40, 120, 0, 40] and level.cu_k.diff().tolist() == [105, 0, 60, 105]


@pytest.mark.parametrize("copied", [[], [0], [1], [0, 1, 2]])
def test_counts_are_those_of_the_tables(copied: list[int]) -> None:
    layout = layout_of([(20, [(9, []), (30, [(4, []), (6, [])])]), (17, [(3, []), (12, [])])])
    forest, levels = forest_of(layout.segments), frozenset(copied)
    counts = gathered.traffic(forest, levels)
    assert counts.gathered == (len(gathered.copies_of(forest, levels, CPU).key_of) if copied else 0)
    calls = [call for call in cuda.varlen_calls(forest, CPU, copied=levels) if not call.causal]
    pairs = [(call.cu_q.diff(), call.cu_k.diff()) for call in calls]
    assert counts.reached == sum(int(q[k > 0].sum()) for q, k in pairs)
    assert counts.shared == sum(int(k[q > 0].sum()) for q, k in pairs)
    assert counts.levels == len(calls)


def test_rows_that_share_nothing_are_not_gathered() -> None:
    layout = PrefixLayout.from_groups([1, 1], [[30, 20], [9]])
    forest = forest_of(layout.segments)
    assert not gathered.copied_forward(forest, 28, 4) and not gathered.copied_backward(forest, 28, 4)


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
    assert_all_close(output_and_grads(layout, *tensors), dense(layout, *tensors))
    assert seen == expected


def test_gradients_of_copies_are_added_in_float32() -> None:
    forest = forest_of(PrefixLayout.from_groups([5], [[3] * 60]).segments)
    copies = gathered.copies_of(forest, frozenset([0]), CPU)
    grad = torch.randn(len(copies.key_of), 2, 8, dtype=torch.bfloat16)
    expected = torch.zeros(184, 2, 8).index_add_(0, copies.key_of, grad.float()).bfloat16()
    assert torch.equal(copies.sum(grad), expected)
