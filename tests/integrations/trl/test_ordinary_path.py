"""Micro-batches that share next to nothing take the stock forward, which is no fallback, and is counted as what it is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from prefix_grouper_plugins.token_budget import pays_to_pack
from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, train

# One row in each micro-batch, whose loss keeps it there; nothing is padded.
NOTHING_SHARED: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "loss_type": "bnpo",
    "train_dataset": tiny.prompts(shortest=20, longest=20),
    "generation_kwargs": {"min_new_tokens": 10},
}


def rows(count: int, prompt: int, completion: int, *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Arguments of the scoring method: rows of different prompts, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (count, padding + prompt + completion), generator=generator)
    ids[:, padding] = torch.arange(3, 3 + count)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return ids, mask, completion


@pytest.fixture(scope="module")
def qwen3_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.saved_model(tmp_path_factory.mktemp("model"), "qwen3"))


@pytest.fixture(scope="module")
def trainer(qwen3_path: str) -> Any:
    return make_trainer(qwen3_path, shared=True, **NOTHING_SHARED)


def test_a_training_that_shares_nothing_is_the_stock_one_bit_for_bit(qwen3_path: str) -> None:
    expected, _ = train(qwen3_path, shared=False, **NOTHING_SHARED)
    found, trainer = train(qwen3_path, shared=True, **NOTHING_SHARED)
    assert largest_difference(found, expected) == 0
    update = trainer.sharing.update
    assert (update.ordinary, update.packed, update.fallbacks) == (8, 0, 0)
    assert set(logged(trainer, "prefix_grouper/token_ratio")) == {1.0}
    assert set(logged(trainer, "prefix_grouper/fallbacks")) == {0.0}
    assert sum(logged(trainer, "prefix_grouper/tokens_forwarded")) == update.row_tokens > 0


@pytest.mark.parametrize(
    ("count", "padding", "same_prompt", "is_packed"),
    [(1, 0, False, False), (1, 4, False, True), (3, 0, False, False), (3, 0, True, True)],
    ids=["one row", "one padded row", "different rows", "one prompt"],
)
def test_a_micro_batch_is_packed_where_that_saves_tokens_or_padding(
    trainer: Any, count: int, padding: int, same_prompt: bool, is_packed: bool
) -> None:
    ids, mask, completion = rows(count, 30, 10, padding=padding)
    if same_prompt:
        ids[:, :-completion] = ids[0, :-completion]
    before = trainer.sharing.total
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, completion)[0]
    after = trainer.sharing.total
    assert (after.packed - before.packed, after.ordinary - before.ordinary) == (is_packed, not is_packed)
    stock = super(type(trainer).__mro__[1], trainer)._get_per_token_logps_and_entropies
    torch.testing.assert_close(logps, stock(trainer.model, ids, mask, completion)[0], rtol=1e-5, atol=1e-5)


def test_packing_pays_by_a_share_of_the_padded_tokens_or_by_tokens_of_each_row() -> None:
    assert pays_to_pack(95, 100, 1) and not pays_to_pack(96, 100, 1) and not pays_to_pack(100, 100, 1)
    assert pays_to_pack(9968, 10000, 2) and not pays_to_pack(9969, 10000, 2) and not pays_to_pack(9968, 10000, 3)


def test_the_first_update_says_what_took_the_ordinary_path(qwen3_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Groups are whole, and share a prompt that is too short to pay."""
    settings = {
        **NOTHING_SHARED,
        "loss_type": "grpo",
        "max_steps": 1,
        "max_completion_length": 60,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "train_dataset": tiny.prompts(shortest=3, longest=3),
        "generation_kwargs": {"min_new_tokens": 60},
    }
    with caplog.at_level(logging.WARNING, "prefix_grouper_plugins"):
        train(qwen3_path, shared=True, **settings)
    line = (
        "prefix grouper: 1 of 1 forwards of the first update took the ordinary path, which is no fallback: packing their "
        "rows would have saved less than 5% of the tokens, and less than 16 of each row"
    )
    assert line in caplog.messages and not any("equal prompts" in message for message in caplog.messages)


def test_verify_compares_packed_rows_where_training_would_not_pack_them(
    qwen3_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "prefix_grouper_plugins"):
        _, trainer = train(qwen3_path, shared=True, prefix_grouper_verify="first", **{**NOTHING_SHARED, "max_steps": 1})
    assert trainer.sharing.update.ordinary == 4
    assert any("verified the first micro-batch of optimizer step 0" in message for message in caplog.messages)
