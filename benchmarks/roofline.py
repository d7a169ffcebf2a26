"""What share of the FLOP bound can one attention layer of `merged_lse` reach on a GPU, by a model of bytes and passes?

    python benchmarks/roofline.py              needs no GPU; fills in the table of docs/cuda.md too

A model, not a measurement: the flash kernels run at the rates below whatever their shape, passes beside them at the bandwidth
below, and nothing overlaps. The rates are guesses after published figures of FlashAttention-2 and of an H100; `make gpu-speed`
measures. Bytes are those of `merged_lse.gathered.Traffic`, by which the backend itself chooses, forward and backward apart.
`layer` adds the matrix products of the layer's projections and its MLP, over the tokens that are forwarded.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, number, write_csv

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.attention.backends.merged_lse.gathered import gathers_backward, gathers_forward, traffic
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import rectangles
from prefix_grouper_plugins.forest import forest_of, visible_pairs, visible_pairs_of_rows

PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"
CASES = ((8192, 1024, 8), (16384, 1024, 16), (1024, 256, 8), (256, 512, 8), (64, 512, 8))
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-7B
FORWARD, BACKWARD = 3.7e14, 2.8e14  # FLOP/s of causal FlashAttention-2 in bfloat16
BANDWIDTH = 2.6e12  # bytes/s, reads and writes together
WEIGHTS, MATRICES = 233e6, 6e14  # of a layer's projections and MLP; FLOP/s of large matrix products
MULTIPROCESSORS, KEY_BLOCK = 132, 128  # one program of the backward each: of a block of keys and a query head


def flash_seconds(pairs: float) -> tuple[float, float]:
    """Forward and backward of the flash kernels over so many visible pairs."""
    flops = 4 * HEADS * HEAD_DIM * pairs
    return flops / FORWARD, 2.5 * flops / BACKWARD


def idle_seconds(queries: int, keys: int) -> float:
    """Of the backward of a rectangle, whose programs are few where keys are: what idle multiprocessors add."""
    programs = -(-keys // KEY_BLOCK) * HEADS
    busy = programs / (-(-programs // MULTIPROCESSORS) * MULTIPROCESSORS) * keys / (-(-keys // KEY_BLOCK) * KEY_BLOCK)
    return flash_seconds(queries * keys)[1] * (1 / busy - 1)


def passes_before(tokens: int, reached: int, shared: int) -> int:
    """Bytes of the passes as this package had them first, for one element of a head.

    Outputs and gradients were widened to float32, summed there and narrowed again, and the level's call got the whole row.
    """
    forward = HEADS * (12 * tokens + 10 * reached)
    sums = HEADS * (12 * tokens + 10 * reached) + KV_HEADS * (24 * tokens + 20 * shared)
    return forward + sums + HEADS * 22 * tokens


def row_of(prompt: int, response: int, group: int) -> dict[str, Any]:
    """One line of the table."""
    layout = PrefixLayout.from_groups([prompt], [[response] * group])
    forest = forest_of(layout.segments)
    counts, heads = traffic(forest), (HEADS, KV_HEADS)
    ways = gathers_forward(forest, *heads), gathers_backward(forest, *heads)
    flash = sum(flash_seconds(visible_pairs(layout.segments)))
    rows = sum(flash_seconds(visible_pairs_of_rows(layout.row_lengths)))
    passes = [
        counts.gathered_forward(KV_HEADS) if ways[0] else counts.merged_forward(HEADS),
        counts.gathered_backward(*heads) if ways[1] else counts.merged_backward(*heads),
    ]
    beside = sum(passes) * HEAD_DIM / BANDWIDTH
    idle = 0.0 if ways[1] else idle_seconds(counts.reached, counts.shared)
    ours, before = flash + idle + beside, before_seconds(layout)
    matrices = 6 * WEIGHTS / MATRICES
    return {
        **dict(zip(("prompt", "response", "group"), (prompt, response, group), strict=True)),
        "forward": "gathered" if ways[0] else "merged",
        "backward": "gathered" if ways[1] else "merged",
        "flash_ms": number(flash * 1e3),
        "passes_ms": number(beside * 1e3),
        "idle_ms": number(idle * 1e3),
        "before_ms": number(before * 1e3),
        "all_ms": number(ours * 1e3),
        "rows_ms": number(rows * 1e3),
        "share_of_bound_before": number(flash / before, 2),
        "share_of_bound": number(flash / ours, 2),
        "times_as_fast_as_rows_before": number(rows / before, 3),
        "times_as_fast_as_rows": number(rows / ours, 3),
        "bound": number(rows / flash, 3),
        "layer": number((rows + matrices * layout.num_row_tokens) / (ours + matrices * layout.num_tokens), 3),
    }


def before_seconds(layout: PrefixLayout) -> float:
    """Of a layer as this package had it first: a triangle for each segment, and rectangles beside all of them."""
    forest = forest_of(layout.segments)
    reached = sum(r.q1 - r.q0 for r in rectangles(forest))
    shared = sum(r.k1 - r.k0 for r in rectangles(forest))
    passes = passes_before(forest.num_tokens, reached, shared) * HEAD_DIM / BANDWIDTH
    return sum(flash_seconds(visible_pairs(layout.segments))) + idle_seconds(reached, shared) + passes


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/cuda.md."""
    lines = [
        "| Prompt, response, G | Forward, backward | Flash kernels, ms | Passes, idle, ms | All, ms: before → now "
        "| Share of the bound: before → now | Times as fast as rows: before → now (bound) | A whole layer |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['prompt']}, {row['response']}, {row['group']} | {row['forward']}, {row['backward']} "
            f"| {row['flash_ms']} | {row['passes_ms']}, {row['idle_ms']} | {row['before_ms']} → {row['all_ms']} "
            f"| {row['share_of_bound_before']} → {row['share_of_bound']} "
            f"| {row['times_as_fast_as_rows_before']} → {row['times_as_fast_as_rows']} ({row['bound']}) | {row['layer']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "roofline.csv")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    rows = [row_of(*case) for case in CASES]
    write_csv(
        args.output, rows, "cpu", "a model of one layer, 28:4 heads of 128, bfloat16, on an H100; not run on a GPU"
    )
    text = table(rows)
    print(text)
    page = args.page.read_text(encoding="utf-8")
    marks = "<!-- roofline -->", "<!-- /roofline -->"
    filled = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: f"{marks[0]}\n\n{text}\n\n{marks[1]}", page, flags=re.DOTALL)
    args.page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
