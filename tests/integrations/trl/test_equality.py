"""The claim of the whole package: training with shared prompts learns the same weights as the stock trainer."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from itertools import product

import pytest
import torch
import trl
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOTrainer,
    PrefixGrouperRLOOConfig,
    PrefixGrouperRLOOTrainer,
)
from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, train, use_float64_head

MODELS = {
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 7},  # shorter than nearly all rows
}
# per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, num_generations
GEOMETRIES = [(8, 4, 4, 8), (8, 1, 1, 8), (4, 4, 4, 8), (6, 3, 3, 3)]
LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo"]
FULL_GRID = list(product(GEOMETRIES, LOSSES, MODELS, (False, True), (False, True)))


def _covering_cases():
    """Every geometry with every loss; model, LoRA and checkpointing take turns so that all pairs occur."""
    kinds = list(product(MODELS, (False, True), (False, True)))
    for i, (geometry, loss) in enumerate(product(GEOMETRIES, LOSSES)):
        yield geometry, loss, *kinds[(i * 5) % len(kinds)]


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    return {name: tiny.saved_model(tmp_path_factory.mktemp(name), name, **more) for name, more in MODELS.items()}


def _compare(monkeypatch, path, geometry, loss, lora, checkpointing, **more):
    rows, accumulation, slices, group = geometry
    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": slices,
        "num_generations": group,
        "loss_type": loss,
        "beta": 0.04,
        "lora": lora,
        "gradient_checkpointing": checkpointing,
        **more,
    }
    stock, stock_trainer = train(path, shared=False, **settings)
    shared, shared_trainer = train(path, shared=True, **settings)
    assert logged(shared_trainer, "reward") == logged(stock_trainer, "reward")
    assert largest_difference(stock, shared) <= 1e-12
    return stock_trainer, shared_trainer


@pytest.mark.parametrize(("geometry", "loss", "model", "lora", "checkpointing"), _covering_cases())
def test_six_steps_of_shared_training_give_the_stock_weights(
    monkeypatch, model_paths, geometry, loss, model, lora, checkpointing
):
    _, trainer = _compare(monkeypatch, model_paths[model], geometry, loss, lora, checkpointing)
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.rows_per_group > 1
    rows, accumulation, slices, group = geometry
    if loss != "bnpo" or slices == 1:
        in_one_step = rows * math.gcd(accumulation, slices) if loss != "bnpo" else rows
        assert logged(trainer, "prefix_grouper/rows_per_group") == [min(in_one_step, group)] * 6


@pytest.mark.exhaustive
@pytest.mark.parametrize(("geometry", "loss", "model", "lora", "checkpointing"), FULL_GRID)
def test_the_full_grid_of_settings(monkeypatch, model_paths, geometry, loss, model, lora, checkpointing):
    _compare(monkeypatch, model_paths[model], geometry, loss, lora, checkpointing)


MORE_SETTINGS = {
    "without a reference model": {"beta": 0.0},
    "two iterations per batch": {"num_iterations": 2},
    "old log-probs": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "a generation batch of one step and a half": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 6,
        "num_generations": 8,
    },
    "an epoch that ends amid accumulation": {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 2,
        "max_steps": -1,
        "num_train_epochs": 1,
    },
    "top entropy quantile": {"top_entropy_quantile": 0.5},
    "sequence-level ratios": {"importance_sampling_level": "sequence"},
    "two-sided clipping": {"delta": 1.1, "num_iterations": 2},
    "truncated completions masked": {"mask_truncated_completions": True},
    "entropy bonus": {"entropy_coef": 0.1},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "off-policy masking": {"off_policy_mask_threshold": 0.1, "num_iterations": 2},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("name", MORE_SETTINGS)
def test_other_settings_give_the_stock_weights(monkeypatch, model_paths, name):
    unknown = MORE_SETTINGS[name].keys() - {option.name for option in fields(GRPOConfig)}
    if name == "vespo" and "vespo" not in inspect.getsource(GRPOTrainer):
        unknown = {"vespo"}
    if unknown or (name == "luspo" and Version(trl.__version__) < Version("1.10")):
        pytest.skip(f"TRL {trl.__version__} has no {unknown or 'luspo that we can share'}")
    settings = {"loss_type": "dapo", "lora": False, "checkpointing": False, **MORE_SETTINGS[name]}
    _compare(monkeypatch, model_paths["qwen3"], (8, 2, 2, 4), settings.pop("loss_type"), **settings)


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "mistral"])
def test_bfloat16_autocast_is_as_near_to_float32_as_the_stock_trainer(model_paths, model_type):
    """TRL's default precision. Rounding differs, so both are held against the stock trainer in float32."""
    settings = {"per_device_train_batch_size": 8, "num_generations": 8, "dtype": torch.float32}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 24, (1, 40), generator=generator).expand(8, -1)
    ids = torch.cat([prompt, torch.randint(3, 24, (8, 40), generator=generator)], dim=1)

    def logps(shared, bf16):
        trainer = make_trainer(model_paths[model_type], shared=shared, bf16=bf16, **settings)
        with trainer.accelerator.autocast():  # TRL < 1.15 counts on its callers for it
            result = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 40)[0]
        result.sum().backward()
        return result.detach().float(), trainer.model.get_input_embeddings().weight.grad.float()

    exact, stock, shared = logps(False, False), logps(False, True), logps(True, True)
    for true, ordinary, packed in zip(exact, stock, shared, strict=True):
        ordinary_error, packed_error = (ordinary - true).abs().mean(), (packed - true).abs().mean()
        assert ordinary_error > 0, "autocast was not on"
        assert packed_error <= 1.3 * ordinary_error


class ScoredSampling:
    """Samples as ever, but says that vLLM did, and with which log-probs: the seam that TRL corrects the ratio at."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_vllm = True

    def _generate_single_turn(self, *args, **kwargs):
        self.use_vllm = False
        try:
            completion_ids, _, *more = super()._generate_single_turn(*args, **kwargs)
        finally:
            self.use_vllm = True
        return completion_ids, [[-3.0 - 0.1 * (token % 3) for token in ids] for ids in completion_ids], *more


def test_correction_of_vllm_sampling_gives_the_stock_weights(monkeypatch, model_paths):
    use_float64_head(monkeypatch)
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4, "beta": 0.04}
    classes = [type("Trainer", (ScoredSampling, base), {}) for base in (GRPOTrainer, PrefixGrouperGRPOTrainer)]
    stock, _ = train(model_paths["qwen3"], shared=False, trainer_class=classes[0], **settings)
    shared, trainer = train(model_paths["qwen3"], shared=True, trainer_class=classes[1], **settings)
    assert logged(trainer, "sampling/importance_sampling_ratio/mean")
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer.sharing.rows_per_group == 4


def test_evaluation_scores_as_the_stock_trainer_does(monkeypatch, model_paths):
    use_float64_head(monkeypatch)
    losses = []
    for shared in (False, True):
        trainer = make_trainer(
            model_paths["llama"], shared=shared, num_generations=4, per_device_eval_batch_size=8, beta=0.04
        )
        torch.manual_seed(3)
        metrics = trainer.evaluate(tiny.prompts(4, seed=1))
        losses.append(metrics["eval_loss"])
    assert losses[0] != 0
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    assert trainer.sharing.rows_per_group == 4


def test_rloo_learns_the_stock_weights(monkeypatch, model_paths):
    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "beta": 0.05,
        "num_iterations": 2,
    }
    stock, _ = train(model_paths["llama"], shared=False, trainer_class=RLOOTrainer, config_class=RLOOConfig, **settings)
    shared, trainer = train(
        model_paths["llama"],
        shared=True,
        trainer_class=PrefixGrouperRLOOTrainer,
        config_class=PrefixGrouperRLOOConfig,
        **settings,
    )
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4] * 6


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_learned_positions_are_those_of_the_stock_trainer(monkeypatch, tmp_path, model_type):
    """GPT-2 numbers padded columns, OPT skips padding."""
    changes = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if model_type == "gpt2" else {"dropout": 0.0}
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if model_type == "gpt2" else {"ffn_dim": 64}
    path = tiny.saved_model(tmp_path, model_type, **changes, **sizes)
    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        # The gradient of a key bias is zero but for rounding, which Adam would blow up to its step size.
        "adam_epsilon": 1e-6,
    }
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer.sharing.rows_per_group == 4
