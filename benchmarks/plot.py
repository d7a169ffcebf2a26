"""Draw the pictures of docs/benchmarks.md, and fill in its tables and that of docs/recipes.md, from benchmarks/results.

    python benchmarks/plot.py

Files that are not there (a GPU's) are passed over. Figures stand between `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import IMAGES, RESULTS, read_csv, read_facts

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RECIPES = PAGE.with_name("recipes.md")
COLOURS = {"rows": "#f4b183", "published": "#8aa1bf", "ours": "#17375e"}
NAMES = {
    "rows": "each row on its own",
    "published": "published package",
    "ours:auto": "ours",
    "ours:merged_lse": "ours, merged_lse",
    "ours:blockwise": "ours, blockwise",
    "ours:triton": "ours, triton",
    "ours:flex": "ours, flex",
    "gathered": "gathered keys and values",
    "gathered_flash": "gathered, one varlen flash call",
    "dense_mask": "dense mask",
    "tree_attention": "TRL's tree attention",
    "stock": "TRL, padded",
    "ours": "ours",
}
DID_NOT_RUN = "did not run"  # it took more memory than there is
Row = dict[str, str]


def new_figure(columns: int, rows: int = 1, width: float = 4.0, height: float = 3.4) -> tuple[Any, Any]:
    """A figure in the style of the demo's picture."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False)


def finish(axes: Any, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(axis="y", color="#e3e3e3")
    axes.set_axisbelow(True)


def colour(method: str) -> str:
    return COLOURS.get("ours" if method.startswith("ours") else method, "#bdbdbd")


def save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=80)
    plt.close(figure)
    print(f"drew {IMAGES / name}")


def draw_attention(rows: list[Row], device: str) -> None:
    """For each case how many times as fast as rows each method is, with the bound as a line."""
    cases = list(dict.fromkeys((row["prompt"], row["response"], row["group"]) for row in rows))
    columns = min(len(cases), 3)
    figure, axes = new_figure(columns, -(-len(cases) // columns), height=2.6)
    for ax in axes.flat[len(cases) :]:
        ax.axis("off")
    for place, (ax, case) in enumerate(zip(axes.flat, cases, strict=False)):
        bars = [r for r in rows if (r["prompt"], r["response"], r["group"]) == case]
        for line, row in enumerate(bars):
            value = float(row["times_as_fast_as_rows"])
            ax.barh(-line, value, color=colour(row["method"]), height=0.65)
            ax.text(0 if math.isnan(value) else value, -line, f" {ratio_of(row)}", va="center", fontsize=9)
        ax.axvline(float(bars[0]["pair_ratio"]), color="#c00000", linewidth=1, linestyle="--")
        ax.set_yticks(
            [-i for i in range(len(bars))], [NAMES[row["method"]] for row in bars] if place % columns == 0 else []
        )
        ax.set(title=f"{case[0]} + {case[2]} x {case[1]}", xlabel="times as fast as rows")
        ax.margins(x=0.18)
    figure.suptitle("Attention, forward and backward: prompt + group x response; dashed: ratio of visible pairs")
    save(figure, f"attention-{device}.png")


def draw_growth(rows: list[Row], device: str) -> None:
    """Seconds over the size of the group and the length of the prompt."""
    figure, axes = new_figure(2)
    titles = {"group": "responses in the group", "prompt": "tokens of the prompt"}
    for ax, sweep in zip(axes[0], titles, strict=True):
        chosen = [row for row in rows if row["sweep"] == sweep]
        for method in dict.fromkeys(row["method"] for row in chosen):
            line = [row for row in chosen if row["method"] == method]
            xs, ys = [int(row[sweep]) for row in line], [float(row["seconds"]) for row in line]
            ax.plot(xs, ys, marker="o", markersize=4, color=colour(method), label=NAMES[method])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        fixed = "group" if sweep == "prompt" else "prompt"
        what = f"{chosen[0]['prompt']} prompt tokens" if fixed == "prompt" else f"{chosen[0]['group']} responses"
        finish(ax, xlabel=titles[sweep], ylabel="seconds", title=f"{what}, responses of {chosen[0]['response']}")
        ax.set_xticks(xs, [str(x) for x in xs])
    axes[0][0].legend(frameon=False)
    save(figure, f"growth-{device}.png")


def draw_flops(rows: list[Row]) -> None:
    """The paper's figures: FLOPs over the prefix length, by ratio; a column for each size of the group."""
    draw_grid(rows, "tflops", "PFLOP of a training step", 1e-3, "paper-flops.png")


def draw_memory(rows: list[Row]) -> None:
    """The same for what autograd keeps."""
    draw_grid(rows, "kept_gib", "GiB kept for the backward", 1, "paper-memory.png")


def draw_grid(rows: list[Row], column: str, label: str, factor: float, name: str) -> None:
    groups = sorted({int(row["group"]) for row in rows})
    ratios = [ratio for ratio in ("0.5", "2", "8", "32") if any(float(row["ratio"]) == float(ratio) for row in rows)]
    figure, axes = new_figure(len(groups), len(ratios), 3.2, 2.4)
    for line, ratio in zip(axes, ratios, strict=True):
        for ax, group in zip(line, groups, strict=True):
            cells = [r for r in rows if float(r["ratio"]) == float(ratio) and int(r["group"]) == group]
            xs = [int(cell["prefix"]) for cell in cells]
            for way, width, style in (("rows", 2, "-"), ("published", 5, "-"), ("ours", 1.6, "-")):
                ys = [float(cell[f"{way}_{column}"]) * factor for cell in cells]
                ax.plot(xs, ys, style, linewidth=width, marker="o", markersize=4, color=COLOURS[way], label=NAMES[way])
            ax.set_xticks(xs, [f"{x // 1024}k" for x in xs])
            ax.set_ylim(bottom=0)
            finish(ax, title=f"G = {group}, ratio {ratio}")
        line[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("prefix length; ratio: prefix/response")
    axes[0][0].legend(frameon=False)
    save(figure, name)


def draw_updates(rows: list[Row], device: str) -> None:
    """Seconds of one update for each model, training and case."""
    places = list(dict.fromkeys((r["model"], r["training"], r["prompt"], r["response"], r["group"]) for r in rows))
    figure, axes = new_figure(min(len(places), 6), -(-len(places) // 6))
    for ax, place in zip(axes.flat, places, strict=False):
        chosen = [r for r in rows if (r["model"], r["training"], r["prompt"], r["response"], r["group"]) == place]
        for i, row in enumerate(chosen):
            seconds = float(row["seconds"])
            ax.bar(i, seconds, color=colour(row["way"]), width=0.6)
            height, text = (0, DID_NOT_RUN) if math.isnan(seconds) else (seconds, f"{seconds:.2f}")
            ax.text(i, height, text, ha="center", va="bottom", fontsize=9)
        ax.set_xticks(range(len(chosen)), [row["way"] for row in chosen])
        finish(ax, title="{} {}, {}+{}x{}".format(*place[:3], place[4], place[3]), ylabel="seconds")
    save(figure, f"actor-update-{device}.png")


def draw_reuse(rows: list[Row]) -> None:
    """Seconds of an update by the rows of a micro-batch, and its peak memory as the group grows."""
    colours = {"stock": "#f4b183", "packed": "#8aa1bf", "reused": "#17375e"}
    groups = sorted({int(row["group"]) for row in rows})
    fixed = [row for row in rows if row["group"] == "8" and int(row["prompt"]) >= 512]
    lengths = list(dict.fromkeys((row["prompt"], row["response"]) for row in fixed))
    figure, axes = new_figure(len(lengths) + 1)
    for ax, length in zip(axes[0], lengths, strict=False):
        chosen = [row for row in fixed if (row["prompt"], row["response"]) == length]
        sizes = sorted({int(row["rows"]) for row in chosen})
        for shift, way in enumerate(colours):
            cells = {int(row["rows"]): float(row["seconds"]) for row in chosen if row["way"] == way}
            places = [place + 0.27 * (shift - 1) for place in range(len(sizes))]
            ax.bar(places, [cells[size] for size in sizes], 0.25, color=colours[way], label=way)
        ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        finish(ax, xlabel="rows of a micro-batch, of 8 in the group", ylabel="seconds of an update",
               title=f"{length[0]} prompt tokens, responses of {length[1]}")  # fmt: skip
    ax = axes[0][-1]
    for way, colour_of_way in colours.items():
        cells = {int(r["group"]): float(r["peak_mib"]) for r in rows if r["way"] == way and r["rows"] == "1"
                 and (r["prompt"], r["response"]) == lengths[0]}  # fmt: skip
        ax.plot(
            sorted(cells), [cells[g] for g in sorted(cells)], marker="o", markersize=4, color=colour_of_way, label=way
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(groups, [str(group) for group in groups])
    ax.set_ylim(bottom=0)
    finish(ax, xlabel="responses in the group", ylabel="peak MiB", title="micro-batches of 1 row")
    axes[0][0].set_ylim(top=1.3 * axes[0][0].get_ylim()[1])  # room for the legend
    axes[0][0].legend(frameon=False)
    save(figure, "prompt-reuse-cpu.png")


# ---------------------------------------------------------------------------------------------------------------- page


def reuse_table(rows: list[Row]) -> str:
    """One line for each size, seconds and memory of each way."""
    ways = ("stock", "packed", "reused")
    lines = ["| Prompt, response, G | Rows of a micro-batch | " + " | ".join(ways) + " | Times as fast | Bound |"]
    lines.append("|---" * 7 + "|")
    for size in dict.fromkeys((r["prompt"], r["response"], r["group"], r["rows"]) for r in rows):
        found = {r["way"]: r for r in rows if (r["prompt"], r["response"], r["group"], r["rows"]) == size}
        cells = [f"{found[w]['seconds']} s, {float(found[w]['peak_mib']):.0f} MiB" if w in found else "-" for w in ways]
        ratios = (found["reused"].get(name) or "-" for name in ("times_as_fast", "bound"))
        lines.append(f"| {', '.join(size[:3])} | {size[3]} | {' | '.join([*cells, *ratios])} |")
    return "\n".join(lines)


def attention_table(rows: list[Row]) -> str:
    """Times as fast as rows, and MiB: a line for each case, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(r["prompt"], r["response"], r["group"], r["method"]): r for r in rows}
    lines = [
        "| Prompt, response, G | Bound | " + " | ".join(NAMES[m] for m in methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for case in dict.fromkeys((r["prompt"], r["response"], r["group"]) for r in rows):
        found = [cells.get((*case, method)) for method in methods]
        bound = float(next(row for row in found if row)["pair_ratio"])
        values = ["-" if row is None else f"{ratio_of(row)}{memory_of(row)}" for row in found]
        lines.append(f"| {', '.join(case)} | {bound:.2f} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def ratio_of(row: Row) -> str:
    """Times as fast as rows; nothing where the rows did not run."""
    if row["seconds"] == "nan":
        return DID_NOT_RUN
    value = float(row["times_as_fast_as_rows"])
    return "-" if math.isnan(value) else f"{value:.2f}"


def memory_of(row: Row) -> str:
    return "" if row["peak_mib"] == "nan" else f" ({float(row['peak_mib']):.0f} MiB)"


def flops_table(rows: list[Row]) -> str:
    """Ratio of the FLOPs of rows and of ours, by ratio and prefix, for each G."""
    prefixes, groups = (sorted({int(row[name]) for row in rows}) for name in ("prefix", "group"))
    cells = {(float(r["ratio"]), int(r["prefix"]), int(r["group"])): r for r in rows}
    lines = [
        f"| Prefix/response | {' | '.join(f'prefix {p}' for p in prefixes)} |",
        "|---|" + "---|" * len(prefixes),
    ]
    for ratio in sorted({float(row["ratio"]) for row in rows}):
        values = [
            " / ".join(
                f"{float(cells[ratio, p, g]['rows_tflops']) / float(cells[ratio, p, g]['ours_tflops']):.2f}"
                for g in groups
            )
            for p in prefixes
        ]
        lines.append(f"| {ratio:g} | {' | '.join(values)} |")
    return "\n".join(lines)


def table_of(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    head = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *("| " + " | ".join(cells) + " |" for cells in lines)])


def update_table(rows: list[Row]) -> str:
    """One line for each update and way."""
    columns = ["Model", "Training", "Prompt, response, G", "Way", "Seconds", "Times as fast as rows", "Peak MiB"]
    lines = (
        [r["model"], r["training"], f"{r['prompt']}, {r['response']}, {r['group']}", NAMES[r["way"]],
         DID_NOT_RUN if r["seconds"] == "nan" else r["seconds"], ratio_of(r), r["peak_mib"]]
        for r in rows
    )  # fmt: skip
    return table_of(columns, lines)


def training_table(rows: list[Row]) -> str:
    """One line for each training and way."""
    columns = ["Prompt, response, G", "Optimizer steps", "Way", "Seconds", "Times as fast"]
    lines = (
        [f"{r['prompt']}, {r['response']}, {r['group']}", r["steps"], NAMES.get(r["way"], r["way"]), r["seconds"],
         r["times_as_fast"], r["difference"]]
        for r in rows
    )  # fmt: skip
    return table_of([*columns, "Largest difference of a weight, float32"], lines)


def verl_table(rows: list[Row]) -> str:
    """One line for each batch and pass."""
    columns = [
        "Prompt, response, prompts, G",
        "Rows of a micro-batch",
        "Pass",
        "Token ratio",
        "verl, seconds",
        "Ours, seconds",
    ]
    lines = (
        [f"{r['prompt']}, {r['response']}, {r['prompts']}, {r['group']}",
         r["rows"] + (", padded" if r["padding"] == "True" else ""), r["pass"], r["token_ratio"],
         r["stock_seconds"], r["ours_seconds"], r["times_as_fast"]]
        for r in rows
    )  # fmt: skip
    return table_of([*columns, "Times as fast"], lines)


def plan_table(rows: list[Row]) -> str:
    """Estimates of `prefix-grouper plan`, what was measured, and how far they are apart."""

    def both(row: Row, name: str, unit: str, error: str) -> str:
        form = ",.0f" if unit else ".3g"
        estimated, measured = (format(float(row[f"{name}_{kind}"]), form) for kind in ("estimated", "measured"))
        return f"{estimated} / {measured}{unit} ({float(row[error]):+.0f} %)"

    lines = [
        "| Update | Prompt, responses in all, G, rows | Token ratio | Times as fast: estimated / measured | Peak memory of stock | Of shared |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {r['case']} | {r['prompt']}, {r['responses']}, {r['group']}, {r['rows']} | "
        f"{float(r['token_ratio_estimated']):.3f} / {float(r['token_ratio_measured']):.3f} | "
        f"{both(r, 'times_as_fast', '', 'speed_error_percent')} | "
        f"{both(r, 'stock_peak_mib', ' MiB', 'stock_memory_error_percent')} | "
        f"{both(r, 'shared_peak_mib', ' MiB', 'shared_memory_error_percent')} |"
        for r in rows
    ]
    return "\n".join(lines)


def recipes_table(rows: list[Row]) -> str:
    """One line for each recipe."""
    columns = ["Recipe", "Token ratio", "Stock, seconds", "Shared, seconds", "Times as fast"]
    measured = ("token_ratio", "stock_seconds", "shared_seconds", "times_as_fast", "largest_difference")
    lines = ([f"{r['recipe']}.py", *(r[name] for name in measured)] for r in rows)
    return table_of([*columns, "Largest difference of a weight, float32"], lines)


def origin(path: Path) -> str:
    """One sentence about where a file comes from."""
    facts = read_facts(path)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "transformers"))
    return f"`{facts['command']}` on {facts['machine']}, {facts['date']}; {versions}. {facts['note']}."


Table = Callable[[list[Row]], str]
# Part of the page -> its file, and what makes its table.
PARTS: dict[str, tuple[str, Table | None]] = {
    "attention-cpu": ("attention-cpu.csv", attention_table),
    "attention-cuda": ("attention-cuda.csv", attention_table),
    "growth-cpu": ("growth-cpu.csv", None),
    "growth-cuda": ("growth-cuda.csv", None),
    "flops": ("flops.csv", flops_table),
    "actor-update-cpu": ("actor-update-cpu.csv", update_table),
    "actor-update-cuda": ("actor-update-cuda.csv", update_table),
    "prompt-reuse-cpu": ("prompt-reuse-cpu.csv", reuse_table),
    "verl-update-cpu": ("verl-update-cpu.csv", verl_table),
    "training-cpu": ("training-cpu.csv", training_table),
    "plan-check-cpu": ("plan-check-cpu.csv", plan_table),
    "recipes-cpu": ("recipes-cpu.csv", recipes_table),
}


# Parts that bring their picture along, so that the page shows it as soon as it is drawn.
PICTURES = {
    "prompt-reuse-cpu": "Seconds of an update by the rows of a micro-batch, and its peak memory over the group's size"
}


def parts(results: Path = RESULTS) -> dict[str, str]:
    """What stands between the marks of the page, for each file that is there."""
    found = {}
    for name, (file, table) in PARTS.items():
        if (results / file).exists():
            head = [table(read_csv(results / file)), ""] if table else []
            if name in PICTURES and (IMAGES / f"{name}.png").exists():
                head = [f"![{PICTURES[name]}](images/{name}.png)", "", *head]
            found[name] = "\n".join([*head, f"From [{file}](../benchmarks/results/{file}): {origin(results / file)}"])
    return found


def fill(page: str, found: dict[str, str]) -> str:
    """``page`` with its parts replaced."""
    for name, text in found.items():
        page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, name=name, text=text: f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->", page, flags=re.S)  # fmt: skip
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for device in ("cpu", "cuda"):
        for name, draw in (("attention", draw_attention), ("growth", draw_growth), ("actor-update", draw_updates)):
            path = RESULTS / f"{name}-{device}.csv"
            if path.exists():
                draw(read_csv(path), device)
    if (RESULTS / "prompt-reuse-cpu.csv").exists():
        draw_reuse(read_csv(RESULTS / "prompt-reuse-cpu.csv"))
    if (RESULTS / "flops.csv").exists():
        grid = read_csv(RESULTS / "flops.csv")
        draw_flops(grid)
        draw_memory(grid)
    for page in (PAGE, RECIPES):
        page.write_text(fill(page.read_text(encoding="utf-8"), parts()), encoding="utf-8")
        print(f"filled in {page}")


if __name__ == "__main__":
    main(sys.argv[1:])
