"""Tensor parallelism of transformers (``tp_plan="auto"``): each process has some heads of each layer, and all of the layout."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import tiny
from tests.processes import run_in_fork

MODELS = {
    "qwen3": {"num_key_value_heads": 2},
    "mistral": {"sliding_window": 7},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.slow
def test_packed_rows_of_a_model_that_is_cut_among_processes_are_the_rows_of_the_whole_one(tmp_path):
    folders = [tiny.saved_model(tmp_path / kind, kind, **more) for kind, more in MODELS.items()]
    figures = tmp_path / "figures.json"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in ours.items()}}
        command = ("-m", "tests.modeling.tensor_parallel", str(figures), *folders)
        return run_in_fork(*command, cwd=Path(__file__).parents[2], env=environment)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(2)):
            assert done.returncode == 0, done.stderr[-3000:]
    for kind, (passed, logps, gradients) in zip(MODELS, json.loads(figures.read_text()), strict=True):
        assert passed, kind
        assert logps < 1e-5 and 0 < gradients < 1e-5, (kind, logps, gradients)
