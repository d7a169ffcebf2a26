"""Copies of keys that forward and backward both need: made once and saved, except where somebody sees what is saved."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prefix_grouper_plugins.attention import api, shared_prefix_attention
from prefix_grouper_plugins.attention.backends import merged_lse
from prefix_grouper_plugins.attention.backends.merged_lse import cuda
from prefix_grouper_plugins.attention.backends.merged_lse.gathered import Copies
from prefix_grouper_plugins.forest import forest_of
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import (
    Features,
    assert_all_close,
    emulated_flash_backward,
    emulated_flash_forward,
    inputs,
    layouts,
    output_and_gradients,
)

GROUPS = PrefixLayout.from_groups([5, 4], [[30, 25, 28], [31, 19]])
LAYOUTS = {
    "groups": GROUPS,
    "a given prompt": PrefixLayout.from_groups([5], [[30, 25, 28]]).given(4),
    "given keys that no query sees": PrefixLayout.from_rows(  # copies are as many as keys
        [torch.tensor([*range(6), *range(first, first + more)]) for first, more in ((100, 5), (200, 30), (300, 30))],
        [0, 0, 0],
    ).given(10),
    "merged in the backward": PrefixLayout.from_groups([23], [[30] * 8]),
}
DONE = {"merged in the backward": ["of"], "given keys that no query sees": ["of", "of", "sum", "sum"]}
FEATURES = {
    "heads alike": Features(heads=4, kv_heads=2),
    "head dims that differ, sinks": Features(heads=4, kv_heads=2, head_dim=8, value_dim=6, sinks=True),
}


@pytest.fixture(autouse=True)
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the path of CUDA here; the list holds what is done to keys and values."""
    done: list[str] = []

    def counted(name: str) -> None:
        function = getattr(Copies, name)
        monkeypatch.setattr(Copies, name, lambda self, *x: done.append(name) or function(self, *x))

    monkeypatch.setattr(api, "_is_one_causal_call", lambda *arguments: False)
    monkeypatch.setattr(merged_lse, "cpu", cuda)
    monkeypatch.setattr(cuda, "flash_ops", lambda: (emulated_flash_forward, emulated_flash_backward))
    for name in ("of", "undo", "sum"):
        counted(name)
    return done


def attend(layout: PrefixLayout, features: Features, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
    return shared_prefix_attention(q, k, v, layout, sinks=sinks[0] if sinks else None, **features.options())


def tensors_of(layout: PrefixLayout, features: Features) -> list[Tensor]:
    q, *rest = inputs(layout, features)
    return [q.detach()[layout.num_given :].requires_grad_(), *rest]


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_copies_are_made_once_and_give_the_dense_gradients(name: str, features: Features, copied: list[str]) -> None:
    layout = LAYOUTS[name]
    tensors = tensors_of(layout, features)
    actual = output_and_gradients(lambda *x: attend(layout, features, *x), tensors)
    assert copied == DONE.get(name, ["of", "sum", "sum"])
    dense = output_and_gradients(
        lambda q, k, v, *sinks: shared_prefix_attention(
            q, k, v, layout, sinks=sinks[0] if sinks else None, **features.options(), backend="dense"
        ),
        tensors,
    )
    assert_all_close(actual, dense)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(), data=st.data())
def test_any_forest_gives_the_dense_gradients(layout: PrefixLayout, data: st.DataObject) -> None:
    layout = copy.copy(layout)
    layout.num_given = data.draw(st.sampled_from([0, *layout.segments[:-1, 1].tolist()]))
    tensors = [x.detach().requires_grad_() for x in inputs(layout, Features(heads=4, kv_heads=2))]
    tensors[0] = tensors[0].detach()[layout.num_given :].requires_grad_()
    actual = output_and_gradients(lambda *x: shared_prefix_attention(*x[:3], layout), tensors)
    assert_all_close(
        actual, output_and_gradients(lambda *x: shared_prefix_attention(*x[:3], layout, backend="dense"), tensors)
    )


def test_hooks_that_see_what_is_saved_get_the_keys_as_they_are(copied: list[str]) -> None:
    """A checkpoint compares both passes, of which one may take the operator; offloading should not move copies."""
    features = FEATURES["heads alike"]
    tensors = tensors_of(GROUPS, features)
    expected = output_and_gradients(lambda *x: attend(GROUPS, features, *x), tensors)
    shapes: list[torch.Size] = []
    copied.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        actual = output_and_gradients(lambda *x: attend(GROUPS, features, *x), tensors)
    assert copied == ["of", "of", "sum", "sum"]
    assert tensors[1].shape in shapes and (len(forest_copies()), *tensors[1].shape[1:]) not in shapes
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def forest_copies() -> Tensor:
    copies = cuda.copies_for_both(torch.empty(1, 4, 8), torch.empty(1, 2, 8), forest_of(GROUPS.segments))
    assert copies is not None
    return copies.key_of


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("counted", ["forward", "backward", "neither"])
def test_a_checkpoint_of_which_one_pass_is_traced_gives_the_same(counted: str, reentrant: bool) -> None:
    features = FEATURES["heads alike"]
    tensors = tensors_of(GROUPS, features)
    expected = torch.autograd.grad(attend(GROUPS, features, *tensors).square().sum(), tensors)
    modes = {counted: FlopCounterMode(display=False)}
    with modes.get("forward", contextlib.nullcontext()):
        out = checkpoint(attend, GROUPS, features, *tensors, use_reentrant=reentrant)
    with modes.get("backward", contextlib.nullcontext()):
        out.square().sum().backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("name", ["groups", "a given prompt"])
def test_a_backward_that_is_traced_gets_the_keys_back(name: str, copied: list[str]) -> None:
    layout, features = LAYOUTS[name], FEATURES["heads alike"]
    tensors = tensors_of(layout, features)
    expected = torch.autograd.grad(attend(layout, features, *tensors).square().sum(), tensors)
    out = attend(layout, features, *tensors).square().sum()
    with FlopCounterMode(display=False) as counter:
        actual = torch.autograd.grad(out, tensors)
    assert counter.get_total_flops() > 0 and copied.count("undo") == 2
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("which", [[0], [1], [0, 1, 2]], ids=["query", "key", "all"])
def test_a_second_derivative_is_refused(which: list[int]) -> None:
    features = FEATURES["heads alike"]
    tensors = [x.detach().requires_grad_(i in which) for i, x in enumerate(tensors_of(GROUPS, features))]
    leaves = [tensors[i] for i in which]
    out = attend(GROUPS, features, *tensors).square().sum()
    grads = torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(ValueError, match="has a first derivative only"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)
