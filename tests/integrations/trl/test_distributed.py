"""Two processes (gloo, DDP) learn the weights that two processes of the stock trainer learn."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.integrations.trl import vision
from tests.integrations.trl.training import run_python


def run(folder, path, mode):
    """The errors' text of two processes that train both and compare."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_python(folder, *command, "-m", "tests.integrations.trl.distributed_training", path, mode)
    assert "rank 0 equal" in done.stdout
    assert "rank 1 equal" in done.stdout
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "checkpointing", "groups over several micro-batches"])
def test_two_processes_learn_the_stock_weights(tmp_path, mode):
    run(tmp_path, tiny.saved_model(tmp_path / "model", "qwen3"), mode)


@pytest.mark.slow
def test_what_one_process_does_alone_keeps_the_other_in_step_and_reaches_the_log(tmp_path):
    errors = run(tmp_path, tiny.saved_model(tmp_path / "model", "qwen3"), "one process")
    assert errors.count("forwards of another process run without sharing: rank 1 cannot") == 1
    assert errors.count("prefix grouper is on for") == 2, "one line for each of two trainings, not for each process"


@pytest.mark.slow
def test_groups_without_images_do_not_leave_the_vision_tower_without_a_gradient(tmp_path):
    """DDP would stop: "Expected to have finished reduction in the prior iteration"."""
    errors = run(tmp_path, vision.saved_model(tmp_path / "model", "qwen2_5_vl"), "images")
    assert errors.count("so it gets a dummy image, which changes no result") == 1
