"""What several of the attention tests set up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as torch_flex

from prefix_grouper_plugins.attention.backends import flex
from prefix_grouper_plugins.attention.registry import fallbacks


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Run flex here; the list holds the number of operators in each graph that was compiled."""
    compilations: list[int] = []

    def counting(graph: Any, example_inputs: Any) -> Any:
        compilations.append(len(graph.graph.nodes))
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(flex._attention, dynamic=True, fullgraph=True, backend=counting)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "why_not", lambda request: None)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_given_up", {})
    fallbacks.clear()
    yield compilations
    torch._dynamo.reset()
    fallbacks.clear()
    flex.block_mask.cache_clear()
