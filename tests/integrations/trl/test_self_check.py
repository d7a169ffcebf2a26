"""The trainer checks its model before it shares anything: what fails is refused, or trains on the stock path."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prefix_grouper_plugins import UnsupportedModelError, enable_prefix_grouper, prefix_grouped_logps
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperGRPOTrainer
from prefix_grouper_plugins.integrations.trl import trainer as ours
from prefix_grouper_plugins.modeling import is_enabled
from prefix_grouper_plugins.sharing import self_check_pending
from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, reward, train, use_float64_head

GROUPED = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2}


class OwnLlama(LlamaForCausalLM):
    """Code from outside of transformers."""


def count_packed_positions(patch: pytest.MonkeyPatch) -> None:
    """A patched model: single rows are right, and packed ones have wrong positions."""
    own = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        numbered = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        return own(self, x, numbered if len(position_ids) == 1 else position_ids)

    patch.setattr(LlamaRotaryEmbedding, "forward", forward)


@pytest.fixture
def llama(tmp_path):
    return tiny.saved_model(tmp_path, "llama")


def checks(caplog) -> list[str]:
    return [message for message in caplog.messages if " passed the self-check " in message]


def trainer_of(model: Any, **settings: Any) -> PrefixGrouperGRPOTrainer:
    return PrefixGrouperGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=PrefixGrouperGRPOConfig(
            output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[], **settings
        ),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )


def test_the_self_check_runs_once_before_training_and_says_its_cost(caplog, llama):
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        make_trainer(llama, shared=True, dtype=torch.float32, beta=0.1, **GROUPED).train()
    assert len(checks(caplog)) == 2  # of the policy and of the reference model
    assert checks(caplog)[0].startswith("prefix grouper: LlamaForCausalLM passed the self-check in ")


def test_it_can_be_turned_off(caplog, llama):
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        trainer = make_trainer(llama, shared=True, prefix_grouper_self_check=False, **GROUPED)
    assert is_enabled(trainer.model) and not checks(caplog)


def test_a_class_of_ones_own_is_shared_once_it_has_passed_and_refused_without(llama):
    assert is_enabled(trainer_of(OwnLlama.from_pretrained(llama)).model)
    with pytest.raises(UnsupportedModelError, match="OwnLlama is code from outside of transformers"):
        trainer_of(OwnLlama.from_pretrained(llama), prefix_grouper_self_check=False)


def test_a_patched_model_is_stopped_before_training(monkeypatch, llama):
    count_packed_positions(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"packed rows of LlamaForCausalLM are not its rows: .* differ by"):
        make_trainer(llama, shared=True, **GROUPED)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_patched_model_can_fall_back_to_the_stock_weights(monkeypatch, llama, sharded):
    """A model that is to be sharded is checked at its first forward, when it is."""
    count_packed_positions(monkeypatch)
    use_float64_head(monkeypatch)
    if sharded:
        monkeypatch.setattr(ours, "SHARDED", {DistributedType.NO})
    stock, _ = train(llama, shared=False, **GROUPED)
    fallen, trainer = train(llama, shared=True, prefix_grouper_on_unsupported="fallback", **GROUPED)
    assert largest_difference(stock, fallen) < 1e-12
    assert not is_enabled(trainer.model) and not self_check_pending(trainer.model)
    assert logged(trainer, "prefix_grouper/fallbacks") == [1, 1]
    assert "are not its rows" in next(iter(trainer.sharing.fallbacks))


def test_a_model_that_is_to_be_sharded_waits_for_its_first_forward(monkeypatch, caplog, llama):
    monkeypatch.setattr(ours, "SHARDED", {DistributedType.NO})
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        trainer = make_trainer(llama, shared=True, **GROUPED)
        assert self_check_pending(trainer.model) and not checks(caplog)
        trainer.train()
    assert not self_check_pending(trainer.model) and len(checks(caplog)) == 1
    assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks


def test_models_that_see_padding_on_the_left_are_refused_here_though_not_elsewhere(tmp_path):
    path = tiny.saved_model(tmp_path, "rwkv", attention_hidden_size=32)
    with pytest.raises(UnsupportedModelError, match="rwkv runs its state over padding on the left"):
        make_trainer(path, shared=True, model_init_kwargs={}, **GROUPED)
    model = enable_prefix_grouper(tiny.model("rwkv", attention_hidden_size=32))
    rows = tiny.rows({6: [4, 3]})
    ids = torch.stack([row[:9] for row in rows])
    ids = torch.nn.functional.pad(ids, (2, 0))  # prompts padded on the left, as a trainer has them
    real = (torch.arange(11) >= 2).long().expand_as(ids)
    logps, _ = prefix_grouped_logps(model, ids[:, :8], real[:, :8], ids[:, 8:], real[:, 8:])
    for row, found in zip(rows, logps, strict=True):
        alone = model(input_ids=row[None, :9]).logits[0, 5:-1].log_softmax(-1)
        torch.testing.assert_close(found, alone.gather(-1, row[6:9, None])[:, 0], rtol=1e-4, atol=1e-5)
