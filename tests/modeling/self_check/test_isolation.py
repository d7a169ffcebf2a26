"""Running a model without leaving a trace."""

from __future__ import annotations

import torch

from prefix_grouper_plugins.modeling.self_check.isolation import untouched
from tests import tiny


def test_hidden_states_that_a_model_records_are_recorded_once_afterwards_too():
    """transformers puts the hooks that record them on at the first forward, and notes that in an attribute."""
    model, ids = tiny.model("qwen3"), torch.arange(3, 8)[None]
    expected = tiny.model("qwen3")(input_ids=ids, output_hidden_states=True).hidden_states
    with untouched(model, ids.device):
        model(input_ids=ids, output_hidden_states=True)
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
