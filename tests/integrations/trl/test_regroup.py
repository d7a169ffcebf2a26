"""Rows of a prompt meet again in one micro-batch, and nothing else about the batch changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from prefix_grouper_plugins.integrations.trl.losses import why_rows_depend
from prefix_grouper_plugins.integrations.trl.regroup import regroup, regrouped_window
from prefix_grouper_plugins.integrations.trl.windows import windows


def generation_batch(rows: int, group: int) -> dict:
    """As TRL makes it: the rows of a prompt side by side, with everything that may ride along."""
    prompt = torch.arange(rows) // group
    return {
        "prompt_ids": torch.stack([torch.zeros(rows, dtype=torch.long), prompt + 3, prompt + 5], dim=1),
        "prompt_mask": torch.stack([prompt * 0, prompt * 0 + 1, prompt * 0 + 1], dim=1),
        "completion_ids": torch.arange(rows)[:, None],
        "advantages": torch.arange(rows).float(),
        "num_items_in_batch": torch.tensor(7.0),
        "old_per_token_logps": None,
        "extra": [f"row {i}" for i in range(rows)],
    }


def shuffled_micro_batches(rows: int, slices: int, group: int) -> list[dict]:
    torch.manual_seed(0)
    return split_tensor_dict(shuffle_sequence_dict(generation_batch(rows * slices, group)), slices)


def rows_of(batches: list[dict]) -> list[int]:
    return sorted(int(row) for batch in batches for row in batch["completion_ids"][:, 0])


@pytest.mark.parametrize(("rows", "slices", "group"), [(8, 4, 8), (4, 4, 8), (6, 3, 3), (2, 8, 8), (8, 2, 4)])
def test_each_micro_batch_holds_as_few_prompts_as_can_be(rows, slices, group):
    batches = regroup(shuffled_micro_batches(rows, slices, group), [range(slices)])
    for batch in batches:
        assert len(batch["advantages"]) == rows
        assert len(batch["prompt_ids"][:, 1].unique()) == max(rows // group, 1)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_rows_stay_in_their_window_and_keep_what_belongs_to_them(window):
    before = shuffled_micro_batches(4, 4, 8)
    after = regroup(before, windows(4, window))
    for start in range(0, 4, window):
        assert rows_of(after[start : start + window]) == rows_of(before[start : start + window])
    for batch in after:
        row = batch["completion_ids"][:, 0]
        assert torch.equal(batch["advantages"], row.float())
        assert torch.equal(batch["prompt_ids"][:, 1], row // 8 + 3)
        assert batch["extra"] == [f"row {i}" for i in row.tolist()]
        assert batch["num_items_in_batch"] == 7.0
        assert batch["old_per_token_logps"] is None


def test_prompts_that_differ_in_padding_alone_are_kept_apart():
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [5, 5], [0, 5], [5, 5]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]]),
        "row": torch.arange(4),
    }
    first, second = regroup([{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}], [range(2)])
    assert (first["row"].tolist(), second["row"].tolist()) == ([0, 2], [1, 3])


def settings(**changes):
    base = {"gradient_accumulation_steps": 4, "steps_per_generation": 6, "loss_type": "dapo"}
    return SimpleNamespace(**{**base, **changes})


@pytest.mark.parametrize(
    ("changes", "mode", "window"),
    [
        ({}, "exact", 2),
        ({}, "group", 6),
        ({}, "none", 1),
        ({"steps_per_generation": 4}, "exact", 4),
        ({"loss_type": "bnpo"}, "exact", 1),
        ({"loss_type": "bnpo"}, "group", 6),
        ({"loss_type": "a loss of tomorrow"}, "exact", 1),
        ({"top_entropy_quantile": 0.8}, "exact", 1),
        ({"entropy_coef": 0.1}, "exact", 1),
        ({"use_adaptive_entropy": True}, "exact", 1),
    ],
)
def test_rows_move_only_where_the_optimizer_step_stays_the_same(changes, mode, window):
    args = settings(**changes)
    assert regrouped_window(args, mode, why_rows_depend(args) is None) == window
