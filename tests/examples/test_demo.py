"""The demo runs end to end, and the script that it runs is an ordinary TRL script."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import comparison
import pytest

pytest.importorskip("trl")

from tests.processes import Fork, run_in_fork

EXAMPLES = Path(__file__).parents[2] / "examples" / "trl"


@pytest.mark.slow
def test_the_quick_demo_shares_prompts_and_ends_with_the_stock_weights(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("trl_demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trl_demo", demo)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "start", lambda command, log: Fork(command, demo.environment(), log))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--quick", "--output", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    logged = {name: float(value) for name, value in re.findall(r"Logged: (\w+) +([\d.]+)", printed)}
    assert logged["rows_per_group"] == 8
    assert logged["token_ratio"] < 0.5
    assert logged["fallbacks"] == 0
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    steps = comparison.read(tmp_path / "demo.csv").rows
    assert len(steps) == 4
    assert all(float(step["shared_tokens"]) < 0.5 * float(step["stock_tokens"]) for step in steps)
    assert [step["shared_reward"] for step in steps] == [step["stock_reward"] for step in steps]


def test_the_script_of_the_demo_knows_nothing_of_sharing():
    assert "prefix" not in (EXAMPLES / "grpo_passages.py").read_text().lower()


def test_the_text_of_the_demo_stands_beside_its_licence():
    assert len((EXAMPLES / "data" / "python_reference.txt").read_text()) > 100_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (EXAMPLES / "data" / "LICENSE-PSF.txt").read_text()


@pytest.mark.parametrize("name", ["demo.py", "make_tiny_model.py", "grpo_passages.py"])
def test_help_suffices(name):
    done = run_in_fork(str(EXAMPLES / name), "--help", cwd=EXAMPLES)
    assert done.returncode == 0
    assert "usage" in done.stdout
