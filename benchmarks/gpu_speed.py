"""How fast is attention on this GPU, forward and backward, against rows and gathered keys? `make gpu-speed`.

    python benchmarks/gpu_speed.py
    python benchmarks/gpu_speed.py --dry-run       tiny, on the CPU: does the script run?

The methods of attention.py in turns, in two processes for each case so that a fault of one of our backends costs the other no
figures; then the first cases again with FlashAttention-3, where this torch can activate it. `share_of_bound` is how many
times as fast as rows a method is, divided by how many times as fast it could be: at least 1 means as many FLOP/s for each
visible pair as plain causal attention reaches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import attention
import torch
from harness import number, use
from isolated import Work, add_options, emit, run_all

from prefix_grouper_plugins.attention import available_backends

CASES = ((8192, 1024, 8), (16384, 1024, 16), (1024, 256, 8), (256, 512, 8), (64, 512, 8))
LONG_CASES = ((4096, 2048, 28), (16384, 2048, 28), (32768, 2048, 28))
TINY = ((40, 8, 3), (6, 9, 3))
METHODS = (("rows", "ours:auto", "gathered_flash"), ("rows", "ours:triton"))
COLUMNS = (
    "flash", "prompt", "response", "group", "method", "seconds", "wall_seconds", "turns", "times_as_fast_as_rows",
    "pair_ratio", "share_of_bound", "peak_mib", "gflops_per_second_of_visible_pairs",
)  # fmt: skip
NOTE = (
    "forward and backward, bfloat16, 28:4 heads of 128; share_of_bound: times_as_fast_as_rows / pair_ratio; FA3 after "
    "torch.nn.attention.activate_flash_attention_impl"
)


def works(dry: bool) -> list[Work]:
    """All cases, in the order in which they run."""
    script = ["benchmarks/gpu_speed.py", *(["--dry-run"] if dry else []), "--case"]
    found: list[Work] = []
    for flash, cases in (("FA2", TINY if dry else CASES + LONG_CASES), ("FA3", TINY[:1] if dry else CASES)):
        for sizes in cases:
            for methods in METHODS if flash == "FA2" else METHODS[:1]:
                name = f"{flash} {','.join(map(str, sizes))} {' '.join(methods)}"
                # Triton compiles some ten kernels once; they stay on disk for the cases behind.
                found.append(Work(name, [*script, name], 180.0 if "ours:triton" in methods else 90.0))
    return found


def why_not_flash(flash: str) -> str | None:
    """Activates FlashAttention-3 for this process; why that cannot be done."""
    if flash == "FA2":
        return None
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        return f"torch {torch.__version__} cannot activate {flash}"
    try:
        activate(flash)
    except Exception as error:  # not installed, or not for this GPU: whatever it is, say it
        return f"{flash} cannot be activated: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def run_case(name: str, device: str) -> None:
    """One case, in the process that is its own."""
    flash, text, *methods = name.split()
    prompt, response, group = map(int, text.split(","))
    if (reason := why_not_flash(flash)) is not None:
        emit(flash=flash, prompt=prompt, response=response, group=group, status=f"left out: {reason}")
        return
    case = attention.case_of((prompt, response, group), device)
    reasons = {method: why_not(method, case) for method in methods}
    for method, reason in reasons.items():
        if reason is not None:
            emit(
                flash=flash, prompt=prompt, response=response, group=group, method=method, status=f"left out: {reason}"
            )
    wanted = [method for method, reason in reasons.items() if reason is None]
    options = ["--device", device, "--methods", *wanted, "--cases", text, "--memory"]
    options += ["--repeats", "1", "--seconds", "0"] if device == "cpu" else ["--repeats", "3", "--seconds", "4"]
    for row in attention.measure((prompt, response, group), attention.parse_arguments(options)):
        share = float(row["times_as_fast_as_rows"]) / float(row["pair_ratio"])
        status = "ok" if row["turns"] else "did not run: it does not fit into the memory, see the log"
        emit(flash=flash, **row, share_of_bound=number(share, 3), status=status)


def why_not(method: str, case: attention.Case) -> str | None:
    """Why a method cannot run here."""
    if method.startswith("ours:") and method != "ours:auto":
        return available_backends(case.device, case.dtype, case.head_dim)[method.removeprefix("ours:")]
    return attention.why_not(method, case)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "gpu-speed.csv")
    args = parser.parse_args(arguments)
    device = "cpu" if args.dry_run else "cuda"
    use(device)
    if args.case:
        run_case(args.case, device)
        return 0
    return int(run_all(works(args.dry_run), args, COLUMNS, NOTE) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
