"""benchmarks/trees.py: its counts are those of the tree, and the package and the docs quote what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import trees
from harness import RESULTS, read_csv

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.attention.levels import MEASURED, NOT_MEASURED, least_level

ROOT = Path(__file__).parents[2]

LEVELS, ROLLOUTS = RESULTS / "trees-levels-cpu.csv", RESULTS / "trees-rollouts-cpu.csv"


def test_the_package_quotes_the_levels_that_were_measured():
    table = read_csv(LEVELS)
    found = {(name, "cpu"): trees.least_that_pays(table, name) for name in {row["backend"] for row in table}}
    assert found == MEASURED


def test_the_longest_of_several_backends_counts_and_what_was_not_measured_is_careful():
    assert least_level(["merged_lse", "blockwise"], "cpu") == max(MEASURED.values())
    assert least_level(["blockwise"], "cpu") == MEASURED["blockwise", "cpu"]
    assert least_level(["merged_lse"], "cuda") == least_level(["state forking"], "cpu") == NOT_MEASURED
    assert least_level([], "cpu") == NOT_MEASURED


def test_only_lengths_from_which_on_all_are_faster_pay():
    table = [
        {"backend": "b", "level_tokens": n, "tree_times_as_fast": ratio}
        for n, ratio in ((1, 1.2), (2, 0.9), (4, 1.06), (8, 1.3))
    ]
    assert trees.least_that_pays(table, "b") == 4
    assert trees.least_that_pays(table[:2], "b") is None


def test_the_docs_quote_the_rollouts_that_were_measured():
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    for row in read_csv(ROLLOUTS):
        figures = [row[name] for name in list(row) if name != "row_tokens"]
        assert f"| {' | '.join(figures)} |" in text


def test_the_docs_quote_the_packing_that_was_measured():
    *_, longest = read_csv(RESULTS / "trees-packing-cpu.csv")
    text = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())
    seconds = longest["trl_seconds"], longest["seconds"]
    assert "takes {} seconds to lay out 64 rollouts of 4096 tokens, ours {} ".format(*seconds) in text


def test_tool_use_costs_its_tree_and_one_token_for_each_branch_beyond_the_first():
    rows, prompt = trees.tool_use(4, 3, 20, 5, 4)
    layout = PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=1)
    # 3 + 9 + 27 + 81 turns, 3 + 9 + 27 results; each of 1 + 3 + 9 + 27 forks has two more branches; 81 last tokens.
    assert len(rows) == 81
    assert layout.num_tokens == 20 + 5 * 120 + 4 * 39 + 2 * 40 - 81


def test_trls_tree_has_the_same_tokens_and_each_rows_last_one():
    rows, prompt = trees.tool_use(3, 2, 20, 5, 4)
    layout = PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=1)
    packed = trees.trl_row(rows).pack()
    assert len(packed["input_ids"]) == layout.num_tokens + len(rows)
    assert min(trees.packing_seconds(rows, prompt, 1)) > 0


def test_help_shows_how_to_run_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trees.main(["--help"])
    assert "python benchmarks/trees.py levels" in capsys.readouterr().out
