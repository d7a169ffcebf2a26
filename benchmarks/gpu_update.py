"""What does one actor update cost on this GPU, rows against ours? `make gpu-update`.

    python benchmarks/gpu_update.py
    python benchmarks/gpu_update.py --dry-run      tiny, on the CPU: does the script run?

The updates of actor_update.py: forward and backward with log-probabilities, gradient checkpointing on, random weights in
bfloat16, peak memory above the weights. First the shapes of Qwen2.5, then the settings of which others have published
figures: Unsloth's (a LoRA of Qwen3-4B, responses of 256, groups of 8; the length of the prompt is not given, 1,024 here)
and DualKV's (28 responses to a prompt of 16,384; the model is not given, the 0.5B shape here). Each case runs in a process
of its own. TRL's own way runs where TRL is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

import actor_update
from harness import use
from isolated import Work, add_options, emit, run_all

COLUMNS = (
    "model", "training", "prompt", "response", "group", "way", "seconds", "times_as_fast_as_rows", "flop_bound", "peak_mib"
)  # fmt: skip
WAYS = ("rows", "ours", "stock")
NOTE = "gradient checkpointing; prompt and responses of equal lengths, so nothing is padded; flop_bound: of the whole update"


class Update(NamedTuple):
    """One update: ``training`` is "full" or "lora", ``sizes`` are prompt, response and group."""

    model: str
    training: str
    sizes: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.model} {self.training} {','.join(map(str, self.sizes))}"


UPDATES = (
    Update("qwen2.5-7b", "full", (8192, 1024, 8)),
    Update("qwen2.5-0.5b", "full", (1024, 256, 8)),
    Update("qwen2.5-0.5b", "lora", (1024, 256, 8)),
    Update("qwen2.5-0.5b", "full", (256, 512, 8)),
    Update("qwen2.5-0.5b", "lora", (256, 512, 8)),
    Update("qwen3-4b", "lora", (1024, 256, 8)),
    Update("qwen2.5-0.5b", "full", (16384, 2048, 28)),
)
TINY = (Update("tiny", "full", (24, 6, 3)), Update("tiny-qwen3", "lora", (24, 6, 3)))


def works(dry: bool) -> list[Work]:
    """All cases, in the order in which they run."""
    script = ["benchmarks/gpu_update.py", *(["--dry-run"] if dry else []), "--case"]
    return [Work(update.name, [*script, update.name], 200.0) for update in (TINY if dry else UPDATES)]


def run_case(name: str, dry: bool) -> None:
    """One case, in the process that is its own."""
    (update,) = (update for update in (*UPDATES, *TINY) if update.name == name)
    lora = update.training == "lora"
    facts = {"model": update.model, "training": update.training}
    facts |= dict(zip(("prompt", "response", "group"), map(str, update.sizes), strict=True))
    ways = []
    for way in WAYS:
        if (reason := actor_update.why_not(way, lora)) is None:
            ways.append(way)
        else:
            emit(**facts, way=way, status=f"left out: {reason}")
    if not ways:
        return
    options = ["--device", "cpu" if dry else "cuda", "--models", update.model, "--ways", *ways]
    options += ["--cases", ",".join(map(str, update.sizes)), "--training", update.training]
    options += ["--repeats", "1", "--seconds", "0", "--no-memory"] if dry else ["--repeats", "2", "--seconds", "5"]
    for row in actor_update.measure(update.model, lora, actor_update.parse_arguments(options)):
        emit(**row, status="out of memory" if row["peak_mib"] == "out of memory" else "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "gpu-update.csv")
    args = parser.parse_args(arguments)
    use("cpu" if args.dry_run else "cuda")
    if args.case:
        run_case(args.case, args.dry_run)
        return 0
    return int(run_all(works(args.dry_run), args, COLUMNS, NOTE) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
