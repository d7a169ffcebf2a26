"""The three GPU commands run end to end in their dry mode, and a case that breaks costs the others nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gpu_check
import gpu_speed
import gpu_update
import isolated
import pytest
import torch
from harness import read_csv, read_facts

from prefix_grouper_plugins.attention.backends.merged_lse import cuda
from prefix_grouper_plugins.attention.backends.merged_lse.gathered import copied_backward, copied_forward
from prefix_grouper_plugins.forest import forest_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def threads() -> Any:
    """The scripts set the number of threads, which belongs to the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(output: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"dry_run": True, "minutes": 1.0, "only": "", "output": output, **changes})


def row_line(**row: Any) -> str:
    return "print(" + repr(isolated.ROW + json.dumps({"status": "ok", **row})) + ", flush=True)"


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(isolated.ROW)) for line in lines if line.startswith(isolated.ROW)]


def test_what_a_case_has_told_outlives_its_crash_and_the_others_run(tmp_path: Path) -> None:
    output = tmp_path / "results" / "run.csv"
    works = [
        isolated.Work("crashes", ["-c", f"{row_line(value=1)}; import os; print('on its way'); os.abort()"], 20.0),
        isolated.Work("raises", ["-c", "raise ValueError('CUDA error: an illegal memory access')"], 20.0),
        isolated.Work("hangs", ["-c", f"{row_line(value=2)}; import time; time.sleep(60)"], 1.0),
        isolated.Work("is wrong", ["-c", row_line(value=3, status="failed: differs")], 20.0),
        isolated.Work("is well", ["-c", row_line(value=4)], 20.0),
    ]
    assert isolated.run_all(works, options(output), ("value",), "a test") == 4
    found = [(row["case"], row["value"], row["status"]) for row in read_csv(output)]
    assert found == [
        ("crashes", "1", "ok"),
        ("crashes", "", "failed: exit status -6: on its way"),
        ("raises", "", "failed: exit status 1: ValueError: CUDA error: an illegal memory access"),
        ("hangs", "2", "ok"),
        ("hangs", "", "failed: stopped after 1 s; the last line was: "),
        ("is wrong", "3", "failed: differs"),
        ("is well", "4", "ok"),
    ]
    assert {"command", "machine", "torch", "date", "note"} <= read_facts(output).keys()
    assert "on its way" in output.with_suffix(".log").read_text()


def test_a_run_keeps_to_its_minutes_and_says_what_it_has_left_out(tmp_path: Path) -> None:
    works = [isolated.Work("long", ["-c", "raise SystemExit('it was started')"], 90.0)]
    assert isolated.run_all(works, options(tmp_path / "run.csv", minutes=0.1), ("value",), "a test") == 0
    assert read_csv(tmp_path / "run.csv")[0]["status"] == "left out: the 0.1 minutes of this run were over"


def test_a_row_with_a_column_of_its_own_and_an_unknown_case_are_errors(tmp_path: Path) -> None:
    table = isolated.Table(tmp_path / "run.csv", ("value",), "cpu", "a test")
    with pytest.raises(ValueError, match="columns \\['other'\\], the table has case, value, status"):
        table.add({"other": 1})
    with pytest.raises(SystemExit, match="--only 'nothing': no case is called so"):
        isolated.run_all([isolated.Work("a", [], 1.0)], options(tmp_path / "a.csv", only="nothing"), (), "a test")


def test_the_check_runs_from_the_command_to_the_table(tmp_path: Path) -> None:
    output = tmp_path / "check.csv"
    arguments = ["--dry-run", "--only", "short prompt/merged_lse", "--output", str(output)]
    assert gpu_check.main(arguments) == 0
    (row,) = read_csv(output)
    assert (row["case"], row["finite"], row["status"]) == ("short prompt/merged_lse", "True", "ok")


def test_every_case_of_the_check_is_right_with_emulated_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [work.name for work in gpu_check.works(gpu_check.Machine(dry=True)) if work.name != "tests"]
    assert len(cases) == 22
    for case in cases:
        gpu_check.main(["--dry-run", "--case", case])
    for case, row in zip(cases, rows_of(capsys), strict=True):
        assert (
            row["status"] == "ok" if case.endswith("merged_lse") else row["status"].startswith("left out: the Triton")
        )


@pytest.mark.parametrize("dry", [True, False])
def test_the_cases_of_the_check_go_through_every_pass(dry: bool) -> None:
    """Copies, one level merged in place, with gaps and without, and several levels in float32; forward and backward."""
    machine = gpu_check.Machine(dry)
    machine.device = "cpu"
    passes = set()
    for name, make in machine.layouts().items():
        layout = make()
        forest = forest_of(layout.segments, layout.num_given)
        for way, choose in (("forward", copied_forward), ("backward", copied_backward)):
            copied = choose(forest, *machine.heads(name))
            levels = cuda.varlen_calls(forest, torch.device("cpu"), copied=copied)[1:]
            gaps = any(call.queries.gaps is not None for call in levels)
            passes |= {(way, min(len(levels), 2), gaps), (way, "copies" if copied else "no copies")}
    for way in ("forward", "backward"):
        assert {(way, 0, False), (way, 1, False), (way, 1, True), (way, 2, True)} <= passes
        assert {(way, "copies"), (way, "no copies")} <= passes


@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_the_check_fails_where_a_kernel_is_wrong_or_leaves_memory_as_it_was(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gpu_check.shared_prefix_attention

    def faulty(*tensors: Any, **rest: Any) -> torch.Tensor:
        out = real(*tensors, **rest)
        return out * 1.01 if fault == "wrong" else torch.where(torch.rand(len(out), 1, 1) < 0.1, torch.nan, out)

    monkeypatch.setattr(gpu_check, "shared_prefix_attention", faulty)
    gpu_check.main(["--dry-run", "--case", "three groups/merged_lse"])
    (row,) = rows_of(capsys)
    assert row["status"].startswith("failed: differences") and row["finite"] is (fault == "wrong")


def test_every_case_of_the_speed_run_ends_with_figures_or_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for work in gpu_speed.works(dry=True):
        gpu_speed.main(["--dry-run", "--case", work.name])
    rows = rows_of(capsys)
    assert all(row.keys() <= {*gpu_speed.COLUMNS, "status"} for row in rows)
    ours = [row for row in rows if row.get("method") == "ours:auto"]
    assert [(row["prompt"], row["status"]) for row in ours] == [(40, "ok"), (6, "ok")]
    assert all(float(row["share_of_bound"]) > 0 for row in ours)
    reasons = {row["status"] for row in rows if row["status"] != "ok"}
    assert any(reason.startswith("left out: the Triton kernels need") for reason in reasons)
    assert any("FA3" in reason for reason in reasons)


@pytest.mark.parametrize("has_trl", [False, True])
def test_every_case_of_the_update_run_ends_with_figures_or_a_reason(
    has_trl: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock comes last, where our hooks must not be gone."""
    found = gpu_update.actor_update.importlib.util.find_spec
    if has_trl:
        pytest.importorskip("trl")
    else:
        monkeypatch.setattr(
            gpu_update.actor_update.importlib.util, "find_spec", lambda name: None if name == "trl" else found(name)
        )
    for update in gpu_update.TINY:
        gpu_update.main(["--dry-run", "--case", update.name])
    rows = rows_of(capsys)
    assert all(row.keys() <= {*gpu_update.COLUMNS, "status"} for row in rows)
    ours, stock = [("rows", "ok"), ("ours", "ok")], ("stock", "ok" if has_trl else "left out: trl not installed")
    assert [(row["way"], row["status"]) for row in rows] == ([*ours, stock] if has_trl else [stock, *ours]) * 2


@pytest.mark.parametrize("target", ["gpu-check", "gpu-speed", "gpu-update"])
def test_make_runs_the_script_and_the_docs_name_it(target: str) -> None:
    assert f"benchmarks/{target.replace('-', '_')}.py" in (ROOT / "Makefile").read_text()
    assert f"make {target}" in (ROOT / "docs" / "benchmarks.md").read_text()
