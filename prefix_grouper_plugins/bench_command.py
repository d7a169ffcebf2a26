"""``prefix-grouper bench``: attention of one layer, or the update of a whole model, on the user's machine.

Ways run in turns, so that a machine that is busy for a while slows all of them. Seconds are medians over the turns, and
the ratio printed with them is that of these medians, so that the two agree; how far the ratios of single turns lie apart
is printed too.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from prefix_grouper_plugins.plan.command import count
from prefix_grouper_plugins.usage import UsageError, first_line

if TYPE_CHECKING:
    import torch

    from prefix_grouper_plugins.bench import Step, Timing
    from prefix_grouper_plugins.cost import ModelShape

BACKEND_VARIABLE = "PREFIX_GROUPER_BACKEND"  # as in attention.registry, which imports torch
UPDATE_OPTIONS = ("batch_size", "layers", "checkpointing")  # that say nothing of one attention layer
ROW_BY_ROW = "row by row"


def add_arguments(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--prompt", type=count, default=2048, help="tokens of the prompt (default: 2048)")
    bench.add_argument("--response", type=count, default=128, help="tokens of each response (default: 128)")
    bench.add_argument("--group", type=count, default=8, help="responses to the prompt (default: 8)")
    bench.add_argument("--repeats", type=count, default=3, help="how often each is timed (default: 3)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    bench.add_argument(
        "--update", action="store_true",
        help="time the update of --model with random weights, stock and shared, instead of one attention layer",
    )  # fmt: skip
    bench.add_argument("--batch-size", type=count, help="with --update: rows of a micro-batch (default: the group)")
    bench.add_argument("--layers", type=count, help="with --update: layers of the model (default: all of them)")
    bench.add_argument(
        "--checkpointing", action="store_true", default=None, help="with --update: gradient checkpointing"
    )
    bench.add_argument("--csv", type=Path, metavar="CSV", help="also write a line for each turn into this file")
    bench.add_argument("--plot", type=Path, metavar="PNG", help="also draw the seconds into this file")


@dataclass(frozen=True)
class Measured:
    """Timings of several ways.

    Attributes:
        what: one line about what was timed.
        timings: of each way, turn by turn.
        base: the way that the others are compared with.
        bound: how many times as fast the others can be, by what they compute, and what that counts.
    """

    what: str
    timings: Mapping[str, list[Timing]]
    base: str
    bound: tuple[float, str]

    @property
    def seconds(self) -> dict[str, float]:
        """Medians of the wall clock."""
        return {way: median(timing.wall for timing in times) for way, times in self.timings.items()}

    @property
    def times_as_fast(self) -> dict[str, float]:
        """Ratios of :attr:`seconds`."""
        return {way: self.seconds[self.base] / seconds for way, seconds in self.seconds.items()}

    @property
    def spread(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest ratio of a turn."""
        base = self.timings[self.base]
        turns = {
            way: [b.wall / a.wall for a, b in zip(times, base, strict=True)] for way, times in self.timings.items()
        }
        return {way: (min(ratios), max(ratios)) for way, ratios in turns.items()}


def run(options: argparse.Namespace, name: str, shape: ModelShape, config: Any, print_json: Callable[..., None]) -> int:
    """Time, print, write.

    Args:
        options: of :func:`add_arguments`.
        name, shape: the model.
        config: its config, None for a model by name.
        print_json: for ``--json``.
    """
    import torch

    from prefix_grouper_plugins.bench import describe_machine

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch {torch.__version__} sees no GPU on this machine")
    given = [option for option in UPDATE_OPTIONS if getattr(options, option) is not None]
    if given and not options.update:
        raise UsageError(f"--{given[0].replace('_', '-')} goes with --update")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    machine = describe_machine(device)
    if not options.json:
        print(", ".join(f"{key} {value}" if key != "machine" else value for key, value in machine.items()))
    measured = (_update if options.update else _attention)(options, name, shape, config, device, dtype)
    if options.csv is not None:
        _write_csv(options.csv, measured, machine)
    if options.plot is not None:
        _draw(options.plot, measured)
    if options.json:
        asked = {key: getattr(options, key) for key in ("prompt", "response", "group", "repeats")}
        figures = {"seconds": measured.seconds, "times_as_fast": measured.times_as_fast, "spread": measured.spread}
        bound = {"flop_ratio" if options.update else "pair_ratio": measured.bound[0]}
        print_json({"machine": machine, "model": name, "dtype": str(dtype), **asked, **figures, **bound})
    else:
        _print(measured)
    return 0


def _attention(
    options: argparse.Namespace, name: str, shape: ModelShape, config: Any, device: str, dtype: torch.dtype
) -> Measured:
    """Forward and backward of one layer: each backend that runs here, and each row on its own."""
    from prefix_grouper_plugins.bench import Case, row_step, shared_step, take_turns

    sizes = (options.prompt, options.response, options.group)
    case = Case(*sizes, shape.num_heads, shape.num_kv_heads, shape.head_dim, device, dtype)
    steps: dict[str, Step] = {ROW_BY_ROW: row_step(case)}
    steps |= {backend: shared_step(case, backend) for backend in _backends(device, dtype, shape.head_dim)}
    timings = take_turns(steps, repeats=options.repeats, device=device)
    return Measured(
        f"One attention layer of {name}, {_name(dtype)}: {sizes[0]} + {sizes[2]} x {sizes[1]} tokens",
        timings,
        ROW_BY_ROW,
        (case.pair_ratio, "visible pairs of query and key"),
    )


def _backends(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Those that run such a layer; the one in the environment alone, where there is one, since it wins over all names.

    Raises:
        UsageError: the one in the environment does not run it.
    """
    from prefix_grouper_plugins.attention import available_backends

    reasons = available_backends(device, dtype, head_dim)
    forced = os.environ.get(BACKEND_VARIABLE, "auto")
    if reason := reasons.get(forced):
        raise UsageError(f"{BACKEND_VARIABLE}={forced} cannot run this layer: {reason}")
    return [name for name, reason in reasons.items() if reason is None and forced in ("", "auto", name)]


def _update(
    options: argparse.Namespace, name: str, shape: ModelShape, config: Any, device: str, dtype: torch.dtype
) -> Measured:
    """Forward and backward of the whole model on one group, in micro-batches."""
    import dataclasses

    from prefix_grouper_plugins.bench import take_turns
    from prefix_grouper_plugins.cost import compare
    from prefix_grouper_plugins.layout import PrefixLayout
    from prefix_grouper_plugins.update_bench import STOCK, Update, steps_of

    rows = options.batch_size or options.group
    if options.group % rows:
        raise UsageError(f"--batch-size {rows} does not divide --group {options.group}")
    if config is None:
        raise UsageError("--update builds the model: give --model, a folder or hub name of which the config is read")
    model = _build(options, config, device, dtype)
    responses = [options.response] * options.group
    update = Update.random(options.prompt, responses, rows, shape.vocab_size, device)
    timings = take_turns(steps_of(model, update), repeats=options.repeats, device=device)
    layers = options.layers or shape.num_layers
    counted = dataclasses.replace(shape, num_layers=layers, num_windowed_layers=min(layers, shape.num_windowed_layers))
    both = compare(counted, PrefixLayout.from_groups([options.prompt], [responses]), scored=sum(responses))
    ratio = both.checkpointed_speedup if options.checkpointing else both.speedup
    sizes = f"{options.prompt} + {options.group} x {options.response} tokens, micro-batches of {rows} rows"
    return Measured(f"Update of {name}, {layers} layers, {_name(dtype)}: {sizes}", timings, STOCK, (ratio, "FLOPs"))


def _build(options: argparse.Namespace, config: Any, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights, ready for both ways."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefix_grouper_plugins.modeling import UnsupportedModelError
    from prefix_grouper_plugins.sharing import enable_prefix_grouper

    config = config.get_text_config(decoder=True)
    if options.layers is not None:
        config.num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    try:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if options.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return enable_prefix_grouper(model.train())
    except (UnsupportedModelError, RuntimeError, ValueError) as error:
        raise UsageError(f"--model {options.model}: {first_line(error)}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------------- output


def _print(measured: Measured) -> None:
    heading = f"times as fast as {measured.base}"
    print(measured.what)
    print(f"\n{'':16}{'seconds':>10}{heading:>30}")
    for way, seconds in measured.seconds.items():
        print(f"{way:16}{seconds:>10.4f}{measured.times_as_fast[way]:>30.2f}")
    turns = [f"{way} {low:.2f} to {high:.2f}" for way, (low, high) in measured.spread.items() if way != measured.base]
    print(f"\nIn single turns: {', '.join(turns)} times as fast.")
    ratio, of = measured.bound
    print(f"The ratio of {of}, {ratio:.2f}, is what sharing can gain here.")


def _write_csv(path: Path, measured: Measured, machine: Mapping[str, str]) -> None:
    """A line for each turn, under lines about the machine."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in {"what": measured.what, **machine}.items())
            writer = csv.writer(file)
            writer.writerow(["turn", *(f"{way} seconds" for way in measured.timings)])
            for turn, times in enumerate(zip(*measured.timings.values(), strict=True), 1):
                writer.writerow([turn, *(f"{timing.wall:.6g}" for timing in times)])
    except OSError as error:
        raise UsageError(f"--csv {path}: it cannot be written: {error}") from error


def _draw(path: Path, measured: Measured) -> None:
    """A bar for the median of each way, and a dot for each turn."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(2.2 + 1.3 * len(measured.timings), 3.6), layout="constrained")
        for place, (way, seconds) in enumerate(measured.seconds.items()):
            axis.bar(place, seconds, color="#f4b183" if way == measured.base else "#17375e", width=0.55)
            walls = [timing.wall for timing in measured.timings[way]]
            axis.scatter([place] * len(walls), walls, s=12, color="white", edgecolor="#555555", linewidth=0.6, zorder=3)
            axis.text(
                place, max(walls), f"{measured.times_as_fast[way]:.2f}x\n", ha="center", va="bottom", fontweight="bold"
            )
        axis.set_xticks(range(len(measured.timings)), list(measured.timings))
        axis.set(ylabel="seconds (bar: median, dots: turns)")
        axis.set_title(measured.what.replace(": ", ":\n"), fontsize=9)
        axis.margins(y=0.18)
        try:
            figure.savefig(path, dpi=130)
        except (OSError, ValueError) as error:
            raise UsageError(f"--plot {path}: it cannot be written: {error}") from error
        finally:
            plt.close(figure)
