"""Scores of several micro-batches from one forward: each has its own backward, and the forward gets all gradients."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins.modeling.scores_ahead import ScoresAhead

SIZES = (2, 1, 3)


def scores():
    weights = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return weights, weights.sin() * 2


def loss_of(logps):
    return (logps**3).mean()


def test_backwards_of_micro_batches_add_up_to_one_through_the_forward():
    weights, logps = scores()
    sum(loss_of(part) for part in logps.split(SIZES)).backward()
    expected = weights.grad

    weights, logps = scores()
    ahead = ScoresAhead(logps, logps.exp(), SIZES)
    for number, part in enumerate(logps.detach().split(SIZES)):
        assert ahead.num_left == len(SIZES) - number and not ahead.is_closed
        found, entropies = ahead.take()
        assert torch.equal(found, part) and torch.equal(entropies, part.exp()) and not entropies.requires_grad
        assert weights.grad is None  # nothing goes through the forward before the last one
        loss_of(found).backward()
    assert ahead.is_closed
    torch.testing.assert_close(weights.grad, expected, rtol=1e-14, atol=0)


def test_where_a_step_ends_early_the_others_get_no_gradient():
    weights, logps = scores()
    ahead = ScoresAhead(logps, None, SIZES)
    loss_of(ahead.take()[0]).backward()
    last, entropies = ahead.take(last=True)
    assert entropies is None and ahead.num_left == 0
    loss_of(last).backward()
    assert ahead.is_closed
    assert (weights.grad[:3] != 0).all() and (weights.grad[3:] == 0).all()


def test_a_micro_batch_whose_log_probs_do_not_reach_its_loss_adds_nothing():
    weights, logps = scores()
    ahead = ScoresAhead(logps, None, SIZES)
    ahead.take(), ahead.take()
    loss_of(ahead.take()[0]).backward()
    assert (weights.grad[:3] == 0).all() and (weights.grad[3:] != 0).all()


def test_without_gradients_there_is_nothing_to_hand_on():
    ahead = ScoresAhead(torch.ones(6, 4), None, SIZES)
    assert ahead.is_closed
    assert [len(ahead.take()[0]) for _ in SIZES] == list(SIZES)


def test_a_second_backward_of_the_last_micro_batch_is_an_error():
    """It would add the gradients of the others once more."""
    _, logps = scores()
    ahead = ScoresAhead(logps, None, SIZES)
    for _ in SIZES[1:]:
        loss_of(ahead.take()[0]).backward()
    loss = loss_of(ahead.take()[0])
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run one backward for each micro-batch"):
        (loss / 2).backward()
