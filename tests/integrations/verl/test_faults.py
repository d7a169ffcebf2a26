"""What goes wrong around a training through Ray: two nodes, a node without the package, a worker that is killed, a resume."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("verl")

from verl_on_cpu.run import TrainingError, final_weights, run_training
from verl_on_cpu.tiny import make_inputs

from tests.integrations.verl.two_nodes import two_nodes

pytestmark = pytest.mark.exhaustive  # each starts a Ray cluster or two, which takes a minute

ON, OFF = "model_engine=prefix_grouper", "actor_rollout_ref.actor.strategy=fsdp2"
COMMON = ["data.max_response_length=12"]
PATIENCE = 600.0  # seconds without progress: a hang, on however busy a machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, prompt_tokens=(100, 300), prompts=40)
    return folder


def train(folder: Path, inputs: Path, *overrides: str, **options: Any) -> list[dict[str, float]]:
    return run_training(folder, [*COMMON, *overrides], inputs=inputs, patience=PATIENCE, **options)


def rewards(steps: list[dict[str, float]]) -> list[float]:
    return [step["critic/rewards/mean"] for step in steps]


def test_a_rank_on_each_of_two_nodes_sees_the_rewards_of_two_ranks_on_one(inputs, tmp_path):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    with two_nodes(tmp_path / "two") as address:
        apart = train(tmp_path / "two", inputs, ON, cluster=address, workers=1, steps=3)
    stock = train(tmp_path / "one", inputs, OFF, workers=2, steps=3)
    assert rewards(apart) == rewards(stock)
    assert [step["prefix_grouper/rows_per_group"] for step in apart] == [4, 4, 4]
    assert [step["actor/grad_norm"] for step in apart] == pytest.approx(
        [step["actor/grad_norm"] for step in stock], rel=1e-4
    )


def test_a_node_without_the_package_stops_the_training_and_is_named(inputs, tmp_path):
    with (
        two_nodes(tmp_path, second_lacks_the_package=True) as address,
        pytest.raises(TrainingError, match="No module named 'prefix_grouper_plugins'"),
    ):
        train(tmp_path, inputs, ON, cluster=address, workers=1)


def test_a_worker_that_is_killed_in_mid_step_ends_the_training_with_its_name(inputs, tmp_path):
    def kill(step: dict[str, float]) -> None:
        """Once the first step is logged, so in the second one."""
        workers = [
            process
            for process in psutil.process_iter()
            if "WorkerDict" in " ".join(command(process)) and str(tmp_path) in environment(process)
        ]
        assert workers, "no worker was found"
        workers[0].kill()

    def command(process: psutil.Process) -> list[str]:
        try:
            return process.cmdline()
        except psutil.Error:
            return []

    def environment(process: psutil.Process) -> str:
        """Of the daemon that started it: Ray's workers write their titles over their own."""
        try:
            return json.dumps([parent.environ() for parent in process.parents() if parent.pid > 1])
        except psutil.Error:
            return ""

    with pytest.raises(TrainingError, match=r"(?s)ActorDiedError.*It stopped with exit code"):
        train(tmp_path, inputs, ON, steps=4, on_step=kill)


SAVES = [
    "trainer.save_freq=2",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
]


class Killed(Exception):
    """Upon which `run_training` sends SIGKILL to every process of the training."""


@pytest.mark.parametrize("resumes_with", [ON, OFF], ids=["ours", "stock"])
def test_what_is_killed_and_resumed_learns_what_an_undisturbed_stock_training_learns(inputs, tmp_path, resumes_with):
    """Checkpoints are verl's own: from what our engine has written the stock one goes on, too."""
    expected = train(tmp_path / "whole", inputs, OFF, *SAVES, steps=4)

    def kill(step: dict[str, float]) -> None:
        if step["step"] == 3:
            time.sleep(random.Random(str(tmp_path)).random())
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "killed", inputs, ON, *SAVES, steps=4, on_step=kill)
    checkpoint = tmp_path / "killed" / "checkpoints" / "global_step_2"
    resumed = train(tmp_path / "resumed", inputs, resumes_with, *SAVES, steps=4, resume=checkpoint)
    assert rewards(resumed) == rewards(expected)[2:]
    weights, whole = final_weights(tmp_path / "resumed"), final_weights(tmp_path / "whole")
    assert max(float((weights[name] - whole[name]).abs().max()) for name in whole) < 1e-4
