"""Cases of a GPU run, each in a process of its own, with a table that is on disk after every row.

A case that crashes, hangs or runs out of memory gets a row that says so and costs the others nothing: a fault on the GPU
ends the process that made it, and no other. The whole run keeps to a number of minutes: what does not fit in is left
out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from harness import RESULTS, write_csv

ROOT = Path(__file__).parents[1]
ROW = "ROW "  # how a line of a case's output begins that is a row of the table, as JSON
OK = "ok"


class Work(NamedTuple):
    """One case.

    Attributes:
        name: what the table calls it.
        command: arguments of the Python interpreter.
        seconds: after which it is stopped.
    """

    name: str
    command: Sequence[str]
    seconds: float


def emit(**row: Any) -> None:
    """In the process of a case: hand one row of the table to `run_all`. ``status`` is "ok" where it is not given."""
    print(ROW + json.dumps({"status": OK, **row}), flush=True)


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """The options that all of these runs have."""
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does the script run?")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default: 9)")
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own


class Table:
    """The rows so far, as a CSV file that is written anew with each of them."""

    def __init__(self, path: Path, columns: Sequence[str], device: str, note: str) -> None:
        self.path, self.columns, self.device, self.note = path, ("case", *columns, "status"), device, note
        self.rows: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the row has a column that the table has not.
        """
        if unknown := row.keys() - set(self.columns):
            raise ValueError(f"a row has the columns {sorted(unknown)}, the table has {', '.join(self.columns)}")
        self.rows.append({column: row.get(column, "") for column in self.columns})
        write_csv(self.path, self.rows, self.device, self.note, quiet=True)


def run_all(works: Sequence[Work], args: argparse.Namespace, columns: Sequence[str], note: str) -> int:
    """Run the cases one after the other; returns how many have failed.

    Args:
        works: the cases, most important first.
        args: those of `add_options`. What the cases print goes to a file beside the table that ends in ``.log``.
        columns: of the table, besides the case's name and status.
        note: how to read the table.

    Raises:
        SystemExit: no case is called so.
    """
    output, minutes = args.output, args.minutes
    works = [work for work in works if args.only in work.name]
    if not works:
        raise SystemExit(f"--only {args.only!r}: no case is called so")
    table = Table(output, columns, "cpu" if args.dry_run else "cuda", note)
    ends = time.monotonic() + 60 * minutes
    failed = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".log").open("w", encoding="utf-8") as log:
        for number, work in enumerate(works, 1):
            left = ends - time.monotonic()
            _say(log, f"[{number}/{len(works)}] {work.name} ({left:.0f} s left)")
            if left < min(20.0, work.seconds):
                table.add({"case": work.name, "status": f"left out: the {minutes:g} minutes of this run were over"})
                continue
            failed += not _run(work, table, log, min(left, work.seconds))
    statuses = [row["status"] for row in table.rows]
    left_out = sum(status.startswith("left out") for status in statuses)
    print(
        f"{statuses.count(OK)} rows, {left_out} left out, {failed} of {len(works)} cases failed: {output}", flush=True
    )
    return failed


def _run(work: Work, table: Table, log: TextIO, seconds: float) -> bool:
    """Whether the case ended well; if not, the table says how it ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()])}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *work.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    last, well = "", True
    assert process.stdout is not None
    for line in process.stdout:
        line = line.rstrip("\n")
        if line.startswith(ROW):
            row = json.loads(line.removeprefix(ROW))
            table.add({"case": work.name, **row})
            well = well and not row["status"].startswith("failed")
            print(line, file=log, flush=True)
        elif line:
            _say(log, f"    {line}")
            last = line.strip()
    code = process.wait()
    timer.cancel()
    if stopped.is_set():
        table.add(
            {"case": work.name, "status": f"failed: stopped after {seconds:.0f} s; the last line was: {last[:200]}"}
        )
    elif code:
        table.add({"case": work.name, "status": f"failed: exit status {code}: {last[:300]}"})
    _say(log, f"    {time.monotonic() - started:.1f} s")
    return well and not code and not stopped.is_set()


def _paths() -> list[str]:
    before = os.environ.get("PYTHONPATH")
    return [before] if before else []


def _say(log: TextIO, line: str) -> None:
    for file in (sys.stdout, log):
        print(line, file=file, flush=True)
