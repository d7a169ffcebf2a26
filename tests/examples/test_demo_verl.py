"""The demo of verl runs end to end."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import comparison
import pytest

pytest.importorskip("verl")

from verl_on_cpu import turns

DEMO = Path(__file__).parents[2] / "examples" / "verl" / "demo.py"


@pytest.mark.slow
def test_the_quick_demo_shares_prompts_and_ends_with_the_stock_weights(tmp_path):
    # Without a timeout: the demo itself ends a training that makes no progress.
    done = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    logged = {name: float(value) for name, value in re.findall(r"Logged: prefix_grouper/(\w+) +([\d.]+)", done.stdout)}
    assert logged["rows_per_group"] == 8
    assert logged["token_ratio"] < 0.25
    assert logged["fallbacks"] == 0
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    steps = comparison.read(tmp_path / "demo.csv").rows
    assert len(steps) == 2
    assert [step["shared_reward"] for step in steps] == [step["stock_reward"] for step in steps]


def test_two_trainings_run_their_steps_in_turns(tmp_path, monkeypatch):
    """The first one's set-up waits for the other's, and the last step of neither for anything that never comes."""
    monkeypatch.setattr(turns, "POLL_SECONDS", 0.0)
    running, order = set(), []

    async def training(name: str, other: str, is_first: bool) -> None:
        own = turns.Turns(str(tmp_path), name, other, is_first, steps=3)
        await asyncio.sleep(0.02 if is_first else 0.05)  # the set-up
        await own.end_step(0)
        for step in (1, 2, 3):
            assert not running
            running.add(name)
            await asyncio.sleep(0.01)
            running.remove(name)
            order.append((step, name))
            await own.end_step(step)

    async def both() -> None:
        await asyncio.wait_for(asyncio.gather(training("a", "b", True), training("b", "a", False)), timeout=60)

    asyncio.run(both())
    assert order == [(step, name) for step in (1, 2, 3) for name in ("a", "b")]


def test_a_training_knows_of_its_turns_by_its_environment(monkeypatch):
    monkeypatch.delenv(turns.VARIABLE, raising=False)
    assert turns.Turns.of_this_process() is None
    mine = turns.Turns("folder", "shared", "stock", True, 4)
    for name, value in mine.environment.items():
        monkeypatch.setenv(name, value)
    assert turns.Turns.of_this_process() == mine
