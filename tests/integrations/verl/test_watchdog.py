"""A training on a busy machine may take its time; one that hangs is ended, however much it writes meanwhile."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("verl")

import verl_on_cpu.run
from verl_on_cpu.run import PATIENCE, TrainingError, wait_for


class Writer:
    """A process that writes a line every 0.3 s, and its clock: time passes while somebody sleeps, on any machine alike."""

    def __init__(self, log, line, count):
        self.log, self.line, self.count = log, line, count
        self.now, self.written, self.returncode = 0.0, 0, None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def poll(self):
        with self.log.open("a") as log:
            while self.written < min(self.now / 0.3, self.count):
                log.write(self.line(self.written) + "\n")
                self.written += 1
        self.returncode = 0 if self.written == self.count else None
        return self.returncode


@pytest.fixture
def waited(tmp_path, monkeypatch):
    """A function that waits 1.5 s for a new line of a process, and returns for how many seconds it waited in all."""

    def wait(line, count=10, **also):
        (log := tmp_path / "log.txt").write_text("")
        process = Writer(log, line, count)
        monkeypatch.setattr(verl_on_cpu.run, "time", process)
        wait_for(process, log, patience=1.5, **also)
        return process.now

    return wait


def test_a_process_that_writes_something_new_may_take_longer_than_our_patience(waited):
    assert waited(lambda i: "layer " + "x" * i) > 1.5


def test_a_process_that_repeats_itself_with_other_numbers_is_ended(waited):
    with pytest.raises(TrainingError, match=r"(?s)waiting for 3 of 8 .*There was no progress for 2 s"):
        waited(lambda i: f"waiting for {i} of 8 (0x{i}f)", count=1000)


def test_a_logged_step_is_progress(waited):
    assert waited(lambda i: "the same", also=lambda: True) > 1.5


def test_a_process_that_fails_is_named_with_its_log(tmp_path):
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "print(1 / 0)"], stdout=output, stderr=output)
    with pytest.raises(TrainingError, match=r"(?s)ZeroDivisionError.*It stopped with exit code 1"):
        wait_for(process, log, PATIENCE)


@pytest.mark.parametrize(("log", "starts"), [(verl_on_cpu.run.RAY_IS_LATE, 3), ("something else", 1)])
def test_a_training_starts_again_where_ray_was_late_and_only_there(tmp_path, monkeypatch, log, starts):
    started = []

    def run_once(folder, options, *others):
        started.append(options)
        (folder / "log.txt").write_text(f"first line\n{log}\n")
        raise TrainingError("it failed")

    monkeypatch.setattr(verl_on_cpu.run, "run_once", run_once)
    with pytest.raises(TrainingError, match="it failed"):
        verl_on_cpu.run.run_training(tmp_path, inputs=tmp_path)
    assert len(started) == starts
