"""Two processes (gloo, DDP) learn the weights that two processes of the stock trainer learn."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.integrations.trl.training import run_python


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "checkpointing"])
def test_two_processes_learn_the_stock_weights(tmp_path, mode):
    path = tiny.saved_model(tmp_path / "model", "qwen3")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_python(tmp_path, *command, "-m", "tests.integrations.trl.distributed_training", path, mode)
    assert "rank 0 equal" in done.stdout
    assert "rank 1 equal" in done.stdout
