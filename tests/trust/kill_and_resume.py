"""A training that is killed in the middle and resumed learns what the stock trainer learns, killed and resumed alike.

    python -m tests.trust.kill_and_resume --kills 20

A child process trains a tiny model and saves every step. It gets SIGKILL at a random moment after a random step; another
child resumes from the newest whole checkpoint and finishes. The stock trainer then resumes from a copy of the same
checkpoint, and their final weights are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.integrations.trl.training import largest_difference, make_trainer, use_float64_head

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
TOLERANCE = 1e-12  # both trainers compute in float64, the loss head too
QUIET = 300  # seconds without a new checkpoint after which a child counts as stuck


class Waits(TrainerCallback):
    """After each step."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        time.sleep(self._seconds)


def child(folder: Path, *, shared: bool, wait: float) -> None:
    """Train in ``folder``, from its newest whole checkpoint on if there is one, and save the weights in the end."""
    use_float64_head(pytest.MonkeyPatch())  # for as long as this process lives
    trainer = make_trainer(
        str(folder / "model"),
        shared=shared,
        output_dir=folder / "run",
        max_steps=STEPS,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    checkpoint = newest_checkpoint(folder / "run")
    torch.manual_seed(5)
    if wait:  # room for the parent to strike between two steps
        trainer.add_callback(Waits(wait))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.save(weights, folder / "weights.pt")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that was written to its end: transformers writes ``trainer_state.json`` last."""
    whole = [path for path in run.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def start(folder: Path, *, shared: bool, wait: float = 0.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.trust.kill_and_resume", "--child", str(folder), "--wait", str(wait)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        command + ["--shared"] * shared, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log
    )


def finish(folder: Path, *, shared: bool) -> dict[str, torch.Tensor]:
    """Run a child to its end; its weights."""
    code = start(folder, shared=shared).wait()
    if code:
        raise RuntimeError(f"exit code {code}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return torch.load(folder / "weights.pt", weights_only=True)


def kill_once(source: random.Random, folder: Path) -> str | None:
    """One training, killed and resumed. None if it learned what stock learned, else what went wrong."""
    tiny.saved_model(folder / "model")
    victim = start(folder, shared=True, wait=0.2)
    last = source.randint(1, STEPS - 2)
    seen, since = 0, time.monotonic()
    while victim.poll() is None:
        checkpoint = newest_checkpoint(folder / "run")
        number = int(checkpoint.name.split("-")[1]) if checkpoint else 0
        if number != seen:
            seen, since = number, time.monotonic()
        if number >= last:
            time.sleep(source.random() * 0.4)
            break
        if time.monotonic() - since > QUIET:
            victim.kill()
            return f"no checkpoint for {QUIET} s:\n{(folder / 'log.txt').read_text()[-2000:]}"
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        victim.send_signal(signal.SIGKILL)
    victim.wait()
    stock = folder / "stock"
    shutil.copytree(folder / "model", stock / "model")
    newest = newest_checkpoint(folder / "run")
    assert newest is not None
    shutil.copytree(newest, stock / "run" / newest.name)
    difference = largest_difference(finish(folder, shared=True), finish(stock, shared=False))
    return None if difference < TOLERANCE else f"killed after {newest.name}: weights differ by {difference:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill a training at random, resume it, compare with the stock trainer."
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, shared=options.shared, wait=options.wait)
        return 0
    wrong = []
    for kill in range(options.kills):
        with tempfile.TemporaryDirectory() as folder:
            fault = kill_once(random.Random(kill), Path(folder))
        wrong += [f"{kill}: {fault}"] if fault else []
    print(f"killed and resumed: {options.kills}, as stock {options.kills - len(wrong)}, wrong {len(wrong)}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
