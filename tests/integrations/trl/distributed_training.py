"""Run by torchrun from test_distributed.py: trains stock and shared in the same processes and compares the weights."""

from __future__ import annotations

import os
import sys

import pytest

from tests.integrations.trl.training import largest_difference, train, use_float64_head


def main() -> None:
    path, checkpointing = sys.argv[1], sys.argv[2] == "checkpointing"
    use_float64_head(pytest.MonkeyPatch())
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "beta": 0.04,
        "lora": checkpointing,
        "gradient_checkpointing": checkpointing,
    }
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert trainer.accelerator.num_processes == 2
    assert trainer.sharing.rows_per_group == 4, trainer.sharing.rows_per_group
    difference = largest_difference(stock, shared)
    assert difference <= 1e-12, difference
    print(f"rank {os.environ['RANK']} equal")


if __name__ == "__main__":
    main()
