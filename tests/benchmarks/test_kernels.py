"""What a layer of `merged_lse` launches on CUDA: the kernels besides the flash kernels are few, and none gets an empty entry."""

from __future__ import annotations

from pathlib import Path

import host_time
import layer_kernels
import pytest
import roofline
from harness import read_csv


@pytest.mark.parametrize(
    ("case", "forward", "backward", "empty"),
    [
        ("one group", 3, 12, 0),  # two flash calls and a merge; two backwards, the level's lse, one for three additions
        ("four groups", 3, 14, 6),
        ("a part of a group, its prompt given", 3, 12, 0),
        ("a short prompt, its keys gathered", 3, 7, 0),  # K and V gathered, and their gradients' copies summed
        ("one response, its prompt given", 1, 5, 0),
        ("rows that share nothing", 1, 5, 0),
    ],
)
def test_kernels_of_a_layer_are_counted(case: str, forward: int, backward: int, empty: int) -> None:
    of_forward, of_backward, entries = layer_kernels.count(layer_kernels.CASES[case])
    assert (of_forward.total(), of_backward.total(), entries) == (forward, backward, empty)


def test_the_roofline_in_the_docs_is_the_one_that_the_script_makes(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "cuda.md"
    copy = tmp_path / "cuda.md"
    copy.write_text(page.read_text())
    roofline.main(["--page", str(copy), "--output", str(tmp_path / "roofline.csv")])
    assert copy.read_text() == page.read_text()
    assert "| 8192, 1024, 8 | merged, merged |" in page.read_text()


def test_a_micro_batch_waits_for_the_device_once_and_host_times_are_written_down(tmp_path: Path) -> None:
    host_time.main(["--rounds", "1", "--output", str(tmp_path / "host.csv")])
    rows = read_csv(tmp_path / "host.csv")
    waits = [row for row in rows if row["waits"]]
    assert [row["waits"] for row in waits] == ["1"]
    assert "ids and masks" in waits[0]["where"]  # before the forward
    layers = [row for row in rows if not row["waits"]]
    assert len(layers) == len(host_time.LAYOUTS)
    assert all(float(row["attention_us"]) > float(row["machinery_us"]) > 0 for row in layers)
    assert all(0 < float(row["ours_calls"]) <= 140 for row in layers)  # each costs a layer some 0.3 us
