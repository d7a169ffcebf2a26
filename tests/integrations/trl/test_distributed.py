"""Two processes (gloo, DDP) learn the weights that two processes of the stock trainer learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "checkpointing"])
def test_two_processes_learn_the_stock_weights(tmp_path, mode):
    path = tiny.saved_model(tmp_path / "model", "qwen3")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.integrations.trl.distributed_training", path, mode],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 equal" in done.stdout
    assert "rank 1 equal" in done.stdout
