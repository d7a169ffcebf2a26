"""The demo of verl runs end to end, and each of its steps is that of verl's own engine."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import comparison
import pytest

pytest.importorskip("verl")

from demo import GROUP_SIZE, QUICK_PROMPTS, demo_options
from verl_on_cpu import turns
from verl_on_cpu.run import run_training

from tests.integrations.verl.test_training import check, check_equal, check_terminal, rewards

DEMO = Path(__file__).parents[2] / "examples" / "verl" / "demo.py"
STEPS = 3
ULYSSES = [f"actor_rollout_ref.{part}.fsdp_config.ulysses_sequence_parallel_size=2" for part in ("actor", "ref")]
ULYSSES += ["actor_rollout_ref.model.use_remove_padding=True", "model_engine=prefix_grouper"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short demo leaves, and ``stdout``, what it prints."""
    folder = tmp_path_factory.mktemp("demo")
    # Without a timeout: the demo itself ends a training that makes no progress.
    command = [sys.executable, str(DEMO), "--quick", "--steps", str(STEPS), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (folder / "stdout").write_text(done.stdout)
    return folder


def steps_of(folder: Path, run: str) -> list[dict[str, float]]:
    """What verl logged in each step of one of the demo's trainings."""
    return [json.loads(line)["data"] for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_quick_demo_shares_prompts_and_ends_with_the_stock_weights(folder):
    printed = (folder / "stdout").read_text()
    logged = {name: float(value) for name, value in re.findall(r"Logged: prefix_grouper/(\w+) +([\d.]+)", printed)}
    assert logged["rows_per_group"] == GROUP_SIZE
    assert logged["token_ratio"] < 0.25
    assert logged["fallbacks"] == 0
    assert (folder / "demo.png").stat().st_size > 10_000
    steps = comparison.read(folder / "demo.csv").rows
    assert len(steps) == STEPS
    assert [step["shared_reward"] for step in steps] == [step["stock_reward"] for step in steps]


@pytest.mark.slow
def test_each_step_of_two_data_parallel_ranks_is_that_of_a_training_without_sharing(folder):
    """Dynamic batches, into which a group does not fit as a whole."""
    check_equal(steps_of(folder, "shared"), steps_of(folder, "stock"), GROUP_SIZE, STEPS)
    shared, stock = ((folder / run / "log.txt").read_text(errors="replace") for run in ("shared", "stock"))
    check_terminal(shared, stock, ["actor", "reference policy"], GROUP_SIZE)


@pytest.mark.exhaustive
def test_sequence_parallel_ranks_see_the_rewards_of_data_parallel_ones_without_sharing(folder, tmp_path):
    """verl's own Ulysses needs flash-attn: with sdpa its log-probs are wrong by 1e-4, so it is no reference."""
    options = [*demo_options(QUICK_PROMPTS), *ULYSSES]
    shared = run_training(tmp_path, options, inputs=folder / "inputs", workers=2, steps=STEPS)
    check(shared, GROUP_SIZE, STEPS)
    assert rewards(shared) == rewards(steps_of(folder, "stock"))


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
