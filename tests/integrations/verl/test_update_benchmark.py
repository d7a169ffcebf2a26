"""benchmarks/verl_update.py times what its table says, in a process of its own: verl keeps its platform for a whole process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

from harness import read_csv

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SMALL = """
import sys
sys.path.insert(0, sys.argv[1])
import verl_update
verl_update.LAYERS, verl_update.WIDTH = 2, 64
verl_update.SHARED = [verl_update.Sizes(40, 4, 1, 4, 1, False)]
verl_update.NOT_SHARED = [verl_update.Sizes(20, 8, 4, 1, 4, True)]
verl_update.main(["--repeats", "1", "--output", sys.argv[2]])
"""


@pytest.mark.exhaustive
def test_the_table_has_both_passes_of_what_is_shared_and_of_what_is_not(tmp_path):
    output = tmp_path / "update.csv"
    command = [sys.executable, "-c", SMALL, str(BENCHMARKS), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [(row["group"], row["pass"], float(row["token_ratio"])) for row in read_csv(output)]
    shared = (39 + 4 * 4) / (4 * 44)
    assert [(group, name) for group, name, _ in rows] == [(g, n) for g in "41" for n in ("update", "log-probs")]
    assert [ratio for *_, ratio in rows] == pytest.approx([shared, shared, 1, 1], rel=1e-2)
    assert all(float(row["times_as_fast"]) > 0 for row in read_csv(output))
