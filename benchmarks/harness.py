"""What the benchmarks share: CSV files that say where they come from, and peak memory of one step."""

from __future__ import annotations

import csv
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prefix_grouper_plugins.bench import Step, describe_machine

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def use(device: str) -> None:
    """Get ready to measure on ``device``: one thread on the CPU, and the same random inputs each time."""
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch {torch.__version__} sees no GPU on this machine")
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)


def write_csv(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    device: str,
    note: str = "",
    command: str | None = None,
    quiet: bool = False,
) -> None:
    """Write ``rows``, headed by lines with the command, the machine, the versions, the date and how to read them."""
    rows = list(rows)
    facts = {"command": command or " ".join(["python", *sys.argv]), **describe_machine(device)} | (
        {"note": note} if note else {}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # a process that ends in between leaves the file of before
    with part.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
    if not quiet:
        print(f"wrote {path}", flush=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_facts(path: Path) -> dict[str, str]:
    """The heading of a file of `write_csv`."""
    lines = [line[2:].rstrip("\n") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return dict(line.split(": ", 1) for line in lines)


def number(value: float, digits: int = 4) -> str:
    """A measured number with as many digits as it deserves."""
    return f"{value:.{digits}g}"


def peak_mib(make: Callable[[], Step], device: str) -> float:
    """MiB that making a step's inputs and running it once takes at most, above what the process holds before.

    On the CPU call it in a fresh process (`in_a_fresh_process`): memory that an earlier step left to the allocator would
    be used again unseen.
    """
    if device != "cpu":
        gc.collect()  # what a step that ran out of memory left in cycles would count as held before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        make()()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _reset_peak()
    make()()
    return (_peak() - before) / 2**20


def in_a_fresh_process(arguments: list[str], environment: Mapping[str, str] | None = None) -> Any:
    """What ``python arguments``, a script of this folder, prints as its last line, read as JSON.

    Args:
        arguments: the script and its own arguments.
        environment: variables in addition to those of this process.
    """
    script, *rest = arguments
    command = [sys.executable, str(Path(__file__).parent / script), *rest]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def in_a_fork(measure: Callable[[], float]) -> float:
    """What ``measure`` returns in a fork of this process: as fresh as this one, without the seconds for its imports.

    Call it before this process has run any step. For CPU runs: a fork cannot use a GPU that its parent has touched.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(measure()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as found:
        text = found.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("a measurement in a fork of this process failed, see above")
    return float(json.loads(text))


def _reset_peak() -> int:
    """Bytes in use, from which the peak is counted on, where the kernel lets a process reset its own (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 2**10
