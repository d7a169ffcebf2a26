"""A padded batch whose rows have much in common, and what `share_rows` is compared by. For the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from prefix_grouper_plugins import share_rows
from tests import tiny
from tests.modeling.comparing import exact, gradients

# Three levels: two tokens that all rows begin with, the prompts of two groups behind them, and their completions.
ROWS = [torch.tensor([3, 4, *row.tolist()]) for row in tiny.rows({9: [4, 7, 1], 3: [6, 2]})]
IDS = pad_sequence(ROWS, batch_first=True)
MASK = (IDS != 0).long()  # no row holds the padding token
TRIE = len({tuple(row[: end + 1].tolist()) for row in ROWS for end in range(len(row))})
TOKENS = sum(map(len, ROWS))
WEIGHTS = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def small(model_type: str = "qwen3", **changes: Any) -> Any:
    return exact(model_type, num_hidden_layers=2, **changes)


def padded(left: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask with so many columns of padding in front."""
    return nn.functional.pad(IDS, (left, 0)), nn.functional.pad(MASK, (left, 0))


def logits_of(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **inputs: Any) -> Tensor:
    """At real tokens; what stands at padding means nothing."""
    return model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **inputs}).logits * mask[..., None]


def loss(logits: Tensor) -> Tensor:
    return (logits.tanh().sum(-1) * WEIGHTS[: logits.shape[1]]).sum()


def assert_gradients_within(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: Callable[[str], float]
) -> None:
    """Each within ``tolerance`` of its name, as a share of the largest entry of all: that of a key bias is zero but for rounding."""
    largest = max(float(g.abs().max()) for g in expected.values())
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (got[name] - wanted).abs().max() <= tolerance(name) * largest, name


def assert_shared(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, tolerance: float = 1e-11, **inputs: Any) -> None:
    """Logits, and gradients of every parameter, are those of the ordinary forward; each distinct token ran once."""
    expected = logits_of(model, ids, mask, **inputs)
    expected_gradients = gradients(model, loss(expected))
    with share_rows(model, share="tree", self_check=False) as sharing:
        got = logits_of(model, ids, mask, **inputs)
        got_gradients = gradients(model, loss(got))
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert_gradients_within(got_gradients, expected_gradients, lambda name: tolerance)
    assert (sharing.meter.packed, dict(sharing.meter.fallbacks)) == (1, {})
    assert (sharing.meter.tokens_forwarded, sharing.meter.row_tokens) == (TRIE, TOKENS)


def result_of(model: Any, inputs: dict[str, Any]) -> Any:
    """Logits, or the error."""
    try:
        return model(**inputs).logits
    except Exception as error:
        return type(error), str(error)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other
