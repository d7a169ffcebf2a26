"""Mixtures of experts: the router's load-balancing loss counts each shared token as often as rows share it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from prefix_grouper_plugins.integrations.trl.router_loss import load_balancing_loss
from tests import tiny
from tests.integrations.trl.training import (
    HAS_ROUTER_LOSS,
    largest_difference,
    logged,
    make_trainer,
    skip_before,
    train,
    use_float64_head,
)

MOE = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
}
SETTINGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "beta": 0.04,
    "optim": "sgd",  # routers compute in float32, and Adam would blow rounding up to its step size
    "learning_rate": 0.05,
    "max_steps": 4,
    "mask_truncated_completions": True,  # rows without a completion still count in the router's loss
}


def settings(model_type, coefficient):
    attention = "eager" if model_type == "gpt_oss" else "sdpa"
    init = {"dtype": torch.float64, "attn_implementation": attention, "experts_implementation": "eager"}
    router = {"router_aux_loss_coef": coefficient} if HAS_ROUTER_LOSS else {}
    return {**SETTINGS, **router, "model_init_kwargs": init}


# Without the loss a mixture is one of the models that tests/modeling/test_families.py compares.
WITHOUT_LOSS = [pytest.param(kind, 0.0, marks=pytest.mark.exhaustive if kind != "mixtral" else ()) for kind in MOE]


@pytest.mark.parametrize(("model_type", "coefficient"), [*((kind, 0.5) for kind in MOE), *WITHOUT_LOSS])
def test_router_loss_and_weights_equal_the_stock_ones(monkeypatch, tmp_path, model_type, coefficient):
    path = tiny.saved_model(tmp_path, model_type, **MOE[model_type])
    use_float64_head(monkeypatch)
    stock, stock_trainer = train(path, shared=False, **settings(model_type, coefficient))
    shared, trainer = train(path, shared=True, **settings(model_type, coefficient))
    assert set(trainer.sharing.fallbacks) <= {"every completion of a micro-batch is masked"}
    assert trainer.sharing.rows_per_group > 1.5
    assert largest_difference(stock, shared) <= 1e-6
    assert logged(trainer, "aux_loss") == pytest.approx(logged(stock_trainer, "aux_loss"), rel=1e-6)
    assert bool(logged(trainer, "aux_loss")) == (HAS_ROUTER_LOSS and coefficient > 0)


def test_router_loss_of_a_class_that_was_made_elsewhere_is_that_of_its_base():
    """FSDP2 makes such a class of a model's."""
    model = tiny.model("qwen3_moe", **MOE["qwen3_moe"])
    logits = [tuple(torch.randn(7, model.num_experts) for _ in range(2))]
    expected = load_balancing_loss(model, logits, torch.ones(7))
    model.__class__ = type("FSDPQwen3Moe", (FSDPModule, type(model)), {})
    assert torch.equal(load_balancing_loss(model, logits, torch.ones(7)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_router_loss_survives_gradient_checkpointing(monkeypatch, tmp_path, reentrant):
    path = tiny.saved_model(tmp_path, "mixtral", **MOE["mixtral"])
    use_float64_head(monkeypatch)
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    stock, _ = train(path, shared=False, **settings("mixtral", 0.5), **checkpointing)
    shared, trainer = train(path, shared=True, **settings("mixtral", 0.5), **checkpointing)
    assert trainer.sharing.rows_per_group > 1.5
    assert largest_difference(stock, shared) <= 1e-6


@pytest.mark.parametrize(("coefficient", "window"), [(0.5, 1), (0.0, 2)])
def test_rows_stay_in_their_micro_batch_when_the_router_loss_is_on(tmp_path, coefficient, window):
    """The loss is a mean over the tokens of a micro-batch, so moving rows would change it."""
    skip_before("1.7", "has no router loss in GRPO")
    path = tiny.saved_model(tmp_path, "qwen3_moe", **MOE["qwen3_moe"])
    trainer = make_trainer(path, shared=True, **settings("qwen3_moe", coefficient))
    assert trainer._window() == window
