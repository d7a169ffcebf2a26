"""What does one actor update cost, forward and backward with log-probabilities, gradient checkpointing on?

    python benchmarks/actor_update.py --device cuda               Qwen2.5-0.5B, 1.5B and 7B shapes, full and LoRA
    python benchmarks/actor_update.py                             CPU, one thread: 4 layers of the Qwen2.5-0.5B shape

Weights are random, float32 on the CPU and bfloat16 on a GPU. Four ways, in turns:

    stock       TRL's: padded rows, logits of the completion and log-softmax on them in full
    rows        each row on its own, without padding (varlen flash attention), head in chunks: packed ordinary
    published   the package `prefix-grouper`, head in chunks
    ours        `prefix_grouped_logps`

A way that runs out of memory gets no time. Peak memory is that of the update above weights, gradients included (CPU: of a
fresh process for each way).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from harness import RESULTS, in_a_fresh_process, number, peak_mib, use, write_csv
from models import MODELS, QWEN3, SIZES, build, published_inputs, shape_of, use_published_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefix_grouper_plugins import PrefixLayout, disable_prefix_grouper, enable_prefix_grouper, prefix_grouped_logps
from prefix_grouper_plugins.bench import Step, Timing, take_turns, times_as_fast
from prefix_grouper_plugins.cost import compare
from prefix_grouper_plugins.scoring import CHUNK_SIZE

CPU_LAYERS = 4  # all 24 would take an hour
CASES = {"cpu": ((512, 32, 8),), "cuda": ((8192, 1024, 8), (4096, 512, 8), (4096, 4096, 4))}
WARM_UP_IDS = 16  # token ids below this, which every vocabulary has


class Batch(NamedTuple):
    """A group as a trainer has it: ``prompt_ids [G, P]`` and ``completion_ids [G, R]``, nothing padded."""

    prompt_ids: Tensor
    completion_ids: Tensor


def make_batch(sizes: tuple[int, int, int], vocabulary: int, device: str) -> Batch:
    prompt, response, group = sizes
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(vocabulary, (1, prompt), generator=generator).expand(group, -1)
    completion_ids = torch.randint(vocabulary, (group, response), generator=generator)
    return Batch(prompt_ids.to(device), completion_ids.to(device))


def stock(model: nn.Module, batch: Batch) -> Tensor:
    """As `GRPOTrainer._get_per_token_logps_and_entropies` (TRL 1.16) without its fused head."""
    from trl.trainer.utils import selective_log_softmax

    ids, length = torch.cat(batch, dim=1), batch.completion_ids.shape[1]
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1, use_cache=False).logits
    return selective_log_softmax(logits[:, :-1], batch.completion_ids)


def ours(model: nn.Module, batch: Batch) -> Tensor:
    masks = (torch.ones_like(ids) for ids in batch)
    prompt_mask, completion_mask = masks
    return prefix_grouped_logps(model, batch.prompt_ids, prompt_mask, batch.completion_ids, completion_mask)[0]


def rows(model: nn.Module, batch: Batch) -> Tensor:
    """The same code on prompts that differ in their first token, so that nothing is shared."""
    prompt_ids = batch.prompt_ids.clone()
    prompt_ids[:, 0] = torch.arange(len(prompt_ids), device=prompt_ids.device)
    return ours(model, Batch(prompt_ids, batch.completion_ids))


def published(model: nn.Module, batch: Batch) -> Tensor:
    """One grouped pass, then the responses and the prompt's last position split off, as in the package's README."""
    from prefix_grouper import PrefixGrouper

    (group, response), prompt = batch.completion_ids.shape, batch.prompt_ids.shape[1]
    device = str(batch.prompt_ids.device)
    grouper = PrefixGrouper([[prompt] + [response] * group], device=device)
    ids = torch.cat([batch.prompt_ids[0], batch.completion_ids.flatten()])[None]
    base = base_of(model)
    hidden = base.model(ids, **published_inputs(grouper, prompt, response, group, device)).last_hidden_state
    states = grouper.split_output(hidden, include_prefix_last=1)[2][:, :-1].flatten(0, 1)
    parts = [
        checkpoint(_chunk, base.lm_head, x, y, use_reentrant=False)
        for x, y in zip(states.split(CHUNK_SIZE), batch.completion_ids.flatten().split(CHUNK_SIZE), strict=True)
    ]
    return torch.cat(parts).view(group, response)


def _chunk(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden).float()
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


WAYS: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "stock": stock,
    "rows": rows,
    "published": published,
    "ours": ours,
}


def why_not(way: str, lora: bool) -> str | None:
    """Why a way cannot run here: what it needs is not installed."""
    needed = {"stock": "trl", "published": "prefix_grouper"}.get(way)
    missing = [name for name in (needed, "peft" if lora else None) if name and importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def base_of(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def prepare(model: nn.Module, way: str) -> str:
    """Give the model the attention that ``way`` runs on; returns its name, by which to switch back to it."""
    base = base_of(model)
    disable_prefix_grouper(base)
    base.config._attn_implementation = "sdpa"
    if way == "published":
        use_published_attention(base)
    elif way == "rows":  # the flash kernels of torch, one call for all rows
        enable_prefix_grouper(base, backend="merged_lse", self_check=False)
    elif way == "ours":
        enable_prefix_grouper(base, self_check=False)
    return base.config._attn_implementation


def step_of(model: nn.Module, batch: Batch, way: str) -> Step:
    """An update without the optimizer: policy gradient with random advantages."""
    advantages = torch.linspace(-1, 1, len(batch.prompt_ids), device=batch.prompt_ids.device)[:, None]
    config, name = base_of(model).config, prepare(model, way)

    def run() -> None:
        config._attn_implementation = name
        try:
            (WAYS[way](model, batch) * advantages).sum().backward()
        finally:  # out of memory too
            model.zero_grad(set_to_none=True)

    return run


def steps_of(model: nn.Module, batch: Batch, ways: Sequence[str]) -> dict[str, Step]:
    """The steps of several ways on one model, whichever of them comes last."""
    # Ours last: the others would take our hooks away, which do nothing in them.
    steps = {way: step_of(model, batch, way) for way in sorted(ways, key=("rows", "ours").__contains__)}
    return {way: steps[way] for way in ways}


def make_model(name: str, layers: int | None, lora: bool, device: str) -> nn.Module:
    """A model of this shape with gradient checkpointing, all weights or a LoRA on all linear layers trained."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = build(shape_of(name, layers), device, dtype, name in QWEN3)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def measure(name: str, lora: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the CSV for each case and way that can run here; says why the others cannot."""
    reasons = {way: why_not(way, lora) for way in args.ways}
    for way, reason in reasons.items():
        if reason is not None:
            print(f"{name} {'lora' if lora else 'full'}: {way} left out: {reason}", flush=True)
    ways = [way for way, reason in reasons.items() if reason is None]
    if not ways:
        return []
    model = make_model(name, args.layers, lora, args.device)
    shape = shape_of(name, args.layers)
    warm_up(model, ways, args.device)
    found = []
    for sizes in args.cases:
        batch = make_batch(sizes, shape.vocab_size, args.device)
        layout = PrefixLayout.from_groups([sizes[0]], [[sizes[1]] * sizes[2]])
        bound = compare(shape, layout, scored=sizes[1] * sizes[2]).checkpointed_speedup
        print(
            f"{name} {'lora' if lora else 'full'} {sizes}: ours at most {bound:.2f} times as fast as rows", flush=True
        )
        steps = steps_of(model, batch, ways)
        memory = {way: memory_of(step, way, name, lora, sizes, args) for way, step in steps.items()}
        fitting = {way: step for way, step in steps.items() if memory[way] is not None}
        timings = take_turns(fitting, repeats=args.repeats, seconds=args.seconds, device=args.device, warm_up=False)
        found += [row(name, lora, sizes, way, timings, memory[way], bound) for way in ways]
    return found


def warm_up(model: nn.Module, ways: Sequence[str], device: str) -> None:
    """On the CPU a few tokens do well enough; elsewhere measuring the memory runs each way at full length."""
    for way in ways if device == "cpu" else ():
        step_of(model, make_batch((8, 4, 2), WARM_UP_IDS, device), way)()


def memory_of(
    step: Step, way: str, name: str, lora: bool, sizes: tuple[int, int, int], args: argparse.Namespace
) -> float | None:
    """Peak MiB of a step; None where it does not fit, NaN where it is not asked for."""
    if not args.memory:
        return math.nan
    if args.device == "cpu":
        layers = [] if args.layers is None else ["--layers", str(args.layers)]
        case = ["--models", name, *layers, "--cases", ",".join(map(str, sizes))]
        training = ["--training", "lora" if lora else "full"]
        return in_a_fresh_process(["actor_update.py", "--memory-of", way, *case, *training])
    try:
        return peak_mib(lambda: step, args.device)
    except torch.cuda.OutOfMemoryError:
        return None


def print_memory_of(args: argparse.Namespace, name: str) -> None:
    """In a process of its own: one way, after a few tokens of the same."""
    model = make_model(name, args.layers, args.training == ["lora"], args.device)
    warm_up(model, [args.memory_of], args.device)
    batch = make_batch(args.cases[0], shape_of(name, args.layers).vocab_size, args.device)
    print(json.dumps(peak_mib(lambda: step_of(model, batch, args.memory_of), args.device)))


def row(
    name: str,
    lora: bool,
    sizes: tuple[int, int, int],
    way: str,
    timings: dict[str, list[Timing]],
    memory: float | None,
    bound: float,
) -> dict[str, Any]:
    seconds = median(timing.cpu for timing in timings[way]) if way in timings else math.nan
    ratio = times_as_fast(timings[way], timings["rows"]) if {way, "rows"} <= timings.keys() else math.nan
    held = "  out of memory" if memory is None else "" if math.isnan(memory) else f"{memory:10.0f} MiB"
    print(f"    {way:12}{seconds:9.3f} s {ratio:7.2f} times as fast as rows{held}", flush=True)
    return {
        "model": name,
        "training": "lora" if lora else "full",
        **dict(zip(("prompt", "response", "group"), sizes, strict=True)),
        "way": way,
        "seconds": number(seconds),
        "times_as_fast_as_rows": number(ratio),
        "flop_bound": number(bound),
        "peak_mib": "out of memory" if memory is None else number(memory),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is left open depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(CASES))
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), help="default: the smallest on the CPU, else all three"
    )
    parser.add_argument(
        "--layers", type=int, help=f"of the model, to take a part of it (default on the CPU: {CPU_LAYERS})"
    )
    parser.add_argument("--cases", nargs="+", help="prompt,response,group, e.g. 8192,1024,8")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--training", nargs="+", choices=("full", "lora"), default=("full", "lora"))
    parser.add_argument("--repeats", type=int, default=2, help="turns at least (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="go on until this much time is over, for short cases"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure the peak memory")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one way of one case, in a process of its own
    args = parser.parse_args(arguments)
    given = args.cases or []
    args.cases = [tuple(map(int, case.split(","))) for case in given] or list(CASES[args.device])
    if args.device == "cpu" and args.models is None and args.layers is None:
        args.layers = CPU_LAYERS
    args.models = args.models or (SIZES[:1] if args.device == "cpu" else SIZES)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    use(args.device)
    if args.memory_of:
        print_memory_of(args, args.models[0])
        return
    part = f"{args.layers} layers; " if args.layers else ""
    note = f"{part}gradient checkpointing; prompt and responses of equal lengths, so nothing is padded"
    found: list[dict[str, Any]] = []
    for name in args.models:
        for kind in args.training:
            found += measure(name, kind == "lora", args)
            # Now: a larger model may end the process.
            write_csv(args.output or RESULTS / f"actor-update-{args.device}.csv", found, args.device, note)


if __name__ == "__main__":
    main(sys.argv[1:])
