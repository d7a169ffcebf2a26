"""Padded rows as one packed row: every real token once for what rows begin alike with, and back."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins.padded_rows import PaddedRows

# A system prompt 1 2 3, two prompts behind it, two completions each; and a row of its own, and one without a token.
ROWS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 8], [1, 2, 3, 9], [1, 2, 3, 9, 9], [5, 5], []]
TRIE = {tuple(row[: end + 1]) for row in ROWS for end in range(len(row))}


def batch(left: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``left`` columns of padding in front, and what is needed behind."""
    ids, mask = torch.full((len(ROWS), left + 8), 99), torch.zeros(len(ROWS), left + 8, dtype=torch.bool)
    for i, row in enumerate(ROWS):
        ids[i, left : left + len(row)], mask[i, left : left + len(row)] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


@pytest.mark.parametrize("left", [0, 3])
def test_the_packed_row_is_the_trie_of_the_rows(left):
    ids, mask = batch(left)
    rows = PaddedRows(ids, mask, padded_positions=True)
    assert rows.layout.num_tokens == len(TRIE) < rows.num_row_tokens == int(mask.sum())
    assert rows.has_something_in_common
    assert (rows.num_roots, rows.lengths) == (2, [len(row) for row in ROWS])
    assert torch.equal(rows.unpack(rows.input_ids), ids * mask)
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(rows.unpack(rows.position_ids), columns * mask)


def test_a_packed_token_sees_what_stands_in_front_of_it_in_its_rows():
    ids, mask = batch()
    rows = PaddedRows(ids, mask)
    places = rows.unpack(torch.arange(rows.layout.num_tokens) + 1) - 1  # -1 at padding
    for i, row in enumerate(ROWS):
        for end in range(len(row)):
            query, before = int(places[i, end]), set(places[i, : end + 1].tolist())
            seen = {key for key in range(query + 1) if query < rows.layout.subtree_end[key]}
            assert seen == before


def test_gradients_of_a_shared_token_add_up():
    ids, mask = batch()
    rows = PaddedRows(ids, mask)
    values = torch.zeros(rows.layout.num_tokens, requires_grad=True)
    rows.unpack(values).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, rows.layout.rows_per_position.float())


def test_rows_whose_tokens_have_other_positions_share_nothing():
    ids, mask = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    assert PaddedRows(ids, mask, padded_positions=False).layout.num_tokens == 3
    assert not PaddedRows(ids, mask, padded_positions=True).has_something_in_common
    from_zero = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 0]])
    assert PaddedRows(ids, mask, from_zero, padded_positions=True).layout.num_tokens == 3


def test_without_a_mask_every_token_is_real():
    rows = PaddedRows(torch.tensor([[1, 2, 0, 0], [1, 2, 0, 1]]))
    assert (rows.num_row_tokens, rows.layout.num_tokens) == (8, 5)


@pytest.mark.parametrize(
    ("mask", "positions", "reason"),
    [
        ([[1, 0, 1]], None, "attention_mask hides tokens in the middle of a row"),
        ([[0, 0, 0]], None, "attention_mask hides every token"),
        ([[1, 1]], None, r"attention_mask \(1, 2\): not \[rows, tokens\]"),
        ([[1, 1, 1]], [[0, 1, 0]], "position_ids do not count through a row"),
    ],
)
def test_what_is_not_made_of_rows_is_refused(mask, positions, reason):
    positions = None if positions is None else torch.tensor(positions)
    with pytest.raises(ValueError, match=reason):
        PaddedRows(torch.tensor([[1, 2, 3]]), torch.tensor(mask), positions)


def test_values_of_another_packed_row_are_refused():
    with pytest.raises(ValueError, match="values has 5 positions, the packed row has 3"):
        PaddedRows(torch.tensor([[1, 2, 3]])).unpack(torch.zeros(5))
