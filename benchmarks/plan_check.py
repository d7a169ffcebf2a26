"""How far are the estimates of `prefix-grouper plan` from what is measured?

    python benchmarks/plan_check.py               CPU, one thread: six updates of a small Qwen2 model
    python benchmarks/plan_check.py --device cuda

Each case is the update of one group, stock and shared in turns (`prefix_grouper_plugins.update_bench`), scored by the fused
head that TRL puts on its models. Estimated and measured are the token ratio (counted by the input embedding), the speed-up of
the update (CPU: in seconds of a process that keeps freed memory), and the peak memory of the process with weights, gradients and
activations, without an optimizer (CPU: of a fresh process for each way, above what Python and torch hold before there is a
model). On a CPU that head works on every position, prompts and padding
included, and in torch operations; the estimates are told so. On a GPU it scores completions alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import RESULTS, in_a_fresh_process, number, peak_mib, use, write_csv
from models import build
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.bench import Step, take_turns, times_as_fast
from prefix_grouper_plugins.cost import ModelShape
from prefix_grouper_plugins.modeling import transformers_model
from prefix_grouper_plugins.plan.estimate import Training
from prefix_grouper_plugins.plan.schedule import Prompts, Schedule, TRLSizes, trl_schedule
from prefix_grouper_plugins.update_bench import IGNORED, SHARED, STOCK, Update, steps_of

SHAPE = ModelShape(512, 2, 8, 2, 64, 1536, 8192, tied_head=True)
TINY = ModelShape(64, 2, 4, 2, 16, 128, 256, tied_head=True)


class Case(NamedTuple):
    """One group: its prompt, its responses, rows of a micro-batch, and how the model is trained."""

    name: str
    prompt: int
    responses: tuple[int, ...]
    rows: int
    checkpointing: bool = False
    lora: bool = False


RAGGED = (16, 32, 48, 64, 96, 128, 160, 192)
CASES = {
    case.name: case
    for case in (
        Case("long prompt", 1024, (64,) * 8, 8),
        Case("long responses", 512, (256,) * 8, 8),
        Case("micro-batches of 2 rows", 512, (256,) * 8, 2),
        Case("responses of many lengths", 256, RAGGED, 8),
        Case("gradient checkpointing", 2048, (32,) * 4, 4, checkpointing=True),
        Case("LoRA, 16 rows by 4", 768, RAGGED * 2, 4, lora=True),
        Case("tiny", 24, (16, 20, 24, 24), 1),
    )
}
# glibc's malloc keeps what was freed, so that a process looks larger than what it holds; from this size on it must not.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# And freed memory that goes back to the system costs page faults when it is needed again, which no device's allocator has.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
SIX = [name for name in CASES if name != "tiny"]


def shape_of(case: Case) -> ModelShape:
    return TINY if case.name == "tiny" else SHAPE


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def make_model(case: Case, device: str) -> nn.Module:
    torch.manual_seed(0)
    model: Any = build(shape_of(case), device, dtype_of(device))
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as GRPOTrainer does
    enable_prefix_grouper(model, self_check=False)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def fused_head(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    return model(**inputs, shift_labels=labels, fused_lm_head=True).log_probs[labels != IGNORED]


def steps(model: nn.Module, case: Case, device: str, **options: Any) -> dict[str, Step]:
    return steps_of(model, update_of(case, device), head=fused_head, **options)


def update_of(case: Case, device: str) -> Update:
    return Update.random(case.prompt, case.responses, case.rows, shape_of(case).vocab_size, device)


def estimated(case: Case, device: str) -> tuple[Training, Schedule]:
    """What `plan` makes of this case."""
    parts = len(case.responses) // case.rows
    sizes = TRLSizes(len(case.responses), case.rows, parts, parts)
    prompts = Prompts([torch.arange(case.prompt)], beginnings_share=True)
    shape = shape_of(case)
    training = Training(
        shape,
        shape.num_weights,
        element_size=dtype_of(device).itemsize,
        lora_rank=16 if case.lora else None,
        checkpointing=case.checkpointing,
        optimizer_size=0,
        on_cpu=device == "cpu",
    )
    return training, trl_schedule(prompts, case.responses, sizes)


def memory(case: Case, way: str, device: str) -> float:
    """MiB at the peak of one update, the model included."""
    if device == "cpu":
        return float(in_a_fresh_process(["plan_check.py", "--memory-of", case.name, way], FREED_AT_ONCE))
    return peak_mib(lambda: steps(make_model(case, device), case, device)[way], device)


def times_as_fast_in_turns(case: Case, repeats: int, device: str) -> float:
    timings = take_turns(steps(make_model(case, device), case, device), repeats=repeats, device=device)
    return times_as_fast(timings[SHARED], timings[STOCK])


def speed(case: Case, repeats: int, device: str) -> float:
    """How many times as fast shared updates are."""
    if device == "cpu":
        return float(in_a_fresh_process(["plan_check.py", "--speed-of", case.name, str(repeats)], KEPT))
    return times_as_fast_in_turns(case, repeats, device)


def warm(device: str) -> None:
    """Load what torch loads at the first update, so that it is not counted as the update's."""
    case = CASES["tiny"]
    for step in steps(make_model(case, device), case, device).values():
        step()


def token_ratio(model: nn.Module, case: Case, device: str) -> float:
    """Tokens that pass the input embedding in a shared update, divided by those of the rows without padding."""
    passed: list[int] = []
    embedding: Any = transformers_model(model).get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_pre_hook(lambda module, inputs: passed.append(inputs[0].numel()))
    steps(model, case, device)[SHARED]()
    hook.remove()
    return sum(passed) / sum(case.prompt + response for response in case.responses)


def measure(case: Case, repeats: int, device: str) -> dict[str, Any]:
    """A row of the table."""
    training, schedule = estimated(case, device)
    ratio = token_ratio(make_model(case, device), case, device)
    faster = speed(case, repeats, device)
    expected = training.update_flops(schedule.stock) / training.update_flops(schedule.shared)
    row: dict[str, Any] = {
        "case": case.name,
        "prompt": case.prompt,
        "responses": sum(case.responses),
        "group": len(case.responses),
        "rows": case.rows,
        "token_ratio_estimated": number(schedule.token_ratio, 6),
        "token_ratio_measured": number(ratio, 6),
        "times_as_fast_estimated": number(expected, 3),
        "times_as_fast_measured": number(faster, 3),
        "speed_error_percent": number(100 * (expected / faster - 1), 2),
    }
    for way, loads in ((STOCK, schedule.stock), (SHARED, schedule.shared)):
        mib, peak = memory(case, way, device), training.peak_bytes(loads) / 2**20
        row |= {
            f"{way}_peak_mib_estimated": number(peak),
            f"{way}_peak_mib_measured": number(mib),
            f"{way}_memory_error_percent": number(100 * (peak / mib - 1), 2),
        }
    print(row, flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=SIX)
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--speed-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    use(args.device)
    if args.memory_of:
        name, way = args.memory_of
        warm(args.device)
        case = CASES[name]
        print(json.dumps(peak_mib(lambda: steps(make_model(case, args.device), case, args.device)[way], args.device)))
        return
    if args.speed_of:
        name, repeats = args.speed_of
        print(json.dumps(times_as_fast_in_turns(CASES[name], int(repeats), args.device)))
        return
    note = "peak memory with weights and gradients, without an optimizer; errors: estimated / measured - 1"
    rows = []
    for name in args.cases:
        rows.append(measure(CASES[name], args.repeats, args.device))
        write_csv(args.output or RESULTS / f"plan-check-{args.device}.csv", rows, args.device, note, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1:])
