"""TRL's fused head on a CPU: it is given the scored positions alone, and returns what it returns for all of them."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils as trl_utils

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages
from tests import tiny
from tests.integrations.trl.training import use_float64_head

pytestmark = pytest.mark.skipif(not hasattr(trl_utils, "add_fused_lm_head"), reason="TRL has no fused head")

GROUP, PROMPT, COMPLETION = 4, 9, 5


@pytest.fixture
def model(monkeypatch):
    use_float64_head(monkeypatch)
    model = tiny.model("qwen3").double().train()
    tiny.compute_norms_in_input_dtype(model)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return enable_prefix_grouper(model, self_check=False)


@pytest.fixture
def projected(monkeypatch):
    """How many hidden states the head was given, for each call of it."""
    counts = []
    head = trl_utils._ChunkedLogProbFunction.apply

    def noted(hidden, *args):
        counts.append(len(hidden))
        return head(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=noted))
    return counts


def rows():
    """Of one prompt; the last two completions are shorter."""
    ids = torch.randint(3, 20, (GROUP, PROMPT + COMPLETION), generator=torch.Generator().manual_seed(0))
    ids[:, :PROMPT] = ids[0, :PROMPT]
    mask = torch.ones_like(ids)
    mask[2:, -2:] = 0
    return Rows(ids, mask, COMPLETION, RowsOfImages({}, GROUP))


def scores_and_gradient(model, forwarded=None):
    """Log-probs, entropies, and all gradients of their sum; ``forwarded`` is called in place of ``model``."""
    accelerator = SimpleNamespace(unwrap_model=lambda m: getattr(m, "_orig_mod", m), autocast=contextlib.nullcontext)
    trainer = SimpleNamespace(
        accelerator=accelerator, temperature=1.0, min_level=None, verification=SimpleNamespace(leaks=False)
    )
    model.zero_grad()
    packed = PackedForward(trainer)
    (logps, entropies, _), _ = packed.score(
        model if forwarded is None else forwarded, rows(), entropy=True, aux_loss=False
    )
    (logps.sum() + entropies.square().sum()).backward()
    return [logps, entropies, *(parameter.grad for parameter in model.parameters())]


def of_padded_rows(model):
    """The same of rows as TRL forwards them."""
    model.zero_grad()
    given = rows()
    labels = given.input_ids.masked_fill(given.attention_mask == 0, -100)
    labels[:, :PROMPT] = -100
    output = model(input_ids=given.input_ids, attention_mask=given.attention_mask, labels=labels, fused_lm_head=True)
    logps, entropies = output.log_probs[:, -COMPLETION:], output.entropy[:, -COMPLETION:]
    (logps.sum() + entropies.square().sum()).backward()
    return [logps, entropies, *(parameter.grad for parameter in model.parameters())]


def test_it_projects_what_is_scored_and_gives_the_scores_and_gradients_of_the_rows(model, projected):
    found = scores_and_gradient(model)
    assert projected == [int(rows().attention_mask[:, PROMPT:].sum())]
    assert not model.model._forward_hooks, "the context leaves the backbone as it was"
    for ours, theirs in zip(found, of_padded_rows(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_thread_that_forwards_the_model_meanwhile_keeps_its_positions(model, projected):
    expected = scores_and_gradient(model)[:2]
    other = []

    def forward_another() -> None:
        other.append(threading.Thread(target=lambda: found.extend(scores_and_gradient(model)[:2])))
        other[0].start()
        other[0].join()

    found: list[torch.Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: None if other else forward_another())
    mine = scores_and_gradient(model)[:2]
    hook.remove()
    assert len(found) == 2 and all(map(torch.equal, found, expected)) and all(map(torch.equal, mine, expected))


def test_a_compiled_forward_which_knows_no_later_hook_projects_all_positions(model, projected):
    expected = scores_and_gradient(model)
    projected.clear()
    found = scores_and_gradient(model, torch.compile(model, backend="eager"))
    assert projected == [PROMPT - 1 + int(rows().attention_mask[:, PROMPT:].sum())]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
