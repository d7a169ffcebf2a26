"""Models with recurrent layers, or with attention of their own, learn the stock trainer's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins.modeling import check_support
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES
from tests.integrations.trl.training import make_trainer, use_float64_head
from tests.modeling import families

# One of each kind: ALiBi and rotary attention of its own, Mamba, Mamba-2 beside attention, gated delta net, short
# convolution, lightning attention.
KINDS = ["falcon", "gpt_neox_japanese", "mamba", "falcon_h1", "qwen3_next", "lfm2", "minimax"]
# Their masks or ALiBi overflow where prompts are padded in float64, in transformers itself.
IN_FLOAT32 = {"bloom", "mpt", "xglm"}
# The stock trainer cannot train them: it asks for router logits that there are none of, or for a head as wide as the model.
NOT_IN_STOCK = {"doge", "rembert"}
# TRL's own router loss does not find the number of their experts.
WITHOUT_ROUTER_LOSS = {"granitemoehybrid"}
# Kernels of recurrent layers compute in float32, in other chunks where a state is forked.
FORKED_IN_FLOAT32 = 1e-6


def difference_of_trained_weights(
    model_type: str, path: str, monkeypatch: pytest.MonkeyPatch, *, rows: int = 8, **settings: Any
) -> float:
    """Between stock and shared; ``rows`` in a micro-batch, all 8 in one optimizer step."""
    model = families.build(model_type)
    dtype = torch.float32 if model_type in IN_FLOAT32 else torch.float64
    if dtype == torch.float64:
        use_float64_head(monkeypatch)
    model.to(dtype).save_pretrained(path)
    report = check_support(model)
    if refused := report.reasons + report.left_padding_reasons:
        pytest.skip(f"refused with this transformers: {refused}")
    assert Anatomy(model).mixers
    weights = []
    for shared in (False, True):
        trainer = make_trainer(
            path,
            shared=shared,
            dtype=dtype,
            optim="sgd",
            beta=0.1,
            num_generations=4,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            **{"max_steps": 3, **settings},
            gradient_checkpointing=model.supports_gradient_checkpointing,
            **({"router_aux_loss_coef": 0.0} if model_type in WITHOUT_ROUTER_LOSS else {}),
            model_init_kwargs={"dtype": dtype, "experts_implementation": "eager"},
        )
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert trainer.sharing.token_ratio < 0.8 and not trainer.sharing.fallbacks
    if rows < 4 and trainer._reuse.why_not(trainer.model) is None:
        assert trainer.sharing.passes["update"].rows_per_group == 4
    return max(float((weights[1][name] - p).abs().max()) for name, p in weights[0].items())


@pytest.mark.parametrize(
    "model_type",
    ["lfm2", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("qwen3_next", "falcon_h1"))],
)
def test_micro_batches_smaller_than_a_group_give_the_stock_weights(model_type, tmp_path, monkeypatch):
    tolerance = FORKED_IN_FLOAT32 if model_type == "qwen3_next" else 1e-9
    settings = {"router_aux_loss_coef": 0.0} if model_type == "qwen3_next" else {}  # else rows keep their micro-batch
    assert difference_of_trained_weights(model_type, str(tmp_path), monkeypatch, rows=1, **settings) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_three_steps_give_the_stock_weights(model_type, tmp_path, monkeypatch):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    tolerance = FORKED_IN_FLOAT32 if model_type == "qwen3_next" else 1e-9
    assert difference_of_trained_weights(model_type, str(tmp_path), monkeypatch) < tolerance


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES - NOT_IN_STOCK - set(KINDS)))
def test_every_type_with_mixers_gives_the_stock_weights(model_type, tmp_path, monkeypatch):
    if model_type not in CONFIG_MAPPING or not Anatomy(families.build(model_type)).mixers:
        pytest.skip("no token mixers")
    layers = check_support(families.build(model_type)).layers
    forked = any(layer.backend == "state forking" for layer in layers)
    tolerance = 1e-6 if model_type in IN_FLOAT32 else FORKED_IN_FLOAT32 if forked else 1e-9
    assert difference_of_trained_weights(model_type, str(tmp_path), monkeypatch) < tolerance
