"""A model class that no test has compared: its first micro-batch runs both ways before the first optimizer step."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperGRPOTrainer
from tests import tiny
from tests.integrations.trl.training import reward

NO_ROW_OF_A_SELF_CHECK = 5000  # tokens in all


class Limited(LlamaModel):
    """From so many tokens on, a forward adds what comes before each token."""

    limit = NO_ROW_OF_A_SELF_CHECK
    forwards = 0

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        Limited.forwards += 1
        output = super().forward(input_ids=input_ids, **kwargs)
        if output[0].shape[0] == 1 and output[0].shape[1] < self.limit:
            output.last_hidden_state = output[0] + torch.roll(output[0], 1, 1)
        return output


class OwnLlama(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Limited(config)


def trainer_of(model: Any, **settings: Any) -> PrefixGrouperGRPOTrainer:
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "max_steps": 1}
    args = PrefixGrouperGRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        **{**sizes, **settings},
    )
    return PrefixGrouperGRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=tiny.prompts(), processing_class=tiny.tokenizer()
    )


def own_llama(tmp_path: Any) -> OwnLlama:
    tiny.model("llama").save_pretrained(tmp_path)
    Limited.limit = 0  # right, until the self-check has passed
    return OwnLlama.from_pretrained(tmp_path, dtype=torch.float32)


def test_a_right_class_trains_and_the_comparison_is_logged_with_its_cost(tmp_path, caplog):
    trainer = trainer_of(own_llama(tmp_path))
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        trainer.train()
    said = [message for message in caplog.messages if "the first batch of OwnLlama" in message]
    assert len(said) == 1 and "in log-probs" in said[0] and " s)" in said[0]
    assert trainer.sharing.total.forwards > 0 and not trainer.sharing.fallbacks


@pytest.mark.parametrize("action", ["error", "fallback"])
def test_what_the_self_check_could_not_see_is_stopped_before_the_first_step(tmp_path, action):
    trainer = trainer_of(own_llama(tmp_path), prefix_grouper_on_unsupported=action)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    Limited.limit = NO_ROW_OF_A_SELF_CHECK
    if action == "error":
        with pytest.raises(UnsupportedModelError, match="on the first batch outputs"):
            trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    else:
        trainer.train()
        assert "on the first batch" in trainer.gate.reason


def test_log_probs_of_the_old_policy_are_compared_before_the_update_uses_them(tmp_path):
    trainer = trainer_of(own_llama(tmp_path), prefix_grouper_on_unsupported="fallback", num_iterations=2)
    Limited.limit = NO_ROW_OF_A_SELF_CHECK
    trainer.train()
    assert "on the first batch outputs (log-probs)" in trainer.gate.reason
    old = trainer.sharing.passes["old_log_prob"]
    assert old.packed == 0 and old.fallbacks == 1, "they were shared before anything had been compared"


class FirstToken(LlamaModel):
    """From the last layer's output on, every token gets what the first one of its forward has."""

    on = False

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        if self.on:
            output.last_hidden_state = output[0] + output[0][:, :1]
        return output


class FirstTokenLlama(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = FirstToken(config)


def test_micro_batches_of_one_row_compare_a_prompt_that_is_reused(monkeypatch, tmp_path):
    """Packed alone, a row is itself; its completion behind a prompt that another forward has run is not."""
    tiny.model("llama").save_pretrained(tmp_path)
    trainer = trainer_of(
        FirstTokenLlama.from_pretrained(tmp_path, dtype=torch.float32),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    monkeypatch.setattr(FirstToken, "on", True)
    with pytest.raises(UnsupportedModelError, match=r"on the first batch outputs \(log-probs\) .* \(prompts reused\)"):
        trainer.train()


def test_verified_classes_and_switched_off_checks_are_not_compared(tmp_path):
    path = tiny.saved_model(tmp_path, "llama")
    trainer = trainer_of(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32))
    assert not trainer.gate.needs_first_batch(trainer.model)
