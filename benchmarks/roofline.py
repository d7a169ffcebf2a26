"""What share of the FLOP bound can one attention layer of `merged_lse` reach on a GPU, by a model of bytes and passes?

    python benchmarks/roofline.py              needs no GPU; fills in the table of docs/cuda.md too

A model, not a measurement: the flash kernels run at the rates below whatever their shape, passes beside them at the bandwidth
below, and nothing overlaps. The rates are guesses after published figures of FlashAttention-2 and of an H100; `make gpu-speed`
measures. Bytes are those of `merged_lse.gathered.Traffic`, by which the backend itself chooses, forward and backward apart.
`layer` adds the matrix products of the layer's projections and its MLP, over the tokens that are forwarded. Groups whose
prompts begin alike have a second table: what copying each level of the tree for itself saves.
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
from prefix_grouper_plugins.attention.backends.merged_lse.gathered import (
    NONE,
    Levels,
    copied_backward,
    copied_forward,
    traffic,
)
from prefix_grouper_plugins.attention.backends.merged_lse.rectangles import rectangles
from prefix_grouper_plugins.forest import Forest, forest_of, visible_pairs, visible_pairs_of_rows

PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"
CASES = ((8192, 1024, 8), (16384, 1024, 16), (1024, 256, 8), (256, 512, 8), (64, 512, 8))
# Groups whose prompts begin alike: tokens of the beginning, of the rest of a prompt, and of a response; groups, responses each.
ALIKE = ((24, 1024, 256, 4, 8), (24, 256, 512, 4, 8), (24, 4096, 512, 4, 8), (4096, 64, 256, 4, 8))
ALIKE_COLUMNS = ("beginning", "prompt", "response", "groups", "group")
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


def passes_seconds(forest: Forest, forward: Levels, backward: Levels) -> float:
    """Of the passes beside the flash kernels where these levels are copied. Copies that both need are saved in between."""
    heads = HEADS, KV_HEADS
    moved = traffic(forest, forward).forward(*heads)
    moved += traffic(forest, backward).backward(*heads, saved=forward == backward)
    return moved * HEAD_DIM / BANDWIDTH


def row_of_alike(beginning: int, prompt: int, response: int, groups: int, group: int) -> dict[str, Any]:
    """One line of the second table: milliseconds of the passes beside the flash kernels."""
    lengths, parents = [beginning], [-1]
    for _ in range(groups):
        parents += [0, *[len(parents)] * group]
        lengths += [prompt, *[response] * group]
    forest = forest_of(PrefixLayout.from_segments(lengths, parents).segments)
    apart = forest_of(PrefixLayout.from_groups([beginning + prompt] * groups, [[response] * group] * groups).segments)
    return {
        **dict(zip(ALIKE_COLUMNS, (beginning, prompt, response, groups, group), strict=True)),
        "forward": _copied_in_words(copied_forward(forest, HEADS, KV_HEADS)),
        "backward": _copied_in_words(copied_backward(forest, HEADS, KV_HEADS)),
        "all_or_nothing_ms": number(passes_seconds(forest, *all_or_nothing(forest)) * 1e3, 3),
        "passes_ms": number(passes_seconds(forest, *chosen(forest)) * 1e3, 3),
        "apart_ms": number(passes_seconds(apart, *chosen(apart)) * 1e3, 3),
        "saved_ms": number(6 * WEIGHTS / MATRICES * (apart.num_tokens - forest.num_tokens) * 1e3, 3),
    }


def chosen(forest: Forest) -> tuple[Levels, Levels]:
    """The levels that the backend copies, forward and backward."""
    return copied_forward(forest, HEADS, KV_HEADS), copied_backward(forest, HEADS, KV_HEADS)


def all_or_nothing(forest: Forest) -> tuple[Levels, Levels]:
    """The cheaper of copying every level and of copying none, forward and backward."""
    ways = (NONE, frozenset(forest.level.tolist()))
    forward = min(ways, key=lambda way: traffic(forest, way).forward(HEADS, KV_HEADS))
    few = [way for way in ways if traffic(forest, way).copied <= forest.num_tokens]
    return forward, min(few, key=lambda way: traffic(forest, way).backward(HEADS, KV_HEADS))


def _copied_in_words(copied: Levels) -> str:
    return " and ".join(name for level, name in enumerate(("beginning", "prompts")) if level in copied) or "nothing"


def row_of(prompt: int, response: int, group: int) -> dict[str, Any]:
    """One line of the table."""
    layout = PrefixLayout.from_groups([prompt], [[response] * group])
    forest = forest_of(layout.segments)
    ways = chosen(forest)
    flash = sum(flash_seconds(visible_pairs(layout.segments)))
    rows = sum(flash_seconds(visible_pairs_of_rows(layout.row_lengths)))
    counts, beside = traffic(forest), passes_seconds(forest, *ways)
    idle = 0.0 if ways[1] else idle_seconds(counts.reached, counts.shared)
    ours, before = flash + idle + beside, before_seconds(layout)
    matrices = 6 * WEIGHTS / MATRICES
    return {
        **dict(zip(("prompt", "response", "group"), (prompt, response, group), strict=True)),
        "forward": "copied" if ways[0] else "merged",
        "backward": "copied" if ways[1] else "merged",
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


def table_of_alike(rows: Sequence[dict[str, Any]]) -> str:
    """The second table of docs/cuda.md."""
    lines = [
        "| Beginning, rest of the prompt, response; groups, G | Copied: forward, backward | Passes, ms: all levels alike → each for itself "
        "| Passes where the beginning is not shared, ms | Matrix products that sharing it saves, ms |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['beginning']}, {row['prompt']}, {row['response']}; {row['groups']}, {row['group']} "
            f"| {row['forward']}, {row['backward']} | {row['all_or_nothing_ms']} → {row['passes_ms']} "
            f"| {row['apart_ms']} | {row['saved_ms']} |"
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
    alike = [row_of_alike(*case) for case in ALIKE]
    write_csv(
        args.output.with_name(f"{args.output.stem}-alike.csv"),
        alike,
        "cpu",
        "a model of one layer whose groups' prompts begin alike, 28:4 heads of 128, bfloat16, on an H100; not run on a GPU",
    )
    page = args.page.read_text(encoding="utf-8")
    for name, text in (("roofline", table(rows)), ("alike", table_of_alike(alike))):
        print(text)
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        filled = f"{marks[0]}\n\n{text}\n\n{marks[1]}"
        page = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _, filled=filled: filled, page, flags=re.DOTALL)
    args.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
