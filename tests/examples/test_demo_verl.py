"""The demo of verl runs end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import comparison
import pytest

pytest.importorskip("verl")

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
