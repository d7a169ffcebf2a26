"""Two processes (gloo, DDP) learn the weights that two processes of the stock trainer learn."""

from __future__ import annotations

import pytest
from packaging.version import Version

from tests import tiny
from tests.integrations.trl import distributed_images
from tests.integrations.trl.distributed_training import EQUAL, MODE
from tests.integrations.trl.training import TRL, run_python

pytestmark = pytest.mark.slow

OF_TEXT = [
    "full",
    "groups over several micro-batches",
    "rows ahead",
    "unequal parts",
    "unequal pieces",
]
# The others combine what these do with checkpointing, LoRA, or processes without any image.
IMAGES = ["images in half of the rows", "images on one process", "images in forwards ahead"]
OTHERS = ["checkpointing", "synchronizes each", *(mode for mode in distributed_images.CASES if mode not in IMAGES)]
MIXES_ROWS = Version("1.14") <= TRL  # with images and without; earlier releases stop at some of them
MODES = [*OF_TEXT, "one process", "images", *(IMAGES if MIXES_ROWS else ())]


GEOMETRIES = ["1/8/8", "2/8/8", "1/4/4", "4/8/16", "3/4/6", "8/4/8"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What two processes that train in every mode, and compare, have written to stderr in each mode."""
    return errors_of(tmp_path_factory.mktemp("distributed"), MODES)


def errors_of(folder, modes):
    models = tiny.saved_model(folder / "text", "qwen3"), str(folder)
    distributed_images.save_models(folder)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_python(folder, *torchrun, "-m", "tests.integrations.trl.distributed_training", *models, *modes)
    parts = dict(part.split("\n", 1) for part in done.stderr.split(MODE)[1:])
    assert list(parts) == modes and all(f"{EQUAL}\n" in part for part in parts.values())
    return parts


@pytest.mark.parametrize("mode", OF_TEXT)
def test_two_processes_learn_the_stock_weights(errors, mode):
    assert errors[mode].count("prefix grouper is on for") == 1


def test_what_one_process_does_alone_keeps_the_other_in_step_and_reaches_the_log(errors):
    said = errors["one process"]
    assert said.count("forwards of another process run without sharing: rank 1 cannot") == 1
    assert said.count("prefix grouper is on for") == 3, "one line for each of three trainings, not for each process"


def test_groups_without_images_do_not_leave_the_vision_tower_without_a_gradient(errors):
    """DDP would stop: "Expected to have finished reduction in the prior iteration"."""
    assert errors["images"].count("so it gets a dummy image, which changes no result") == 1


@pytest.mark.skipif(not MIXES_ROWS, reason=f"TRL {TRL} stops at rows without images beside others with some")
@pytest.mark.parametrize("mode", IMAGES)
def test_two_processes_that_reuse_prompts_with_images_learn_the_stock_weights(errors, mode):
    assert EQUAL in errors[mode]


@pytest.mark.exhaustive
def test_what_these_modes_do_together_learns_the_stock_weights(tmp_path):
    assert list(errors_of(tmp_path, OTHERS)) == OTHERS


@pytest.mark.exhaustive
def test_groups_of_every_geometry_learn_the_stock_weights_on_two_processes(tmp_path):
    assert list(errors_of(tmp_path, GEOMETRIES)) == GEOMETRIES
