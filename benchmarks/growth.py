"""How does the cost of attention grow, forward and backward: with the group, and with the prompt?

    python benchmarks/growth.py                  CPU, one thread: G = 1 ... 64 at 1,024 tokens; 512 ... 8,192 at G = 4
    python benchmarks/growth.py --device cuda    G = 1 ... 64 at 8,192 tokens; 1k ... 128k at G = 8

Ours, each row on its own, and the published package, in turns, as in attention.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention import measure
from harness import RESULTS, use, write_csv

METHODS = ("rows", "ours:auto", "published")
GROUPS = (1, 2, 4, 8, 16, 32, 64)
SETTINGS = {  # prompt and response of the first sweep; prompts, response and group of the second
    "cpu": ((1024, 64), ((512, 1024, 2048, 4096, 8192), 64, 4)),
    "cuda": ((8192, 512), ((1024, 4096, 16384, 32768, 65536, 131072), 512, 8)),
}


def sweeps(device: str, groups: Sequence[int], prompts: Sequence[int] | None) -> list[tuple[str, tuple[int, int, int]]]:
    """Name of the sweep and lengths, case by case."""
    (prompt, response), (default_prompts, short, group) = SETTINGS[device]
    by_group = [("group", (prompt, response, g)) for g in groups]
    return by_group + [("prompt", (p, short, group)) for p in (default_prompts if prompts is None else prompts)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(SETTINGS))
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="of the first sweep")
    parser.add_argument("--prompts", type=int, nargs="+", help="of the second sweep")
    parser.add_argument("--repeats", type=int, default=2, help="turns at least (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="go on until this much time is over, for short cases"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    args.methods, args.memory = METHODS, []  # peak memory on CUDA only
    use(args.device)
    rows: list[dict[str, Any]] = []
    for sweep, sizes in sweeps(args.device, args.groups, args.prompts):
        rows += [{"sweep": sweep, **row} for row in measure(sizes, args)]
        write_csv(args.output or RESULTS / f"growth-{args.device}.csv", rows, args.device, "as attention.py")


if __name__ == "__main__":
    main(sys.argv[1:])
