"""Everything that is tried to break the package, and one table of what came out.

    python -m tests.trust.summary            all of it, two parts at a time
    python -m tests.trust.summary --short    a small share of each, to see that it runs

Each part is a command of its own, so one that crashes is a line of the table, not the end of the run. Their logs are in the
folder that is printed first. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERL = Path(".venvs") / "verl" / "bin" / "python"  # verl lives in an environment of its own
HEAD = "| Part | equal | clear error | WRONG | minutes |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Part:
    """One command of the run.

    Attributes:
        name: as the table calls it.
        command: arguments of Python, with ``{folder}`` for the folder of the logs.
        short: the same for ``--short``; None to leave the part out there.
        figures: from the output, what was equal, a clear error and wrong, for each line of the table by its name.
        in_verl: whether it runs in verl's environment.
    """

    name: str
    command: str
    short: str | None
    figures: Callable[[str], dict[str, tuple[int, int, int]]]
    in_verl: bool = False


def fuzzed(output: str) -> dict[str, tuple[int, int, int]]:
    """Lines such as ``batches    435   65   0   12.3``."""
    lines = re.findall(r"^(\w+) +(\d+) +(\d+) +(\d+) +[\d.]+$", output, re.M)
    return {f"random {name}": (int(equal), int(error), int(wrong)) for name, equal, error, wrong in lines}


def killed(output: str) -> dict[str, tuple[int, int, int]]:
    found = re.findall(r"^killed and resumed: (\d+), as stock (\d+), wrong (\d+)", output, re.M)
    return {"": (int(found[0][1]), 0, int(found[0][2]))} if found else {}


def of_pytest(output: str) -> dict[str, tuple[int, int, int]]:
    """The last line of pytest."""
    passed, failed = (re.findall(rf"(\d+) {word}", output) for word in ("passed", "(?:failed|errors?)"))
    return {"": (int(passed[-1]) if passed else 0, 0, sum(map(int, failed)))} if passed or failed else {}


def hostile(output: str) -> dict[str, tuple[int, int, int]]:
    """Lines such as ``convolution      refused by the self-check``; the last line is pytest's."""
    refused, caught, exact = (
        len(re.findall(f" {words}$", output, re.M))
        for words in ("refused by the self-check", "caught on the first batch", "exact, as it should be")
    )
    return {"": (exact, refused + caught, of_pytest(output).get("", (0, 0, 1))[2])} if refused else {}


def watched(output: str) -> dict[str, tuple[int, int, int]]:
    """One line for each long run; the exit code tells of growth."""
    return {"": (len(re.findall(r"^\w+.*?(?: +\d+\.\d{3}){4}$", output, re.M)), 0, 0)}


def learned(output: str) -> dict[str, tuple[int, int, int]]:
    """The last line: tasks and dtypes whose rewards are as near to stock's as they should be, of all."""
    found = re.findall(r"^as near to stock .*: (\d+) of (\d+)$", output, re.M)
    return {"": (int(found[0][0]), 0, int(found[0][1]) - int(found[0][0]))} if found else {}


TRIALS = "--batches {} --forests {} --plans {} --arguments {}"
TRUST = "-m tests.trust."
PYTEST = "-m pytest "
LEARNING = "benchmarks/learning.py --output {folder}/learning.csv --picture {folder}/learning.png"
PARTS = [
    Part("learning: reward curves, by task and dtype", LEARNING, f"{LEARNING} --tasks copy --dtypes float32 --seeds 1 --steps 20", learned),
    Part("random inputs", f"{TRUST}fuzz {TRIALS.format(20000, 2000, 20000, 20000)}", f"{TRUST}fuzz {TRIALS.format(50, 20, 50, 50)}", fuzzed),
    Part("long runs", f"{TRUST}long_run --steps 2000", f"{TRUST}long_run --steps 100", watched),
    Part("killed and resumed, TRL", f"{TRUST}kill_and_resume --kills 20", f"{TRUST}kill_and_resume --kills 1", killed),
    Part("verl on Ray: two nodes", f"{PYTEST}-m exhaustive tests/integrations/verl/test_two_nodes.py", None, of_pytest, in_verl=True),
    Part("verl on Ray: killed and resumed, killed workers", f"{PYTEST}-m exhaustive tests/integrations/verl/test_faults.py", None, of_pytest, in_verl=True),
    Part("verl on Ray: trainings as stock", f"{PYTEST}tests/integrations/verl/test_training.py tests/examples/test_demo_verl.py", None, of_pytest, in_verl=True),
    Part("TRL in several processes", f"{PYTEST}tests/integrations/trl/test_distributed.py", None, of_pytest),
    Part("hostile model classes", f"{PYTEST}-s tests/modeling/test_hostile_classes.py", None, hostile),
    Part("faults, TRL", f"{PYTEST}tests/integrations/trl/test_faults.py", None, of_pytest),
    Part("verify, TRL", f"{PYTEST}tests/integrations/trl/test_verify.py tests/modeling/self_check/test_layers.py", None, of_pytest),
    Part("security", f"{PYTEST}tests/trust/test_security.py", f"{PYTEST}tests/trust/test_security.py", of_pytest),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    part: Part
    figures: dict[str, tuple[int, int, int]]
    failed: bool
    seconds: float

    def lines(self) -> list[str]:
        """Of the table."""
        minutes = f"{self.seconds / 60:.1f}"
        if not self.figures:
            return [f"| {self.part.name} | | | did not run | {minutes} |"]
        found = []
        for number, (name, (equal, error, wrong)) in enumerate(self.figures.items()):
            wrong = max(wrong, int(self.failed and len(self.figures) == 1))
            found.append(
                f"| {name or self.part.name} | {equal} | {error} | {wrong} | {minutes if not number else ''} |"
            )
        return found


def run(part: Part, command: str, folder: Path) -> Outcome:
    """Run one part to its end."""
    python = str(ROOT / VERL) if part.in_verl else sys.executable
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = folder / f"{re.sub('[^a-z]+', '-', part.name.lower())}.txt"
    start = time.monotonic()
    with log.open("w") as output:
        code = subprocess.run(
            [python, *command.format(folder=folder).split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
        ).returncode
    return Outcome(part, part.figures(log.read_text(errors="replace")), code != 0, time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a small share of each part")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts whose names hold one of these words")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trust-"))
    print(f"logs: {folder}", flush=True)
    chosen = [part for part in PARTS if not options.only or any(word in part.name for word in options.only)]
    commands = {part: part.short if options.short else part.command for part in chosen}
    if not (ROOT / VERL).exists():
        left_out = [part.name for part in commands if part.in_verl]
        print(f"left out, since {VERL} is not there (make setup): {', '.join(left_out)}")
        commands = {part: command for part, command in commands.items() if not part.in_verl}
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, part, command, folder) for part, command in commands.items() if command]
        outcomes = [future.result() for future in futures]
    print(HEAD)
    print(*(line for outcome in outcomes for line in outcome.lines()), sep="\n")
    print(f"\n{(time.monotonic() - start) / 60:.1f} minutes in all")
    return int(any(outcome.failed or not outcome.figures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
