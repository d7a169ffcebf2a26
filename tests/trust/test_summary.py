"""The table of `make trust` counts what its parts print, and does not pass over one that failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.trust import summary
from tests.trust.summary import PARTS, PYTEST, Outcome, Part, fuzzed, hostile, killed, learned, of_pytest, run, watched

OUTPUTS = {
    fuzzed: (
        "                 equal   clear error   WRONG   seconds\nbatches            35             5       1       2.1\n"
        "  batches:7 qwen3: log-probs are off by 1.0e-03\nplans             400            20       0       0.3\n",
        {"random batches": (35, 5, 1), "random plans": (400, 20, 0)},
    ),
    killed: ("killed and resumed: 20, as stock 19, wrong 1\n3: weights differ", {"": (19, 0, 1)}),
    of_pytest: ("..F.\n1 failed, 3 passed, 2 skipped in 3.2s\n", {"": (3, 0, 1)}),
    hostile: (
        "convolution                        refused by the self-check\n.largest token   caught on the first batch\n"
        ".pointwise                         exact, as it should be\n.\n3 passed in 1.0s\n",
        {"": (1, 2, 0)},
    ),
    learned: ("wrote a and b\nas near to stock as another order of prompts: 3 of 4\n", {"": (3, 0, 1)}),
    watched: ("            memory   objects\nqwen3       1.001     1.001     1.518     0.949\n", {"": (1, 0, 0)}),
}


@pytest.mark.parametrize("figures", OUTPUTS)
def test_figures_are_read_from_what_a_part_prints(figures):
    output, expected = OUTPUTS[figures]
    assert figures(output) == expected
    assert figures("Traceback (most recent call last):\n") in ({}, {"": (0, 0, 0)})


def test_a_part_that_crashes_is_a_line_that_says_so(tmp_path):
    outcome = run(Part("nothing", "", None, fuzzed), "-c raise(SystemExit(3))", tmp_path)
    assert outcome.failed and outcome.lines()[0].startswith("| nothing | | | did not run |")
    assert "| 1 |" in Outcome(Part("long runs", "", None, watched), {"": (3, 0, 0)}, True, 60.0).lines()[0]


def test_a_part_that_runs_pytest_prints_the_line_that_is_read(tmp_path):
    (part,) = [part for part in PARTS if part.name == "security"]
    command = "tests/trust/test_summary.py::test_the_files_of_the_parts_exist"
    outcome = run(part, f"{PYTEST}{command}", tmp_path)
    assert not outcome.failed and outcome.figures == {"": (1, 0, 0)}


def test_the_exit_status_is_that_of_the_parts(tmp_path, monkeypatch, capsys):
    parts = [
        Part("right", "-c print('1_passed'.replace('_',chr(32)))", None, of_pytest),
        Part("wrong", "-c print('1_failed'.replace('_',chr(32)));raise(SystemExit(1))", None, of_pytest),
    ]
    for chosen, status in ((parts[:1], 0), (parts, 1)):
        monkeypatch.setattr(summary, "PARTS", chosen)
        monkeypatch.setattr(sys, "argv", ["summary"])
        assert summary.main() == status
    assert "| wrong | 0 | 0 | 1 |" in capsys.readouterr().out


def test_the_files_of_the_parts_exist():
    words = [word for part in PARTS for word in part.command.split() if word.startswith("tests/")]
    assert words and all((Path(summary.ROOT) / word).exists() for word in words)
