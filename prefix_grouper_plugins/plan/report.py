"""What ``plan DATA`` prints and draws. Tables are rich's where rich is installed, and plain text where it is not."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefix_grouper_plugins.usage import UsageError

BAR_WIDTH = 30
# What the micro-batches of a plan take for granted, by trainer. Elsewhere parts of a group forward its prompt again.
ASSUMED = {
    "trl": "one process or several with DDP or, for text, FSDP2 (not FSDP1 or DeepSpeed), and a loss that is a sum over rows "
    "(not bnpo, no entropy terms, no router loss)",
    "verl": "FSDP2 (not FSDP1) without Ulysses, and one of verl's PPO losses",
}
GIB = 2**30


def print_report(found: dict[str, Any]) -> None:
    """The figures of :func:`prefix_grouper_plugins.plan.command.figures`."""
    prompts, responses = found["prompts"], found["responses"]
    print(f"{found['data']}: {prompts['count']:,} prompts{_limited(prompts)}, {_tokens(found['tokenizer'])}")
    print(f"{found['model']}, {_sizes(found)}\n")
    _table(
        "", ("", "min", "median", "mean", "90 %", "max"), [_lengths("Prompt", prompts), _lengths("Response", responses)]
    )
    print("Prompts by length")
    most = max(bar[2] for bar in prompts["histogram"])
    for low, high, number in prompts["histogram"]:
        print(f"{low:>8,} - {high - 1:<8,}{'█' * round(BAR_WIDTH * number / most):{BAR_WIDTH}} {number:,}")
    print()
    _table("An optimizer step", ("", "stock", "shared", "stock / shared"), _step_rows(found))
    print(
        f"Token ratio {found['token_ratio']:.3f} (the metric prefix_grouper/token_ratio: shared, over rows without padding)"
    )
    steps = [f"{x['times_as_fast']:.2f} if they take {x['outside_share']:.0%}" for x in found["step_speedup"]]
    _print_text(
        f"The update is about {found['update_speedup']:.2f} times as fast. How much faster a whole step is depends on the "
        f"share of generation, rewards and the optimizer in a stock step: {', '.join(steps)}."
    )
    if "largest_group" in found:
        _print_largest_group(found)
    _print_settings(found)
    _print_text(
        f"Assumed: {ASSUMED[found['trainer']]}. Otherwise micro-batches that are smaller than a group do not reuse its "
        "prompt: more tokens are forwarded, unless a micro-batch holds whole groups."
    )
    _print_text(
        "These are estimates from FLOPs and from what autograd keeps; nothing was run. Stock means padded rows in TRL, "
        "and rows end to end in verl. docs/benchmarks.md compares such estimates with measurements; prefix-grouper bench "
        "measures on this machine."
    )


def _print_text(text: str) -> None:
    print(f"\n{textwrap.fill(text, 120, break_on_hyphens=False)}")


def _limited(prompts: dict[str, Any]) -> str:
    return f" (the first {prompts['limit']:,}; --limit 0 reads all)" if prompts["limit"] else ""


def _tokens(tokenizer: str) -> str:
    if tokenizer == "whitespace":
        return "tokens estimated as words between spaces (a real tokenizer often makes a third more; give --tokenizer)"
    return f"tokens of {tokenizer}"


def _sizes(found: dict[str, Any]) -> str:
    names = {key: value for key, value in found["sizes"].items() if key != "group"}
    return f"{found['trainer']}, groups of {found['group']}, " + ", ".join(
        f"{key} {value:,}" for key, value in names.items()
    )


def _lengths(name: str, of: dict[str, Any]) -> tuple[str, ...]:
    return (name, *(f"{of[key]:,.0f}" for key in ("min", "median", "mean", "p90", "max")))


def _step_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for label, figures, unit, form in (
        ("Tokens forwarded, padding included", found["tokens_per_step"], 1, ",.0f"),
        ("FLOPs of the update, TFLOP", found["update_flops_per_step"], 1e12, ",.4g"),
        ("Peak memory of a process, GiB", found["peak_bytes"], GIB, ",.3g"),
    ):
        stock, shared = figures["stock"] / unit, figures["shared"] / unit
        rows.append((label, format(stock, form), format(shared, form), f"{stock / shared:.2f}"))
    static = f"{found['peak_bytes']['static'] / GIB:,.3g}"
    return [*rows, ("  of which weights, gradients, optimizer", static, static, "")]


def _print_largest_group(found: dict[str, Any]) -> None:
    of, memory = found["largest_group"], found["memory_bytes"] / GIB
    names = [f"{of[way]}{' or more' if of[way] >= of['searched_up_to'] else ''} {way}" for way in ("stock", "shared")]
    print(
        f"The largest group in one micro-batch within {memory:g} GiB, all rows as long as the longest: {', '.join(names)}."
    )
    print(
        "Micro-batches smaller than a group reuse its prompt, so a larger group needs more micro-batches, not more memory."
    )


def _print_settings(found: dict[str, Any]) -> None:
    print("\nSettings that share most, for the same optimizer step:")
    for trainer, advice in found["settings"].items():
        text = " ".join(f"{key}={value}" for key, value in advice["settings"].items())
        note = "" if advice["fits"] else "; this exceeds the memory given, and no smaller setting was found"
        print(
            f"  {trainer:6}{text}\n        token ratio {advice['token_ratio']:.3f}, peak {advice['peak_bytes'] / GIB:,.2f} GiB{note}"
        )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        Console(width=120, highlight=False).print(table)
        return
    if title:
        print(title)
    for row in (head, *rows):
        print(f"{row[0]:42}" + "".join(f"{cell:>16}" for cell in row[1:]))
    print()


def draw(found: dict[str, Any], path: Path) -> None:
    """Histograms of both lengths, tokens and memory of stock and shared, as a picture.

    Raises:
        UsageError: matplotlib is missing, or ``path`` cannot be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dark, pale = "#17375e", "#f4b183"
    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
        for axis, name in zip(axes, ("prompts", "responses"), strict=False):
            bars = found[name]["histogram"]
            axis.bar([bar[0] for bar in bars], [bar[2] for bar in bars], [bar[1] - bar[0] for bar in bars],
                     align="edge", color=dark, edgecolor="white")  # fmt: skip
            axis.set(title=f"Length of {name}", xlabel="tokens", ylabel=name)
            axis.yaxis.get_major_locator().set_params(integer=True)
        for axis, figures, unit, title in (
            (axes[2], found["tokens_per_step"], 1e3, "Thousand tokens of a step"),
            (axes[3], found["peak_bytes"], GIB, "Peak memory, GiB"),
        ):
            values = [figures["shared"] / unit, figures["stock"] / unit]
            bars = axis.bar(("shared", "stock"), values, color=(dark, pale), width=0.55)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontweight="bold")
            axis.set(title=title)
            axis.margins(y=0.12)
        try:
            figure.savefig(path, dpi=130)
        except (OSError, ValueError) as error:
            raise UsageError(f"--plot {path}: it cannot be written: {error}") from error
        finally:
            plt.close(figure)
