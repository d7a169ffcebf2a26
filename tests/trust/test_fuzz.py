"""Random inputs come out equal or as a clear error, and a trial notices a wrong answer."""

from __future__ import annotations

import pytest
import torch

from tests.trust import fuzz


@pytest.mark.parametrize(("trial", "cases"), [("batches", 250), ("forests", 100), ("plans", 500), ("arguments", 500)])
def test_random_inputs_are_equal_or_a_clear_error(trial, cases):
    counts, wrong = fuzz.run(trial, range(cases))
    assert not wrong, "\n".join(wrong)
    assert counts[fuzz.EQUAL] > cases // 2


def test_a_wrong_log_prob_is_found(monkeypatch):
    right = fuzz.prefix_grouped_logps

    def wrong(*args, **kwargs):
        logps, entropy = right(*args, **kwargs)
        return logps + 1e-4 * (args[-1] != 0), entropy

    monkeypatch.setattr(fuzz, "prefix_grouped_logps", wrong)
    _, found = fuzz.run("batches", range(20))
    assert any("log-probs are off" in line for line in found)


def test_a_wrong_gradient_is_found(monkeypatch):
    right = fuzz.prefix_grouped_logps

    def wrong(*args, **kwargs):
        logps, entropy = right(*args, **kwargs)
        return logps.detach() + 1.01 * (logps - logps.detach()), entropy

    monkeypatch.setattr(fuzz, "prefix_grouped_logps", wrong)
    _, found = fuzz.run("batches", range(20))
    assert any("gradients are off" in line for line in found)


def test_a_backend_that_hides_a_key_is_found(monkeypatch):
    right = fuzz.shared_prefix_attention

    def wrong(query, key, value, layout, *, backend, **options):
        if backend == "blockwise":
            value = torch.cat([torch.zeros_like(value[:1]), value[1:]])
        return right(query, key, value, layout, backend=backend, **options)

    monkeypatch.setattr(fuzz, "shared_prefix_attention", wrong)
    _, found = fuzz.run("forests", range(5))
    assert any("blockwise: output" in line for line in found)


def test_a_lost_row_is_found(monkeypatch):
    right = fuzz.plan_micro_batches
    monkeypatch.setattr(fuzz, "plan_micro_batches", lambda *args, **kwargs: right(*args, **kwargs)[1:])
    monkeypatch.setattr(fuzz, "spread_micro_batches", lambda plan, sizes, count: plan)
    _, found = fuzz.run("plans", range(20))
    assert any("lost or doubled" in line for line in found)
