"""The option ``prefix_grouper_verify``: a real micro-batch on both paths, which changes nothing and notices errors."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer, reuse
from prefix_grouper_plugins.integrations.trl.forward import PackedForward
from prefix_grouper_plugins.modeling import prompt_cache
from prefix_grouper_plugins.modeling.self_check.tolerances import TOLERANCES
from tests import tiny
from tests.integrations.trl.training import largest_difference, make_trainer, train, trained_weights
from tests.logs import messages

GROUPED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_steps": 1,
    "dtype": torch.float32,
}
ONE_ROW: dict[str, Any] = {**GROUPED, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("qwen"), "qwen3")


@pytest.fixture
def said():
    """What is logged, as it comes."""
    with messages() as found:
        yield found


@pytest.fixture(scope="module")
def stock_weights(qwen):
    """Those of a stock training without a reference."""
    return train(qwen, shared=False, beta=0.0, **GROUPED)[0]


def verified(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("prefix grouper: verified ")]


def test_verifying_changes_no_weight_no_metric_and_no_random_number(qwen, said):
    """With dropout, an entropy controller and old log-probs, and in the middle of a training."""
    settings = {**GROUPED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    settings |= {"beta": 0.1, "num_iterations": 2}
    logs, weights = [], []
    for when in ("off", "2"):
        trainer = make_trainer(qwen, shared=True, lora=True, prefix_grouper_verify=when, **settings)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        for module in trainer.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(0.2)})
        torch.manual_seed(5)
        trainer.train()
        weights.append(trained_weights(trainer))
        logs.append(
            [{n: v for n, v in e.items() if "time" not in n and "second" not in n} for e in trainer.state.log_history]
        )
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert logs[0] == logs[1]
    assert [re.search(r"optimizer step (\d+)", line)[1] for line in verified(said)] == ["0", "2"]


def test_the_line_names_what_differs_and_what_a_leak_of_one_key_would_have_been(qwen, said):
    train(qwen, shared=True, prefix_grouper_verify="first", **{**GROUPED, "max_steps": 2})
    (line,) = verified(said)
    found = re.fullmatch(
        r"prefix grouper: verified the first micro-batch of optimizer step 0 in \S+ s: shared and ordinary log-probs differ by "
        r"(\S+), the loss by (\S+), gradients by (\S+); a leak of one key would have shown as (\S+) in log-probs and (\S+) in "
        r"gradients",
        line,
    )
    log_probs, loss, gradients, leaked, gradients_of_leak = map(float, found.groups())
    limits = TOLERANCES[torch.float32]
    assert max(log_probs, loss) < limits.outputs and gradients < limits.update
    assert leaked > 10 * limits.outputs and gradients_of_leak > 10 * limits.update, "the leak is larger than rounding"


def test_micro_batches_of_one_row_verify_the_reused_prompt(qwen, said, monkeypatch):
    train(qwen, shared=True, prefix_grouper_verify="first", **ONE_ROW)
    assert "no key could be leaked" in verified(said)[0]
    stock = prompt_cache._Given.add
    monkeypatch.setattr(prompt_cache._Given, "add", lambda self, gradient: stock(self, gradient * 1.1))
    with pytest.raises(UnsupportedModelError, match=r"gradients of parameter .* \(prompts reused\)"):
        train(qwen, shared=True, prefix_grouper_verify="first", **ONE_ROW)


# Both micro-batches, a whole group, go into the forward of the first.
AHEAD: dict[str, Any] = {
    **ONE_ROW,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_dataset": tiny.prompts(8, shortest=40, longest=40),
}


def test_rows_of_several_micro_batches_in_one_forward_are_verified(qwen, said, monkeypatch):
    monkeypatch.setattr(reuse, "HAS_FUSED_HEAD", True)  # where TRL keeps logits, few rows go ahead
    train(qwen, shared=True, prefix_grouper_verify="first", **AHEAD)
    assert "shared (packed, prompts reused, rows ahead) and ordinary log-probs differ by" in verified(said)[0]
    stock = PackedForward.score

    def wrong(self, model, rows, **options):
        (logps, *rest), counts = stock(self, model, rows, **options)
        return (logps * 1.01 if len(rows) > 2 else logps, *rest), counts

    monkeypatch.setattr(PackedForward, "score", wrong)
    with pytest.raises(UnsupportedModelError, match=r"outputs \(log-probs\) .* \(rows ahead\); the outputs of all 3"):
        train(qwen, shared=True, prefix_grouper_verify="first", **AHEAD)


WRONG = {
    "outputs (log-probs)": lambda x: x * 1.01,
    "gradients of parameter": lambda x: x + 0.1 * (x - x.detach()),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_shared_path_that_differs_stops_the_training_or_takes_the_stock_path(qwen, stock_weights, monkeypatch, what):
    stock = PackedForward.score

    def wrong(self, *args, **kwargs):
        (logps, *rest), counts = stock(self, *args, **kwargs)
        return (WRONG[what](logps), *rest), counts

    monkeypatch.setattr(PackedForward, "score", wrong)
    settings = {**GROUPED, "prefix_grouper_verify": "first", "beta": 0.1}
    with pytest.raises(UnsupportedModelError, match=r"optimizer step 0, run on both paths, differs: .*") as stopped:
        train(qwen, shared=True, **settings)
    assert what in str(stopped.value) and "prefix_grouper_on_unsupported='fallback'" in str(stopped.value)
    weights, trainer = train(qwen, shared=True, prefix_grouper_on_unsupported="fallback", **{**settings, "beta": 0.0})
    assert largest_difference(weights, stock_weights) == 0.0 and what in trainer.gate.reason


def test_where_memory_does_not_suffice_training_goes_on_and_says_so(qwen, said, monkeypatch):
    expected, _ = train(qwen, shared=True, **GROUPED)

    @functools.wraps(GRPOTrainer._get_per_token_logps_and_entropies)
    def out_of_memory(self, *args, **kwargs):
        raise torch.OutOfMemoryError

    trainer = make_trainer(qwen, shared=True, prefix_grouper_verify="first", **GROUPED)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", out_of_memory)
    torch.manual_seed(5)
    trainer.train()
    assert all(torch.equal(p, expected[name]) for name, p in trainer.model.named_parameters())
    assert trainer.gate.reason is None
    (line,) = [line for line in said if "could not be compared" in line]
    assert "not enough memory" in line


def test_a_first_micro_batch_that_shows_nothing_is_followed_by_the_next(qwen, said, monkeypatch):
    monkeypatch.setattr("tests.integrations.trl.training.reward", lambda completions, **_: [1.0] * len(completions))
    make_trainer(qwen, shared=True, prefix_grouper_verify="first", **{**GROUPED, "max_steps": 2}).train()
    assert len(verified(said)) == 2 and all("(all are zero, as every advantage is)" in line for line in verified(said))


def test_a_trainer_with_a_loss_of_its_own_is_verified_by_that(qwen, said):
    class Own(PrefixGrouperGRPOTrainer):
        calls = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(model, inputs, *args, **kwargs) * 2

    _, trainer = train(qwen, shared=True, trainer_class=Own, prefix_grouper_verify="first", **GROUPED)
    assert len(verified(said)) == 1 and trainer.calls == 1, "calls for the comparison do not count"


def test_a_value_that_is_neither_a_word_nor_a_number_is_an_error(qwen):
    with pytest.raises(
        ValueError, match=r"prefix_grouper_verify is 'sometimes': choose off, first or a positive whole"
    ):
        make_trainer(qwen, shared=True, prefix_grouper_verify="sometimes", **GROUPED)
