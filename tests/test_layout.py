"""PrefixLayout: what is shared, where it lies, and what must be refused."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins import PrefixLayout, shared_prefix_attention
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from tests import tiny

small_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8).filter(
    lambda rows: max(map(len, rows)) > 1
)


def distinct_transitions(rows, keys, shareable):
    """A packed position is one distinct beginning of two tokens or more; private ones belong to their row alone."""
    return {
        (key, tuple(row[:n]), None if n <= shared else i)
        for i, (row, key, shared) in enumerate(zip(rows, keys, shareable, strict=True))
        for n in range(2, len(row) + 1)
    }


@given(small_rows, st.data())
def test_every_distinct_transition_is_packed_once_and_unpacks_to_every_row(rows, data):
    keys = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    shareable = data.draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
    tensors = [torch.tensor(row) for row in rows]
    layout = PrefixLayout.from_rows(tensors, keys, shareable=shareable)

    assert layout.num_tokens == len(distinct_transitions(rows, keys, shareable))
    assert layout.num_row_tokens == sum(map(len, rows))
    packed, labels = layout.pack(tensors), layout.labels(tensors)
    for row, tokens, following, positions in zip(
        tensors, layout.unpack(packed), layout.unpack(labels), layout.unpack(layout.position_ids), strict=True
    ):
        assert torch.equal(tokens, row[:-1])
        assert torch.equal(following, row[1:])
        assert torch.equal(positions, torch.arange(len(row) - 1))


@given(small_rows)
def test_a_query_sees_exactly_its_own_row_up_to_itself(rows):
    tensors = [torch.tensor(row) for row in rows]
    layout = PrefixLayout.from_rows(tensors)
    index = torch.arange(layout.num_tokens)
    visible = (index[None] <= index[:, None]) & (index[:, None] < layout.subtree_end[None])
    for positions in layout.row_index.split([len(row) - 1 for row in rows]):
        for i, query in enumerate(positions):
            assert visible[query].nonzero()[:, 0].tolist() == sorted(positions[: i + 1].tolist())


@given(small_rows)
def test_segments_tile_the_row_in_preorder(rows):
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in rows])
    cursor = 0
    for index, (start, end, parent, last) in enumerate(layout.segments.tolist()):
        assert start == cursor < end <= last <= layout.num_tokens
        assert -1 <= parent < index
        if parent >= 0:
            assert layout.segments[parent, 1] <= start < layout.segments[parent, 3]
        assert (layout.subtree_end[start:end] == last).all()
        cursor = end
    assert cursor == layout.num_tokens


def test_one_group_lies_as_in_the_picture():
    layout = PrefixLayout.from_groups([4], [[3, 4, 2]])
    assert layout.num_tokens == 3 + 3 + 4 + 2
    assert layout.segments.tolist() == [[0, 3, -1, 12], [3, 6, 0, 6], [6, 10, 0, 10], [10, 12, 0, 12]]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 3, 4]
    assert layout.rows_per_position.tolist() == [3, 3, 3] + [1] * 9


def test_from_groups_equals_from_rows_with_private_responses():
    generator = torch.Generator().manual_seed(0)
    prompts, responses = [5, 1, 3], [[2, 4], [3, 1, 1], [6]]
    rows = []
    for length, own in zip(prompts, responses, strict=True):
        prompt = torch.randint(0, 100, (length,), generator=generator)
        rows += [torch.cat([prompt, torch.randint(0, 100, (n,), generator=generator)]) for n in own]
    lengths = [p for p, own in zip(prompts, responses, strict=True) for _ in own]
    by_groups = PrefixLayout.from_groups(prompts, responses)
    by_rows = PrefixLayout.from_rows(rows, shareable=lengths)
    for name in ("segments", "position_ids", "subtree_end", "row_index", "source_index"):
        assert torch.equal(getattr(by_groups, name), getattr(by_rows, name)), name


def test_a_system_prompt_and_a_fork_in_a_conversation_are_found():
    system, one, two = [1, 2, 3, 4], [5, 6], [7]
    rows = [system + one + [8], system + one + [9, 9], system + two + [8], [1, 2, 9]]
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in rows])
    assert layout.num_tokens == 1 + 2 + 2 + 1 + 2 + 2 + 1  # 1 | 2 3 | 4 5 | 6 | 6 9 | 4 7 | 2, the last tokens dropped
    levels = {-1: 0}
    for index, (_, _, parent, _) in enumerate(layout.segments.tolist()):
        levels[index] = levels[parent] + 1
    assert max(levels.values()) == 4


def test_rows_with_different_keys_share_nothing():
    rows = [torch.tensor([1, 2, 3])] * 2
    assert PrefixLayout.from_rows(rows, ["image a", "image b"]).num_tokens == 4
    assert PrefixLayout.from_rows(rows, ["image a", "image a"]).num_tokens == 2


def test_order_of_rows_does_not_matter():
    a, b, c = torch.tensor([1, 2, 3, 4]), torch.tensor([9, 2, 3]), torch.tensor([1, 2, 3, 5])
    assert PrefixLayout.from_rows([a, b, c]).num_tokens == PrefixLayout.from_rows([a, c, b]).num_tokens == 6


def test_unpack_adds_the_gradients_of_all_rows_that_share_a_position():
    layout = PrefixLayout.from_groups([3], [[1, 2, 2]])
    values = torch.zeros(layout.num_tokens, requires_grad=True)
    sum(row.sum() for row in layout.unpack(values)).backward()
    assert torch.equal(values.grad, layout.rows_per_position.float())


def test_a_million_row_tokens_take_less_than_two_seconds():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(16):
        prompt = torch.randint(0, 150_000, (6_000,), generator=generator)
        rows += [torch.cat([prompt, torch.randint(0, 150_000, (2_000,), generator=generator)]) for _ in range(8)]
    start = time.process_time()
    layout = PrefixLayout.from_rows(rows)
    assert layout.num_row_tokens > 1_000_000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], "prompt_lengths is empty"),
        ([4], [], "prompt_lengths has 1 entries and response_lengths has 0"),
        ([4, 0], [[1], [1]], r"prompt_lengths\[1\] is 0"),
        ([4], [[]], r"response_lengths\[0\] is empty"),
        ([4], [[3, 0]], r"response_lengths\[0\]\[1\] is 0"),
    ],
)
def test_impossible_groups_are_named(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_groups(prompts, responses)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "rows is empty"),
        ([torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)], {}, r"rows\[1\] is empty"),
        ([torch.tensor([[1, 2]])], {}, r"rows\[0\] is a torch.int64 tensor of shape \(1, 2\)"),
        ([torch.tensor([1.0, 2.0])], {}, r"rows\[0\] is a torch.float32 tensor"),
        ([torch.tensor([1])], {}, "every row has one token"),
        ([torch.tensor([1, 2])], {"keys": ["a", "b"]}, "keys has 2 entries for 1 rows"),
        ([torch.tensor([1, 2])], {"shareable": []}, "shareable has 0 entries for 1 rows"),
    ],
)
def test_impossible_rows_are_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        PrefixLayout.from_rows(rows, **options)


def test_rows_and_values_of_another_shape_are_refused():
    layout = PrefixLayout.from_groups([3], [[2, 2]])
    with pytest.raises(ValueError, match="got 1 rows, the layout was made for 2"):
        layout.pack([torch.zeros(5)])
    with pytest.raises(ValueError, match="row 1 has 4 tokens, the layout was made for 5"):
        layout.labels([torch.zeros(5), torch.zeros(4)])
    with pytest.raises(ValueError, match="values has 5 positions, the layout has 6"):
        layout.unpack(torch.zeros(5))


# --- padding ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first backward of a process starts threads
@given(small_rows, st.integers(0, 5))
def test_padding_lies_behind_the_rows_and_belongs_to_none(rows, added):
    tensors = [torch.tensor(row) for row in rows]
    layout = PrefixLayout.from_rows(tensors)
    real = layout.num_tokens
    padded = layout.pad_to(real + added)
    assert padded.num_tokens == real + added and padded.num_padding == added
    assert padded.num_row_tokens == layout.num_row_tokens

    assert padded.pack(tensors).tolist() == layout.pack(tensors).tolist() + [rows[0][0]] * added
    assert padded.labels(tensors).tolist() == layout.labels(tensors).tolist() + [-100] * added
    assert padded.position_ids.tolist() == layout.position_ids.tolist() + list(range(added))
    assert padded.subtree_end.tolist() == layout.subtree_end.tolist() + [real + added] * added
    assert padded.rows_per_position.tolist() == layout.rows_per_position.tolist() + [0] * added
    values = torch.arange(padded.num_tokens, dtype=torch.float64, requires_grad=True)
    for row, expected in zip(padded.unpack(values), layout.unpack(values[:real]), strict=True):
        assert torch.equal(row, expected)
    torch.cat(padded.unpack(values)).sum().backward()
    assert torch.equal(values.grad, padded.rows_per_position.double())


FOREST = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 7], [1, 2, 3, 8, 8], [9, 9, 9]]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("dense", {}),
        ("dense", {"sliding_window": 3, "softcap": 2.0}),
        ("blockwise", {}),
        ("blockwise", {"sliding_window": 3, "softcap": 2.0}),
        ("merged_lse", {}),
    ],
)
@pytest.mark.parametrize("added", [1, 20])
def test_padding_is_seen_by_no_row_and_no_gradient_crosses(backend, options, added):
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in FOREST])
    real = layout.num_tokens
    padded = layout.pad_to(real + added)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(padded.num_tokens, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    weight = torch.randn(real, 4, 8, generator=generator, dtype=torch.float64)

    out = shared_prefix_attention(*tensors, padded, backend=backend, **options)
    alone = [x[:real].detach().requires_grad_() for x in tensors]
    expected = shared_prefix_attention(*alone, layout, backend="dense", **options)
    torch.testing.assert_close(out[:real], expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, alone, weight)
    for grad, own in zip(torch.autograd.grad(out[:real], tensors, weight, retain_graph=True), wanted, strict=True):
        torch.testing.assert_close(grad[:real], own, rtol=1e-12, atol=1e-12)
        assert not grad[real:].any(), "a row has learned from padding"
    for grad in torch.autograd.grad(out[real:].sum(), tensors):
        assert not grad[:real].any(), "padding has seen a row"


def test_a_layout_can_be_padded_twice_and_to_its_own_length():
    tensors = [torch.tensor(row) for row in FOREST]
    layout = PrefixLayout.from_rows(tensors)
    assert layout.pad_to(layout.num_tokens) is layout
    twice = layout.pad_to(layout.num_tokens + 2).pad_to(layout.num_tokens + 5)
    once = layout.pad_to(layout.num_tokens + 5)
    assert twice.num_padding == once.num_padding == 5
    assert twice.num_tokens == once.num_tokens == layout.num_tokens + 5
    assert torch.equal(twice.labels(tensors), once.labels(tensors))
    values = torch.arange(twice.num_tokens)
    assert all(map(torch.equal, twice.unpack(values), once.unpack(values)))
    starts, ends, parents, subtree_ends = twice.segments[-2:].T.tolist()
    assert (starts, ends) == ([layout.num_tokens, layout.num_tokens + 2], [layout.num_tokens + 2, twice.num_tokens])
    assert parents == [-1, -1] and subtree_ends == ends
    assert layout.num_padding == 0 and len(layout.segments) == len(twice.segments) - 2, "the first layout was changed"


def test_a_padded_layout_keeps_its_padding_on_another_device():
    padded = PrefixLayout.from_groups([4], [[3, 2]]).pad_to(12)
    moved = padded.to("meta")
    assert moved.num_padding == padded.num_padding == 4
    assert moved.segments.device.type == "cpu" and torch.equal(moved.segments, padded.segments)
    for name in ("position_ids", "subtree_end", "source_index", "row_index"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(padded, name).shape, name
    rows = [torch.arange(7), torch.arange(6)]
    assert padded.to("cpu").labels(rows).tolist() == padded.labels(rows).tolist()


def test_more_tokens_than_positions_can_number_are_refused():
    with pytest.raises(ValueError, match=r"a packed row of 2,147,483,648 tokens is longer than 2,147,483,647"):
        PrefixLayout.from_groups([2**31 - 1], [[1, 1]])


def test_padding_to_less_than_there_is_is_refused():
    layout = PrefixLayout.from_groups([4], [[3, 2]])
    with pytest.raises(ValueError, match="num_tokens=7 is smaller than the 8 tokens of the layout"):
        layout.pad_to(7)


# ------------------------------------------------------------------------------------------------- tokens that are given


@pytest.mark.parametrize("responses", [[3], [4, 2, 1]], ids=["one row, whose segment is cut", "three rows"])
def test_a_part_of_a_group_forwards_what_follows_its_prompt(responses):
    rows = tiny.rows({6: responses})
    whole = PrefixLayout.from_rows(rows, shareable=[6] * len(rows))
    part = whole.given(5)
    assert (part.num_given, part.num_queries, part.num_tokens) == (5, whole.num_tokens - 5, whole.num_tokens)
    assert part.segments[0].tolist() == [0, 5, -1, whole.num_tokens]
    assert (part.segments[1:, 2] == 0).all()
    for name in ("pack", "labels"):
        assert torch.equal(getattr(part, name)(rows), getattr(whole, name)(rows)[5:])
    assert torch.equal(part.position_ids, whole.position_ids[5:])
    values = torch.arange(whole.num_tokens)
    for got, wanted in zip(part.unpack(values[5:]), whole.unpack(values), strict=True):
        assert torch.equal(got, wanted[5:])


def test_cutting_a_segment_changes_no_token_that_a_query_sees():
    whole = PrefixLayout.from_rows([torch.arange(9), torch.cat([torch.arange(6), torch.tensor([20, 21])])])
    for count in range(1, 5):
        assert torch.equal(visibility_mask(whole.given(count).segments), visibility_mask(whole.segments))


def test_rows_of_another_prompt_in_the_same_part_are_forwarded_whole():
    rows = tiny.rows({6: [3, 2], 4: [2, 5]})
    whole = PrefixLayout.from_rows(rows, shareable=[6, 6, 4, 4])
    part = whole.given(5)
    values = torch.arange(whole.num_tokens)
    lengths = [len(row) for row in part.unpack(values[5:])]
    assert lengths == [3, 2, 5, 8]
    assert torch.equal(torch.cat(part.unpack(values[5:])[2:]), torch.cat(whole.unpack(values)[2:]))
    assert part.to("cpu").unpack(values[5:])[0].tolist() == part.unpack(values[5:])[0].tolist()


@pytest.mark.parametrize(
    ("count", "message"), [(9, "not the beginning of one row"), (12, "from 0 to"), (-1, "num_tokens=-1")]
)
def test_what_is_not_one_prompt_cannot_be_given(count, message):
    rows = tiny.rows({6: [3, 5]})  # segments of 5, 3 and 5 tokens: 9 reaches into the second response
    whole = PrefixLayout.from_rows(rows, shareable=[6, 6])
    with pytest.raises(ValueError, match=message):
        whole.given(count if count < 12 else whole.num_tokens)
    with pytest.raises(ValueError, match="already"):
        whole.given(5).given(5)


@settings(deadline=None)
@given(small_rows, st.data())
def test_levels_that_are_long_enough_and_prompts_are_shared_and_no_others(rows, data):
    """A level is what rows have in common until some of them part. Each row still sees its own tokens, once each."""
    prompts = data.draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
    least = data.draw(st.integers(1, 5))
    tensors = [torch.tensor(row) for row in rows]
    layout = PrefixLayout.from_rows(tensors, shareable=prompts, min_level=least)

    whole = PrefixLayout.from_rows(tensors)
    kept = set()  # transitions of the whole tree's levels that stay, each by the beginning of the rows that share it
    for segment, (start, end, _, _) in enumerate(whole.segments.tolist()):
        members = [row for row, path in enumerate(whole.row_segments) if segment in path]
        is_leaf = all(whole.row_segments[row][-1] == segment for row in members)
        begin = int(whole.position_ids[start])
        if is_leaf or end - start >= least or min(prompts[row] for row in members) - 1 > begin:
            kept.add((tuple(members), begin + end - start))
    expected = set()
    for row, tokens in enumerate(rows):
        for n in range(1, len(tokens)):
            enclosing = [members for members, end in kept if row in members and end >= n]
            # Rows that are equal to their end are one branch, also where the level that they end in is not kept.
            expected.add((max(enclosing, key=len), n) if enclosing else ("alike", *tokens, n))
    assert layout.num_tokens == len(expected)
    for row, found in zip(tensors, layout.unpack(layout.pack(tensors)), strict=True):
        assert torch.equal(found, row[:-1])
    for row, found in zip(tensors, layout.unpack(layout.labels(tensors)), strict=True):
        assert torch.equal(found, row[1:])


@settings(deadline=None)
@given(small_rows, st.data())
def test_fewer_rows_share_at_least_what_they_share_in_the_tree_of_all(rows, data):
    prompts = data.draw(st.lists(st.integers(0, 8), min_size=len(rows), max_size=len(rows)))
    least = data.draw(st.integers(1, 5))
    part = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    if max(len(rows[row]) for row in part) < 2:
        return
    tensors = [torch.tensor(row) for row in rows]
    whole = PrefixLayout.from_rows(tensors, shareable=prompts, min_level=least)
    few = PrefixLayout.from_rows(
        [tensors[row] for row in part], shareable=[prompts[row] for row in part], min_level=least
    )
    segments = {segment for row in part for segment in whole.row_segments[row]}
    lengths = (whole.segments[:, 1] - whole.segments[:, 0]).tolist()
    assert few.num_tokens <= sum(lengths[segment] for segment in segments)


def test_short_levels_go_to_their_branches_and_long_ones_stay():
    prompt = [9, 9, 9, 9]
    rows = [torch.tensor(prompt + tail) for tail in ([1, 2, 2, 2, 5], [1, 2, 2, 2, 6, 7], [1, 3, 8], [4])]
    whole = PrefixLayout.from_rows(rows, shareable=[4] * 4, min_level=1)
    assert whole.num_tokens == 3 + 1 + 3 + 1 + 2 + 2 + 1
    assert whole.shared_by_level == [3 * 3, 1 * 2, 3 * 1]
    long = PrefixLayout.from_rows(rows, shareable=[4] * 4, min_level=3)
    assert long.shared_by_level == [3 * 3, (1 + 3) * 1]
    assert long.num_tokens == 3 + (1 + 3) + 1 + 2 + (1 + 2) + 1, "the level of one token is laid out with each branch"
    assert PrefixLayout.from_rows(rows, shareable=[4] * 4).num_tokens == 3 + 5 + 6 + 3 + 1


def test_levels_tell_how_many_tokens_rows_share_there():
    rows = [torch.tensor([9, 9, 9, 9, *tail]) for tail in ([1, 2, 5], [1, 2, 6, 7], [4])]
    layout = PrefixLayout.from_rows(rows)
    assert layout.row_segments == [[0, 1, 2], [0, 1, 3], [0, 4]]
    assert layout.shared_by_level == [3 * 2, 2 * 1]
    assert sum(layout.shared_by_level) == sum(len(row) - 1 for row in rows) - layout.num_tokens
    assert layout.given(3).shared_by_level == [0, 2]
    assert layout.pad_to(20).shared_by_level == [6, 2]


def test_a_shortest_level_below_one_token_is_refused():
    with pytest.raises(ValueError, match="min_level is 0: give the tokens of the shortest level, at least 1"):
        PrefixLayout.from_rows([torch.tensor([1, 2])], min_level=0)


def test_a_layout_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        layout = PrefixLayout.from_groups([4], [[2, 3]])
        layouts = [
            layout,
            layout.pad_to(12),
            layout.given(3),
            layout.to("cpu"),
            PrefixLayout.from_rows([torch.arange(3)]),
        ]
    for layout in layouts:
        tensors = [x for x in vars(layout).values() if isinstance(x, torch.Tensor)]
        assert len(tensors) >= 5 and not any(x.is_inference() for x in tensors)


def test_segments_need_whole_lengths_and_a_parent_each():
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        PrefixLayout.from_segments([1.5], [-1])
    for lengths, parents in (([], []), ([3, 2], [-1])):
        with pytest.raises(
            ValueError, match=f"lengths has {len(lengths)} entries and parents has {len(parents)}: give both"
        ):
            PrefixLayout.from_segments(lengths, parents)
