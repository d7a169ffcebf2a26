"""A micro-batch on several paths: what is compared, what is left behind, and the error that is made on purpose."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.self_check.isolation import without_dropout
from prefix_grouper_plugins.modeling.self_check.leak import leak_one_key
from prefix_grouper_plugins.modeling.self_check.micro_batch import Scored, compare_micro_batch
from prefix_grouper_plugins.modeling.self_check.tolerances import TOLERANCES
from tests import tiny

CPU = torch.device("cpu")
ROWS = tiny.rows({9: [4, 7, 2], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)


def loss_of(log_probs: list[Tensor]) -> Scored:
    rows = nn.utils.rnn.pad_sequence(log_probs, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in log_probs], batch_first=True)
    signs = torch.tensor([[1.0], [-1.0], [2.0], [1.0], [-3.0]])
    return Scored([rows], [mask], (rows * mask * signs).mean())


def scored(logits: list[Tensor]) -> Scored:
    return loss_of([own.log_softmax(-1).gather(-1, row[1:, None])[:, 0] for own, row in zip(logits, ROWS, strict=True)])


def ordinary(model) -> Scored:
    return scored([model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS])


def packed(model, layout: PrefixLayout = LAYOUT) -> Scored:
    return scored(LAYOUT.unpack(model(**packed_inputs(layout, LAYOUT.pack(ROWS))).logits[0]))


def visible(layout: PrefixLayout) -> Tensor:
    """``[T, T]``: which query sees which key."""
    place = torch.arange(layout.num_tokens)
    return (place <= place[:, None]) & (place[:, None] < layout.subtree_end)


LAYOUTS = {
    "groups": LAYOUT,
    "padded": LAYOUT.pad_to(LAYOUT.num_tokens + 5),
    "prompts without groups": PrefixLayout.from_rows(tiny.rows({9: [4], 3: [6]})),
    "branches of one token": PrefixLayout.from_rows(tiny.rows({9: [1, 1, 4]})),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_key_is_seen_by_the_next_branch_and_nothing_else_changes(name):
    layout = LAYOUTS[name]
    leaking = leak_one_key(layout)
    more = (visible(leaking) != visible(layout)).nonzero()
    assert len(more) and more[:, 1].unique().numel() == 1, "one key"
    own = set(range(layout.num_tokens - layout.num_padding))
    assert set(more[:, 0].tolist()) <= own, "padding would not show it"
    for start, end, _, subtree_end in leaking.segments.tolist():
        assert (leaking.subtree_end[start:end] == subtree_end).all(), "segments and tokens tell the same tree"
    assert torch.equal(leaking.position_ids, layout.position_ids)


def test_a_row_alone_has_no_branch_to_leak_to():
    assert leak_one_key(PrefixLayout.from_rows(tiny.rows({9: [4]}))) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_leak_of_one_key_is_larger_than_what_rounding_explains_and_is_not_judged(dtype):
    model = enable_prefix_grouper(tiny.model().to(dtype))
    leaking = leak_one_key(LAYOUT)
    result = compare_micro_batch(model, ordinary, {"packed": packed}, CPU, leaking=lambda inner: packed(inner, leaking))
    limits = TOLERANCES[dtype]
    assert result.passed and result.has_gradients
    assert result.apart.log_probs < limits.outputs and result.apart.gradients < limits.update
    assert result.leak.log_probs > limits.outputs or result.leak.gradients > limits.update
    judged = compare_micro_batch(model, ordinary, {"packed": lambda inner: packed(inner, leaking)}, CPU)
    assert not judged.passed and "rounding in" in judged.reason


def test_no_graph_of_a_path_lives_while_another_one_runs():
    model = enable_prefix_grouper(tiny.model())
    graphs: list[weakref.ref] = []

    class Hook:  # lives as long as the graph that it belongs to
        def __call__(self, *gradients) -> None:
            pass

    def watched(path):
        def run(inner) -> Scored:
            gc.collect()
            assert not any(graph() is not None for graph in graphs), "the graph of the path before"
            found = path(inner)
            hook = Hook()
            found.log_probs[0].grad_fn.register_hook(hook)
            graphs.append(weakref.ref(hook))
            return found

        return run

    assert compare_micro_batch(model, watched(ordinary), {"packed": watched(packed)}, CPU).passed
    assert len(graphs) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_random_states_and_modes_are_left_as_they_were(checkpointing):
    model = enable_prefix_grouper(tiny.model()).train()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    result = compare_micro_batch(model, ordinary, {"packed": packed}, CPU)
    assert result.passed, result
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def test_dropout_is_off_in_layers_that_a_backward_runs_again():
    x, dropout = torch.ones(50, requires_grad=True), nn.Dropout(0.5)
    with without_dropout():
        y = torch.utils.checkpoint.checkpoint(lambda x: dropout(x) * x, x, use_reentrant=False)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))
    assert not torch.equal(dropout(x), x), "it is back"


def test_weights_that_autocast_has_cast_without_gradients_are_cast_again():
    model = enable_prefix_grouper(tiny.model().float())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert compare_micro_batch(model, ordinary, {"packed": packed}, CPU).passed
        ordinary(model).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_where_memory_does_not_suffice_nothing_is_claimed():
    def out_of_memory(inner) -> Scored:
        raise torch.OutOfMemoryError

    model = enable_prefix_grouper(tiny.model())
    for paths in ((out_of_memory, packed), (ordinary, out_of_memory)):
        result = compare_micro_batch(model, paths[0], {"packed": paths[1]}, CPU)
        assert not result.passed and result.reason is None and "not enough memory" in result.not_covered
