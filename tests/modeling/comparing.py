"""Rows, models and the comparison of a packed forward with single rows that tests of modeling share."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.modeling import packed_inputs
from tests import tiny

ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)
IDS = LAYOUT.pack(ROWS)


def exact(model_type: str = "qwen3", **changes: Any):
    """A float64 model whose norms compute in float64, so that only a different order of sums is left."""
    model = tiny.model(model_type, **changes).double()
    tiny.compute_norms_in_input_dtype(model)
    return model


def packed(model, **changes: Any):
    return model(**{**packed_inputs(LAYOUT, IDS), **changes}).logits[0]


def single_rows(model):
    return [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]


def loss(rows) -> torch.Tensor:
    return sum(x.log_softmax(-1).gather(-1, row[1:, None]).sum() for x, row in zip(rows, ROWS, strict=True))  # type: ignore[return-value]


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        error = float((got[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


def assert_packed_equals_single_rows(model, tolerance: float = 1e-10) -> None:
    """Logits and gradients; ``model`` is enabled."""
    expected, got = single_rows(model), LAYOUT.unpack(packed(model))
    for row, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(row, wanted, rtol=tolerance, atol=tolerance)
    assert_same_gradients(gradients(model, loss(got)), gradients(model, loss(expected)), tolerance)


def lora(model, **changes: Any):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", r=4, **changes)
    wrapped = get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.3)
    return wrapped.double().eval()
