"""Generation without vLLM: distinct prompts are prefilled once, and the stock trainer's tokens are sampled."""

from __future__ import annotations

import pytest
from trl import GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer
from tests import tiny
from tests.integrations.trl import vision
from tests.integrations.trl.training import largest_difference, logged, make_trainer, train, use_float64_head

SETTINGS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 3}
RATIO, FALLBACKS = "prefix_grouper/generation_token_ratio", "prefix_grouper/generation_fallbacks"


class SeesGeneration:
    """Notes the sampled tokens, and the rows of each prefill."""

    def _generate_single_turn(self, *args, **kwargs):
        self.rows, self.sampled = getattr(self, "rows", []), getattr(self, "sampled", [])
        base = self.accelerator.unwrap_model(self.model)

        def note(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                self.rows.append(len(kwargs["input_ids"]))

        generate = base.generate

        def noted(*args, **kwargs):
            hook = base.get_base_model() if hasattr(base, "get_base_model") else base
            hook = hook.register_forward_pre_hook(note, with_kwargs=True)  # behind those that choose rows
            try:
                return generate(*args, **kwargs)
            finally:
                hook.remove()

        base.generate = noted
        try:
            results = super()._generate_single_turn(*args, **kwargs)
        finally:
            del base.generate
        self.sampled += results[0]  # TRL 0.29 returns extra fields after the log-probabilities
        return results


STOCK, SHARED = (type("Trainer", (SeesGeneration, base), {}) for base in (GRPOTrainer, PrefixGrouperGRPOTrainer))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_the_stock_tokens_are_sampled_and_the_stock_weights_learned(monkeypatch, tmp_path, lora):
    path = tiny.saved_model(tmp_path, "qwen3")
    use_float64_head(monkeypatch)
    stock, stock_trainer = train(path, shared=False, trainer_class=STOCK, lora=lora, **SETTINGS)
    shared, trainer = train(path, shared=True, trainer_class=SHARED, lora=lora, **SETTINGS)
    assert stock_trainer.rows == [16] * len(stock_trainer.rows)
    assert trainer.rows == [4] * len(stock_trainer.rows)
    assert trainer.sampled == stock_trainer.sampled
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, RATIO) == pytest.approx([0.25] * 3)
    assert logged(trainer, FALLBACKS) == [0.0] * 3
    assert trainer.generation.counts.rows_per_group == 4


def test_an_option_turns_it_off(tmp_path):
    path = tiny.saved_model(tmp_path, "qwen3")
    _, trainer = train(path, shared=True, trainer_class=SHARED, prefix_grouper_generation=False, **SETTINGS)
    assert set(trainer.rows) == {16}
    assert not logged(trainer, RATIO)


def test_what_is_prefilled_row_by_row_is_counted_and_said_once(tmp_path, caplog):
    path = vision.saved_model(tmp_path, "qwen2_5_vl")
    given = {"processing_class": vision.processor("qwen2_5_vl"), "train_dataset": vision.prompts()}
    given |= {"generation_kwargs": {"suppress_tokens": [vision.families.IMAGE]}, "max_completion_length": 6}
    _, trainer = train(path, shared=True, **{**SETTINGS, **given})
    reason = "a vision-language model keeps positions outside of its cache"
    assert dict(trainer.generation.fallbacks) == {reason: 3}  # one for each generation batch
    said = [record.message for record in caplog.records if reason in record.message]
    assert said == [f"prefix grouper: generation prefills every row: {reason}"]
    assert set(logged(trainer, FALLBACKS)) == {1.0}


def test_generation_is_left_alone_where_sharing_is_off(tmp_path):
    path = tiny.saved_model(tmp_path, "qwen3")
    trainer = make_trainer(path, shared=True, trainer_class=SHARED, use_prefix_grouper=False, **SETTINGS)
    trainer.train()
    assert set(trainer.rows) == {16}
