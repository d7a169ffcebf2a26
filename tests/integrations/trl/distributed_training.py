"""Run by torchrun from test_distributed.py: trains stock and shared in the same processes and compares the weights."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
from datasets import Dataset

from tests.integrations.trl import vision
from tests.integrations.trl.training import largest_difference, train, use_float64_head

SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}


def text(mode: str) -> dict[str, Any]:
    checkpointing = mode == "checkpointing"
    return {**SETTINGS, "beta": 0.04, "lora": checkpointing, "gradient_checkpointing": checkpointing}


def images() -> dict[str, Any]:
    """Every second prompt of a process has no image, and DDP waits for the gradient of every parameter."""
    with_images, without = vision.prompts(24), vision.prompts(24, mixed=True).filter(lambda row: not row["images"])
    rows = [row for pair in zip(with_images, [*without] * 3, strict=False) for row in pair]
    return {
        **SETTINGS,
        "processing_class": vision.processor("qwen2_5_vl"),
        "train_dataset": Dataset.from_list(rows),
        "max_steps": 3,
        "max_completion_length": 6,
        "adam_epsilon": 1e-6,
        "shuffle_dataset": False,  # or a process may get no image at all, which stops the stock trainer too
        "ddp_find_unused_parameters": False,
        "generation_kwargs": {"suppress_tokens": [vision.families.IMAGE]},
    }


def main() -> None:
    path, mode = sys.argv[1], sys.argv[2]
    use_float64_head(pytest.MonkeyPatch())
    settings = images() if mode == "images" else text(mode)
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert trainer.accelerator.num_processes == 2
    if mode == "images":
        assert trainer.sharing.rows_per_group > 2.5, trainer.sharing.rows_per_group  # a dummy row is a group
    else:
        assert trainer.sharing.rows_per_group == 4, trainer.sharing.rows_per_group
    difference = largest_difference(stock, shared)
    assert difference <= (1e-6 if mode == "images" else 1e-12), difference  # rotary angles are computed in float32
    assert not trainer.sharing.fallbacks, trainer.sharing.fallbacks
    print(f"rank {os.environ['RANK']} equal, {difference:.0e}")


if __name__ == "__main__":
    main()
