"""Fill the figures of both demos into README.md and docs/verl.md, and draw their pictures, from benchmarks/results.

    make demo demo-verl                       # measures, into demo/
    python benchmarks/demos.py --take demo    # takes over what was measured, then tables and pictures
    python benchmarks/demos.py                # tables and pictures again

A test compares the tables with the files, so they cannot be out of date.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import IMAGES, RESULTS
from plot import fill

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "report"))
import comparison  # noqa: E402
from comparison import Comparison  # noqa: E402

UPDATE = ("update_seconds",)
VERL_UPDATE, VERL_LOG_PROBS = ("update_actor_seconds",), ("old_log_prob_seconds", "ref_seconds")
FILES = {"demo": ("demo-cpu.csv", "demo.csv"), "demo-verl": ("demo-verl-cpu.csv", "verl/demo.csv")}
PAGES = {"demo": "README.md", "demo-verl": "docs/verl.md"}


def table(found: Comparison) -> str:
    """Of TRL's demo."""
    lines = ["| The demo, on 2 CPU cores | shared | stock | |", "|---|---|---|---|"]
    lines.append(_seconds("Seconds for an update (old, reference and policy passes)", found, UPDATE))
    if "shared_step_seconds" in found.rows[0]:
        lines.append(_seconds("Seconds for a whole step, sampling included", found, ("step_seconds",)))
    tokens = [sum(found.values(run, "tokens")) / len(found.rows) for run in comparison.RUNS]
    lines.append(_row("Tokens forwarded for an update", tokens, ",.0f", "{:.1f} times fewer"))
    memory = [float(found.facts[f"{run}_peak_mib"]) for run in comparison.RUNS]
    lines.append(_row("Peak memory of the process, MiB", memory, ",.0f", "{:.1f} times less"))
    lines += [_rewards("Reward, first and last batches", found, 4), _difference(found)]
    return "\n".join(lines)


def verl_table(found: Comparison) -> str:
    """Of verl's."""
    lines = ["| The demo, two ranks on 2 CPU cores | shared | stock | |", "|---|---|---|---|"]
    lines.append(_seconds("Seconds for an update", found, VERL_UPDATE))
    lines.append(_seconds("Seconds for old and reference log-probs", found, VERL_LOG_PROBS))
    if "shared_step_seconds" in found.rows[0]:
        lines.append(_seconds("Seconds for a whole step, sampling included", found, ("step_seconds",)))
    ratios = found.values("shared", "token_ratio")
    lines.append(f"| Tokens forwarded | {100 * sum(ratios) / len(ratios):.1f} % | 100 % | |")
    lines.append(_rewards("Reward, first and last step", found, 1))
    if "difference" in found.facts:
        lines.append(_difference(found))
    return "\n".join(lines)


def _row(label: str, values: Sequence[float], form: str, gain: str) -> str:
    shared, stock = values
    return f"| {label} | {shared:{form}} | {stock:{form}} | {gain.format(stock / shared)} |"


def _seconds(label: str, found: Comparison, columns: Sequence[str]) -> str:
    return _row(label, [found.typical(run, *columns) for run in comparison.RUNS], ".2f", "{:.1f} times as fast")


def _rewards(label: str, found: Comparison, few: int) -> str:
    shared, stock = ("{:.3f} → {:.3f}".format(*found.first_and_last(run, few)) for run in comparison.RUNS)
    return f"| {label} | {shared} | {stock} | {'the same' if shared == stock else ''} |"


def _difference(found: Comparison) -> str:
    return f"| Largest difference of a trained weight (float32) | | | {found.facts['difference']} |"


def parts() -> dict[str, str]:
    """What lies between the marks of the pages."""
    made = {"demo": table, "demo-verl": verl_table}
    found = {}
    for name, (file, _) in FILES.items():
        comparison_of = comparison.read(RESULTS / file)
        facts, path = comparison_of.facts, Path("benchmarks/results") / file
        link = path if name == "demo" else f"../{path}"
        found[name] = (
            f"{made[name](comparison_of)}\n\n"
            f"From [{file}]({link}), `make {name}`, {facts['date']}: {facts['machine']}, torch {facts['torch']}; seconds are medians."
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="folder of the demos, whose files are taken over")
    options = parser.parse_args(arguments)
    if options.take:
        there = {
            RESULTS / kept: options.take / made for kept, made in FILES.values() if (options.take / made).is_file()
        }
        if not there:
            raise SystemExit(f"there is no demo.csv in {options.take}: run make demo first")
        for kept, made in there.items():
            shutil.copy(made, kept)
            print(f"took {made}")
    for name, columns, step, what in (
        ("demo", UPDATE, "update", "an update"),
        ("demo-verl", VERL_UPDATE + VERL_LOG_PROBS, "step", "old, reference and policy passes"),
    ):
        comparison.draw(IMAGES / f"{name}.png", comparison.read(RESULTS / FILES[name][0]), columns, step, what)
        page = ROOT / PAGES[name]
        page.write_text(fill(page.read_text(encoding="utf-8"), parts()), encoding="utf-8")
        print(f"filled in {page} and drew {IMAGES / name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
