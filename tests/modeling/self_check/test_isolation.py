"""Running a model without leaving a trace."""

from __future__ import annotations

import torch
from torch import nn

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


def test_hooks_and_the_notes_about_them_go_together():
    """A note alone that hooks are there would switch off what they do; hooks without it would be put on twice."""
    layer = nn.Linear(2, 2)
    noted, handled = layer.register_forward_hook(lambda *_: None), nn.Linear(2, 2)
    before = {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)}
    model = nn.Sequential(layer, handled)
    with untouched(model, torch.device("cpu")):
        layer.register_forward_pre_hook(lambda *_: None)
        layer.register_full_backward_hook(lambda *_: None)
        layer.is_hooked = True
        handled.handle = handled.register_forward_hook(lambda *_: None)
    assert {name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)} == before
    assert noted.id in layer._forward_hooks and not hasattr(layer, "is_hooked")
    assert not handled._forward_hooks and not hasattr(handled, "handle")
