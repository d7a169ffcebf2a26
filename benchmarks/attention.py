"""How fast is attention over a group, forward and backward, and what does it take? Ours against what others run.

    python benchmarks/attention.py                  CPU, one thread, float32: the cases of the project's targets
    python benchmarks/attention.py --device cuda    bfloat16, the head shapes of Qwen2.5-7B

Methods take turns. `times_as_fast_as_rows` is the median, turn by turn, of the time of `rows` (causal flash attention over
each row, the prompt repeated) divided by the method's; its bound is `pair_ratio`, the ratio of visible pairs of query and
key. On the CPU times are those of the process (one thread), for other programs may be running. Peak memory holds inputs,
outputs and gradients, each method in a fresh process (CUDA: max_memory_allocated of a second run; a method that fails, mostly
for lack of memory, gets no figures). The CSV is written case by case.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import RESULTS, in_a_fresh_process, number, peak_mib, use, write_csv
from methods import OTHERS, other_step

from prefix_grouper_plugins.attention import available_backends
from prefix_grouper_plugins.bench import Case, Step, Timing, row_step, shared_step, take_turns, times_as_fast
from prefix_grouper_plugins.forest import visible_pairs

CPU_CASES = ((64, 512, 8), (1024, 128, 8), (4096, 128, 8), (4096, 128, 16), (4096, 512, 8))
CPU_MEMORY_CASES = ((4096, 128, 16),)  # one fresh process for each method takes its time
CUDA_CASES = ((64, 512, 8), (8192, 1024, 8), (16384, 1024, 16), (4096, 2048, 28), (16384, 2048, 28), (32768, 2048, 28))
TOO_LARGE_FOR_A_MASK = 40_000  # tokens: the T x T mask and its score matrix


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is left open depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", help="prompt,response,group in tokens and rows, e.g. 1024,128,8")
    parser.add_argument("--methods", nargs="+", help="of: rows, ours:BACKEND, " + ", ".join(OTHERS))
    parser.add_argument("--repeats", type=int, default=3, help="turns at least (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="go on until this much time is over, for short cases"
    )
    parser.add_argument("--memory", nargs="*", help="cases whose peak memory is measured too (CUDA: all)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one method of one case, in a process of its own
    args = parser.parse_args(arguments)
    args.output = args.output or RESULTS / f"attention-{args.device}.csv"
    cases = CPU_CASES if args.device == "cpu" else CUDA_CASES
    args.cases = cases_of(args.cases) if args.cases else list(cases)
    args.memory = list(CPU_MEMORY_CASES) if args.memory is None else cases_of(args.memory)
    return args


def cases_of(texts: Sequence[str]) -> list[tuple[int, ...]]:
    return [tuple(map(int, text.split(","))) for text in texts]


def case_of(sizes: tuple[int, int, int], device: str) -> Case:
    """The layer that the figures are about: small heads on the CPU, those of Qwen2.5-7B on a GPU."""
    if device == "cpu":
        return Case(*sizes)
    return Case(*sizes, num_heads=28, num_kv_heads=4, head_dim=128, device=device, dtype=torch.bfloat16)


def makers(case: Case, wanted: Sequence[str] | None) -> dict[str, Callable[[], Step]]:
    """For each method that can run here a function that makes its step; says which are left out and why."""
    backends = available_backends(case.device, case.dtype, case.head_dim)
    found: dict[str, Callable[[], Step]] = {"rows": lambda: row_step(case), "ours:auto": lambda: shared_step(case)}
    taken = next(name for name, reason in backends.items() if reason is None)  # what `auto` stands for
    for name, reason in backends.items():
        if name == taken:
            continue
        if reason is None:
            found[f"ours:{name}"] = lambda name=name: shared_step(case, name)  # type: ignore[misc]
        else:
            print(f"  ours:{name} left out: {reason}", flush=True)
    for name in OTHERS:
        reason = why_not(name, case)
        if reason is None:
            found[name] = lambda name=name: other_step(name, case)  # type: ignore[misc]
        elif wanted is None or name in wanted:
            print(f"  {name} left out: {reason}", flush=True)
    if wanted is not None and (unknown := set(wanted) - found.keys()):
        raise SystemExit(f"{', '.join(sorted(unknown))} cannot run here; there are {', '.join(found)}")
    return found if wanted is None else {name: found[name] for name in wanted}


def why_not(name: str, case: Case) -> str | None:
    """Why a method of others cannot run here."""
    if name == "dense_mask" and case.layout.num_tokens > TOO_LARGE_FOR_A_MASK:
        return f"a mask of {case.layout.num_tokens} x {case.layout.num_tokens} does not fit"
    if name == "published" and importlib.util.find_spec("prefix_grouper") is None:
        return "the package prefix-grouper is not installed"
    if name == "gathered_flash" and case.device == "cpu":
        return "the varlen flash kernels need a GPU"
    if name == "tree_attention" and case.device == "cpu":
        return "FlashAttention 3 needs a GPU; `gathered` does the same with torch's own attention"
    return why_no_tree_attention(case.device, case.dtype) if name == "tree_attention" else None


@lru_cache  # without a network each attempt to load the kernel takes its time
def why_no_tree_attention(device: str, dtype: torch.dtype) -> str | None:
    """The error of TRL's tree attention on this GPU, if there is one."""
    try:
        other_step("tree_attention", Case(8, 8, 2, 28, 4, 128, device, dtype))()
    except Exception as error:  # no `kernels`, no network, no kernel for this GPU: whatever it is, say it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def measure(sizes: tuple[int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the CSV for each method."""
    case = case_of(sizes, args.device)
    print(f"{sizes[0]:>6} {sizes[1]:>5} {sizes[2]:>3}  pair ratio {case.pair_ratio:.2f}", flush=True)
    steps = makers(case, args.methods)
    wanted = args.device != "cpu" or sizes in args.memory
    memory: dict[str, float | None] = dict.fromkeys(steps, math.nan)
    for name in steps if wanted else ():
        memory[name] = memory_of(name, sizes) if args.device == "cpu" else memory_on_gpu(name, steps[name], args.device)
    timings = time_what_fits(case, steps, memory, args)
    return [row(name, case, timings, memory[name]) for name in steps]


def time_what_fits(
    case: Case, found: dict[str, Callable[[], Step]], memory: dict[str, float | None], args: argparse.Namespace
) -> dict[str, list[Timing]]:
    """`time_all` without the methods that have no ``memory``; the inputs of all must fit at once, else the largest goes."""
    fitting = {name: make for name, make in found.items() if memory[name] is not None}
    while fitting:
        try:
            return time_all(case, fitting, args)
        except torch.OutOfMemoryError:
            largest = max(fitting, key=lambda name: memory[name] or 0.0)
            print(f"  {largest} is not timed: it does not fit beside the inputs of the others", flush=True)
            del fitting[largest]
    return {}


def time_all(case: Case, found: dict[str, Callable[[], Step]], args: argparse.Namespace) -> dict[str, list[Timing]]:
    """Turns of all methods; on the CPU, where nothing is tuned or compiled, a tiny case warms up well enough."""
    cpu = case.device == "cpu"
    for make in makers(Case(8, 8, 2), list(found)).values() if cpu else ():
        make()()
    steps = {name: make() for name, make in found.items()}
    return take_turns(steps, repeats=args.repeats, seconds=args.seconds, device=args.device, warm_up=not cpu)


def memory_of(name: str, sizes: tuple[int, int, int]) -> float:
    """Peak MiB of one method on the CPU."""
    return in_a_fresh_process(["attention.py", "--memory-of", name, "--cases", ",".join(map(str, sizes))])


def memory_on_gpu(name: str, make: Callable[[], Step], device: str) -> float | None:
    """Peak MiB of one method; None where it does not fit. A first run compiles, and times tiles with buffers of its own."""
    try:
        make()()
        return peak_mib(make, device)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        if name not in OTHERS:
            raise
        print(f"  {name} left out: {type(error).__name__}: {error}", flush=True)  # no reason to lose our own figures
        return None


def row(name: str, case: Case, timings: dict[str, list[Timing]], memory: float | None) -> dict[str, Any]:
    """What the CSV holds about one method, printed too."""
    turns = timings.get(name, [])
    seconds, wall = (median(getattr(turn, clock) for turn in turns) if turns else math.nan for clock in ("cpu", "wall"))
    ratio = times_as_fast(turns, timings["rows"]) if turns and "rows" in timings else math.nan
    flops = 14 * case.num_heads * case.head_dim * visible_pairs(case.layout.segments)
    held = "  did not run" if memory is None else "" if math.isnan(memory) else f"{memory:9.0f} MiB"
    print(f"    {name:18}{seconds:9.3f} s {ratio:7.2f} times as fast as rows{held}", flush=True)
    return {
        "prompt": case.prompt,
        "response": case.response,
        "group": case.group,
        "method": name,
        "seconds": number(seconds),
        "wall_seconds": number(wall),
        "turns": len(turns),
        "times_as_fast_as_rows": number(ratio),
        "pair_ratio": number(case.pair_ratio),
        "peak_mib": number(math.nan if memory is None else memory),
        "gflops_per_second_of_visible_pairs": number(flops / seconds / 1e9),
    }


def print_memory_of(args: argparse.Namespace) -> None:
    """In a process of its own: run a tiny case, so that libraries are loaded, then the case itself."""
    tiny = case_of((8, 8, 2), args.device)
    makers(tiny, [args.memory_of])[args.memory_of]()()
    make = makers(case_of(args.cases[0], args.device), [args.memory_of])[args.memory_of]
    print(json.dumps(peak_mib(make, args.device)))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    use(args.device)
    if args.memory_of:
        print_memory_of(args)
        return
    note = (
        f"forward and backward, {'float32, 8:2 heads of 64' if args.device == 'cpu' else 'bfloat16, 28:4 heads of 128'}"
    )
    rows: list[dict[str, Any]] = []
    for sizes in args.cases:
        rows += measure(sizes, args)
        write_csv(args.output, rows, args.device, note)  # now: a later case may end the process


if __name__ == "__main__":
    main(sys.argv[1:])
