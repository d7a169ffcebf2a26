"""A training on a busy machine may take its time; one that hangs is ended, however much it writes meanwhile."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("verl")

from verl_on_cpu.run import TrainingError, end_family, wait_for

WRITES = "import time\nfor i in range({count}):\n    print({text}, flush=True)\n    time.sleep(0.3)\n"


def waited(tmp_path, text: str, count: int = 10, **also):
    log = tmp_path / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", WRITES.format(count=count, text=text)], stdout=output)
    try:
        wait_for(process, log, patience=1.5, **also)
    finally:
        end_family(process)
        process.wait()


def test_a_process_that_writes_something_new_may_take_longer_than_our_patience(tmp_path):
    waited(tmp_path, "'layer ' + 'x' * i")


def test_a_process_that_repeats_itself_with_other_numbers_is_ended(tmp_path):
    with pytest.raises(TrainingError, match=r"(?s)waiting for 3 of 8 .*There was no progress for 2 s"):
        waited(tmp_path, "f'waiting for {i} of 8 (0x{i}f)'", count=1000)


def test_a_logged_step_is_progress(tmp_path):
    waited(tmp_path, "'the same'", also=lambda: True)


def test_a_process_that_fails_is_told_of_with_its_log(tmp_path):
    with pytest.raises(TrainingError, match="It stopped with exit code 1"):
        waited(tmp_path, "1 / 0")
