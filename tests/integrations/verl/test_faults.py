"""Trainings through Ray that are killed: what remains of them is what remains of verl's own.

tests/trust/kill_and_resume.py does the same with TRL, at random moments.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

pytest.importorskip("verl")

from verl_on_cpu.run import TrainingError, final_weights, run_training
from verl_on_cpu.tiny import make_inputs

from tests.integrations.verl.test_training import OFF, ON, rewards

pytestmark = pytest.mark.exhaustive
STEPS, KILLED_AFTER = 4, 2
CHECKPOINTS = [f"actor_rollout_ref.actor.checkpoint.{kind}_contents" for kind in ("save", "load")]
SAVING = [f"{CHECKPOINTS[0]}=[model,optimizer,extra,hf_model]", f"{CHECKPOINTS[1]}=[model,optimizer,extra]"]


class Killed(Exception):
    """Raised in the middle of a training; the processes of the training get SIGKILL then."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, prompt_tokens=(100, 300), prompts=40)
    return folder


def test_a_killed_training_goes_on_from_its_checkpoint_as_verls_own_does(inputs, tmp_path):
    def kill(step: dict[str, float]) -> None:
        if step["step"] == KILLED_AFTER:
            raise Killed

    with pytest.raises(Killed):
        run_training(
            tmp_path / "killed", [*SAVING, *ON, "trainer.save_freq=1"], inputs=inputs, steps=STEPS, on_step=kill
        )
    checkpoint = tmp_path / "killed" / "checkpoints" / f"global_step_{KILLED_AFTER}"
    assert (checkpoint / "data.pt").is_file()
    resuming = [*SAVING, f"trainer.total_training_steps={STEPS}", "trainer.resume_mode=resume_path"]
    resuming += [f"trainer.resume_from_path={checkpoint}"]
    shared, stock = (
        run_training(tmp_path / name, [*resuming, *engine], inputs=inputs, steps=STEPS - KILLED_AFTER)
        for name, engine in (("shared", ON), ("stock", OFF))
    )
    assert [step["step"] for step in shared] == [3, 4]
    assert all(step["prefix_grouper/fallbacks"] == 0 for step in shared)
    assert rewards(shared) == rewards(stock)
    ours, verls = (final_weights(tmp_path / name) for name in ("shared", "stock"))
    assert max((ours[name] - verls[name]).abs().max().item() for name in verls) < 1e-5


@pytest.mark.parametrize("engine", [ON, OFF], ids=["shared", "stock"])
def test_a_worker_that_is_killed_ends_the_training_with_an_error(engine, inputs, tmp_path):
    """Neither hangs: verl's driver sees that a Ray actor has died."""

    def kill_a_worker(step: dict[str, float]) -> None:
        workers = [process for process in psutil.process_iter() if "ray::WorkerDict" in " ".join(command_of(process))]
        own = [process for process in workers if str(tmp_path) in process.cwd()]
        assert own, "a worker runs in the folder of its training"
        own[0].kill()

    with pytest.raises(TrainingError) as error:
        run_training(tmp_path, engine, inputs=inputs, steps=STEPS, on_step=kill_a_worker)
    assert "It stopped with exit code" in str(error.value)
    assert "ActorDiedError" in (tmp_path / "log.txt").read_text(errors="replace")


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # gone by now, or of another user
        return []
