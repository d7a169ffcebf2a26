"""The inputs of a packed forward: positions as the model counts them."""

from __future__ import annotations

import torch

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.modeling import row_positions
from tests.modeling import families


def test_positions_count_from_behind_the_padding_token_as_roberta_does_it():
    rows = [torch.tensor(row) for row in ([5, 0, 6, 7], [5, 0, 6, 8, 0, 9], [4, 4])]  # 0 is its padding token
    layout = PrefixLayout.from_rows(rows)
    model = families.build("roberta")
    seen = []
    embedding = model.roberta.embeddings.position_embeddings
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row in rows:
        model(input_ids=row[None])
    positions = row_positions(model, layout, layout.pack(rows))
    for got, own in zip(layout.unpack(positions), seen, strict=True):
        assert got.tolist() == own[:-1].tolist()
    assert torch.equal(row_positions(families.build("bert"), layout, layout.pack(rows)), layout.position_ids)
