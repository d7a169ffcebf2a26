"""Layers of one forward that run again in its backward: which can, and what they leave behind."""

from __future__ import annotations

import gc

import torch

from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.recomputation import recomputable_layers, recomputed
from tests import tiny


def layers_of(model):
    return recomputable_layers(Anatomy(model))


def test_the_decoder_layers_of_a_model_in_training_mode_can_run_again():
    model = tiny.model("qwen3")
    assert layers_of(model.eval()) == []
    assert layers_of(model.train()) == list(model.model.layers)
    model.model.layers[1].eval()
    assert layers_of(model) == [], "it would keep its graph"


def test_layers_that_are_checkpointed_already_are_left_alone():
    model = tiny.model("qwen3").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert layers_of(model) == []


def test_a_model_without_such_layers_has_none(monkeypatch):
    model = tiny.model("qwen3").train()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert layers_of(model) == []


def test_the_switch_is_as_before_when_the_forward_has_ended():
    model = tiny.model("qwen3").train()
    layers = layers_of(model)
    before = [vars(layer).keys() for layer in layers]
    with recomputed(layers):
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert [vars(layer).keys() for layer in layers] == before
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def saved_bytes(model, layers):
    """Of the tensors that autograd keeps of a forward, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, model.config.vocab_size, (1, 64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), recomputed(layers):
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
    found = sum(kept.values())
    out.sum().backward()
    gc.collect()
    return found


def test_their_graph_is_not_kept():
    model = tiny.model("qwen3").train()
    assert saved_bytes(model, layers_of(model)) < 0.25 * saved_bytes(model, [])


class OwnDropout(torch.nn.Dropout):
    """Draws from a generator of its own, which `torch.utils.checkpoint` does not set back."""

    def __init__(self, p):
        super().__init__(p)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) >= self.p) / (1 - self.p)


def test_layers_whose_second_forward_would_be_another_one_keep_their_graph():
    model = tiny.model("qwen3").train()
    layer = model.model.layers[1]
    layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, OwnDropout(0.5))
    assert layers_of(model) == []
    model = tiny.model("qwen3").train()
    model.model.layers[0].forward = model.model.layers[0].forward
    assert layers_of(model) == [], "transformers checkpoints the forward of the class"
