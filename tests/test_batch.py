"""Which rows of a padded batch share what, and the way back to the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_grouper_plugins.batch import GroupedBatch, blocks_on_host


def padded(prompts, completions):
    """``prompt_ids, prompt_mask`` padded on the left, ``completion_ids, completion_mask`` padded on the right."""

    def block(rows, left):
        width = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long), 1
        return ids, mask

    return *block(prompts, left=True), *block(completions, left=False)


PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [8, 9], [5, 6, 7]]
COMPLETIONS = [[1, 2], [3], [1, 4, 4], [2, 2], [1]]


def row_positions(batch):
    """``{(row, column): packed position that predicts the token there}``"""
    places = zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)
    return dict(zip(places, batch.positions.tolist(), strict=True))


def visible(batch, position):
    index = torch.arange(batch.layout.num_tokens)
    return index[(index <= position) & (position < batch.layout.subtree_end)]


def test_equal_prompts_are_forwarded_once_in_whatever_order_the_rows_come():
    expected = (3 - 1) + (2 + 3 + 1) + (2 - 1) + (1 + 2)
    for order in ([0, 1, 2, 3, 4], [3, 4, 0, 2, 1], [0, 2, 4, 1, 3]):
        batch = GroupedBatch(*padded([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order]))
        assert batch.layout.num_tokens == expected, f"order {order}"
        assert batch.num_groups == 2 and batch.num_rows == 5
        assert batch.num_row_tokens == sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS))


small = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=4)),
    min_size=1,
    max_size=7,
).filter(lambda rows: any(completion for _, completion in rows))


@settings(deadline=None)
@given(small, st.booleans(), st.booleans())
def test_each_completion_token_is_predicted_by_its_own_row_and_nothing_else(rows, padded_positions, forward_last):
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    inputs = padded(prompts, completions)
    batch = GroupedBatch(*inputs, padded_positions=padded_positions, forward_last=forward_last)
    where = row_positions(batch)
    assert where.keys() == {(i, j) for i, c in enumerate(completions) for j in range(len(c))}
    for (i, j), position in where.items():
        offset = inputs[0].shape[1] - len(prompts[i]) if padded_positions else 0
        context = visible(batch, position)
        assert batch.labels[position] == completions[i][j]
        assert batch.input_ids[context].tolist() == prompts[i] + completions[i][:j]
        assert batch.position_ids[context].tolist() == list(range(offset, offset + len(prompts[i]) + j))
    assert int((batch.labels != -100).sum()) == len(where), "a token is labelled twice, or shared"


def test_responses_that_begin_alike_do_not_share_their_beginning():
    batch = GroupedBatch(*padded([[5, 6]] * 3, [[1, 2, 3], [1, 2, 3], [1, 2, 4]]))
    assert batch.layout.num_tokens == 1 + 9
    assert batch.layout.segments[:, 2].tolist() == [-1, 0, 0, 0]


def test_prompts_that_begin_alike_share_their_beginning():
    batch = GroupedBatch(*padded([[1, 2, 3, 4, 7], [1, 2, 3, 4, 8], [1, 2, 3, 4, 7], [1, 2, 3, 4, 8]], [[9]] * 4))
    assert batch.layout.num_tokens == 3 + 2 * (1 + 2)
    assert batch.num_groups == 2, "a shared system prompt does not make one group of two"


def test_scatter_brings_every_value_to_its_token_and_its_gradient_back():
    batch = GroupedBatch(*padded(PROMPTS, COMPLETIONS))
    scattered = batch.scatter(batch.labels[batch.positions])
    assert torch.equal(scattered, padded(PROMPTS, COMPLETIONS)[2])

    values = torch.zeros(len(batch.positions), dtype=torch.float64, requires_grad=True)
    weight = torch.arange(1.0, scattered.numel() + 1, dtype=torch.float64).view(scattered.shape)
    (batch.scatter(values) * weight).sum().backward()
    assert torch.equal(values.grad, weight[batch.rows, batch.columns])


def test_padded_positions_are_columns_and_rows_with_other_padding_stay_apart():
    # All begin alike, but the first one begins in column 0 and the others in column 1.
    inputs = padded([[5, 6, 7, 8], [5, 6, 7], [5, 6, 7]], [[1], [2], [3]])
    batch = GroupedBatch(*inputs, padded_positions=True)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 1, 2, 3, 3]
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 7, 7]

    shared = GroupedBatch(*inputs)
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 2, 2]
    assert shared.layout.num_tokens < batch.layout.num_tokens


def test_rows_with_different_keys_share_nothing_although_their_tokens_agree():
    inputs = padded([[5, 6, 7]] * 4, [[1]] * 4)
    assert GroupedBatch(*inputs, keys=["a", "b", "a", "b"]).layout.num_tokens == 2 * (2 + 2)
    assert GroupedBatch(*inputs, keys=["a", "b", "a", "b"]).num_groups == 2
    assert GroupedBatch(*inputs, keys=["a"] * 4).layout.num_tokens == 2 + 4


def test_empty_completions_are_left_out_with_their_prompts():
    batch = GroupedBatch(*padded([[5, 6], [7, 8, 9], [5, 6]], [[1], [], [2, 3]]))
    assert batch.num_rows == 2 and batch.num_groups == 1
    assert sorted(batch.rows.unique().tolist()) == [0, 2]
    assert not {7, 8, 9} & set(batch.input_ids.tolist())
    assert torch.equal(batch.scatter(torch.ones(3)), torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))


def test_keys_are_those_of_the_batch_also_when_rows_are_left_out():
    inputs = padded([[5, 6]] * 3, [[], [1], [2]])
    assert GroupedBatch(*inputs, keys=["a", "b", "b"]).num_groups == 1
    assert GroupedBatch(*inputs, keys=["a", "a", "b"]).num_groups == 2


def test_forward_last_forwards_every_real_token_of_every_row():
    prompts, completions = [[5, 6], [5, 6], [7, 8, 9]], [[1, 2], [3], []]
    inputs = padded(prompts, completions)
    batch = GroupedBatch(*inputs, forward_last=True)
    assert batch.num_rows == 3
    seen = [context.tolist() for context in batch.layout.unpack(batch.input_ids)]
    assert seen == [p + c for p, c in zip(prompts, completions, strict=True)]
    assert int(batch.layout.rows_per_position.sum()) == batch.num_row_tokens
    ordinary = GroupedBatch(*inputs)
    assert torch.equal(
        batch.scatter(batch.labels[batch.positions]), ordinary.scatter(ordinary.labels[ordinary.positions])
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_masks_of_any_dtype_do(dtype):
    prompt_ids, prompt_mask, completion_ids, completion_mask = padded(PROMPTS, COMPLETIONS)
    batch = GroupedBatch(prompt_ids, prompt_mask.to(dtype), completion_ids, completion_mask.to(dtype))
    assert batch.num_groups == 2


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


GOOD = (ones(2, 3), ones(2, 3), ones(2, 2), ones(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: ones(2, 4)}, r"prompt_ids has shape \(2, 3\) and prompt_mask \(2, 4\)"),
        ({0: ones(3), 1: ones(3)}, r"prompt_ids has shape \(3,\)"),
        ({3: ones(1, 2)}, r"completion_ids has shape \(2, 2\) and completion_mask \(1, 2\)"),
        ({1: torch.tensor([[1, 1, 1], [1, 1, 0]])}, "prompt_mask of row 1 has padding other than on the left"),
        ({1: torch.tensor([[1, 0, 1], [1, 1, 1]])}, "prompt_mask of row 0 has padding other than on the left"),
        ({3: torch.tensor([[1, 1], [0, 1]])}, "completion_mask of row 1 has padding other than on the right"),
        ({1: torch.tensor([[1, 1, 1], [0, 0, 0]])}, "the prompt of row 1 is empty"),
        ({3: torch.zeros(2, 2)}, "every completion is empty"),
    ],
)
def test_batches_that_are_not_padded_so_are_named(change, message):
    arguments = [change.get(i, good) for i, good in enumerate(GOOD)]
    with pytest.raises(ValueError, match=message):
        GroupedBatch(*arguments)


def test_blocks_with_another_number_of_rows_are_refused():
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"completion_ids has {count} rows and prompt_ids 2"):
            GroupedBatch(ones(2, 3), ones(2, 3), ones(count, 2), ones(count, 2))
        with pytest.raises(ValueError, match=f"keys has {count} rows and prompt_ids 2"):
            GroupedBatch(*GOOD, keys=["a"] * count)


def test_a_batch_on_a_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each read waits until all that was asked of it is done: ids and masks come together."""
    reads: list[int] = []

    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            if name == "__get__" and func.__self__ is torch.Tensor.device:
                return torch.device("meta")
            result = super().__torch_function__(func, types, args, kwargs or {})
            if name in ("cpu", "item", "tolist", "__bool__"):
                reads.append(args[0].numel())
                return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
            return result

    blocks = (
        torch.tensor([[0, 5, 6]] * 2),
        torch.tensor([[0, 1, 1]] * 2),
        torch.tensor([[7, 8], [9, 0]]),
        torch.tensor([[1, 1], [1, 0]]),
    )
    there = blocks_on_host(*(block.as_subclass(Elsewhere) for block in blocks))
    assert reads == [20]
    for found, expected, kind in zip(there, blocks, (torch.long, torch.bool) * 2, strict=True):
        assert type(found) is torch.Tensor and torch.equal(found, expected.to(kind))
