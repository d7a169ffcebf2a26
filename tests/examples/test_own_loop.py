"""The loop without a trainer shares every prompt, and learns what it learns without sharing."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path
from typing import Any

import torch

from prefix_grouper_plugins.metrics import SharingMeter
from tests import tiny

LOOP = Path(__file__).parents[2] / "examples" / "own_loop.py"


class Ordinary:
    """In place of `share_rows`."""

    meter = SharingMeter()
    pause = staticmethod(contextlib.nullcontext)


def learned(monkeypatch: Any, shared: bool) -> tuple[dict[str, torch.Tensor], Any]:
    loop = runpy.run_path(str(LOOP))
    model = tiny.model("qwen3", num_hidden_layers=1).double()
    tiny.compute_norms_in_input_dtype(model)
    if not shared:
        loop["train"].__globals__["share_rows"] = lambda model: contextlib.nullcontext(Ordinary)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of logits
    texts = {"PASSAGES": [" ".join(f"w{(i * k) % 20}" for i in range(40)) for k in (1, 3)], "NEW_TOKENS": 6}
    loop["train"].__globals__.update(texts)
    torch.manual_seed(0)
    meter = loop["train"](model, tiny.tokenizer(), 2, learning_rate=1e-3)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, meter


def test_the_loop_learns_what_it_learns_without_sharing(monkeypatch):
    expected, _ = learned(monkeypatch, shared=False)
    found, meter = learned(monkeypatch, shared=True)
    initial = dict(tiny.model("qwen3", num_hidden_layers=1).double().named_parameters())
    assert any(bool((found[name] - initial[name]).abs().max() > 1e-4) for name in found), "nothing was learned"
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-12) for name in expected)
    assert (meter.packed, dict(meter.fallbacks)) == (2, {})
    assert meter.token_ratio < 0.35
