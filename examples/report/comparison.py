"""Figures of a shared and a stock training side by side: the CSV file that both demos write, and its picture.

`benchmarks/demos.py` makes the tables and pictures of the README and the docs from such files.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

RUNS = ("shared", "stock")
DARK, PALE = "#17375e", "#f4b183"


@dataclass
class Comparison:
    """What a CSV file of a demo holds.

    Attributes:
        facts: the lines at its head: command, machine, versions, and figures of whole runs (`shared_peak_mib`).
        rows: one for each step, with columns such as `shared_reward` and `stock_update_seconds`.
    """

    facts: dict[str, str]
    rows: list[dict[str, str]]

    def values(self, run: str, column: str) -> list[float]:
        """A figure of each step that has it."""
        return [float(row[f"{run}_{column}"]) for row in self.rows if row.get(f"{run}_{column}")]

    def seconds(self, run: str, columns: Sequence[str]) -> list[float]:
        """Seconds of each step, summed over `columns`."""
        return [sum(values) for values in zip(*(self.values(run, column) for column in columns), strict=True)]

    def rewards(self, run: str) -> dict[int, float]:
        """Reward by step, for the steps that sampled."""
        column = f"{run}_reward"
        return {int(row["step"]): float(row[column]) for row in self.rows if row[column]}

    def first_and_last(self, run: str, few: int = 4) -> tuple[float, float]:
        """Mean reward of the first and of the last `few` batches of completions, or of fewer where there are fewer."""
        return first_and_last(list(self.rewards(run).values()), few)

    def typical(self, run: str, *columns: str) -> float:
        """Median over the steps of the sum of `columns`."""
        return median(self.seconds(run, columns))


def first_and_last(rewards: Sequence[float], few: int = 4) -> tuple[float, float]:
    """Mean of the first and of the last `few`, or of fewer where there are fewer."""
    few = max(1, min(few, len(rewards) // 2))
    return mean(rewards[:few]), mean(rewards[-few:])


def side_by_side(
    runs: Mapping[str, Sequence[Mapping[str, object]]], columns: Mapping[str, str]
) -> list[dict[str, object]]:
    """The rows of a file: one for each step, with the `columns` of both runs, whose values are names in their records."""
    return [
        {"step": both[0]["step"]}
        | {f"{run}_{c}": step.get(key, "") for run, step in zip(runs, both, strict=True) for c, key in columns.items()}
        for both in zip(*runs.values(), strict=True)
    ]


def write(path: Path, facts: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a file that `read` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> Comparison:
    """What `write` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return Comparison(facts, list(csv.DictReader(line for line in lines if not line.startswith("# "))))


def draw(path: Path, found: Comparison, seconds: Sequence[str], step: str, what: str) -> None:
    """Draw both reward curves, one on top of the other, and the seconds of both runs.

    Args:
        path: of the picture.
        found: the figures.
        seconds: the columns that make up the time.
        step: what a step is called, such as "update".
        what: what the time is of.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(1.7, 1), layout="constrained")
    for run, style in (
        ("stock", {"color": PALE, "linewidth": 9, "solid_capstyle": "round"}),
        ("shared", {"color": DARK, "linewidth": 1.6, "marker": "o", "markersize": 4}),
    ):
        rewards = found.rewards(run)
        left.plot(list(rewards), list(rewards.values()), label=run, **style)
    left.set(title="Same training", xlabel=step, ylabel="reward (share of full marks)")
    left.set_ylim(bottom=0)
    left.grid(axis="y", color="#e3e3e3")
    left.set_axisbelow(True)
    left.legend(frameon=False, loc="lower right")

    for place, (run, color) in enumerate(zip(RUNS, (DARK, PALE), strict=True)):
        times = found.seconds(run, seconds)
        right.bar(place, median(times), color=color, width=0.55, label=run)
        right.text(place + 0.32, median(times), f"{median(times):.2f} s", va="center", ha="left", fontweight="bold")
        right.scatter([place] * len(times), times, s=12, color="white", edgecolor="#555555", linewidth=0.6, zorder=3)
    gain = found.typical("stock", *seconds) / found.typical("shared", *seconds)
    right.set(title=f"Update {gain:.1f} times as fast", ylabel=f"seconds for {what}", xlim=(-0.5, 1.8))
    right.set_xticks((0, 1), RUNS)
    right.set_xlabel(f"bar: median, dots: {step}s")
    figure.savefig(path, dpi=150)
    plt.close(figure)
