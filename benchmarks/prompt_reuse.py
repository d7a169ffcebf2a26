"""What does the update of one group cost when micro-batches are smaller than the group?

    python benchmarks/prompt_reuse.py      CPU, one thread: G = 8 by micro-batches of 1 ... 8 rows, then G = 1 ... 64 by 1
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/prompt_reuse.py --peaks     peak memory by layers and checkpointing alone

One optimizer step of a policy-gradient loss on a small Qwen2 model, in micro-batches of ``rows`` rows, in three ways:

    stock     each micro-batch as padded rows, as TRL forwards it
    packed    each micro-batch as a packed row of its own: its rows share their prompt, the next micro-batch runs it again
    reused    as our TRL trainer does it: one forward takes as many micro-batches as hold no more tokens than one of stock, and
              where the group does not fit into one, each runs its completions against the prompt, which was forwarded once, and
              whose layers run again in the backward where that costs less; micro-batches that would save next to nothing are
              padded rows

In each way the head computes the logits of ``CHUNK`` positions at a time and again in the backward, as TRL does since 1.15, so the
memory of a forward is that of its layers.

Two cases have nothing to gain: a group of one row, and a short prompt. ``bound`` is the ratio of the FLOPs of stock and reused
(prefix_grouper_plugins/cost.py): attention between completions and prompt, and the head, cost what they cost in stock.
Seconds are of the process, in turns; peak memory is that of a fresh process for each way, above the model and its gradients.
Stock and packed take no more memory for a larger group, only longer, so they are left out where it is large. `--peaks` compares
deeper models, with their layers' graphs kept and under gradient checkpointing; the variable keeps the allocator of glibc from
holding what was freed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import RESULTS, in_a_fork, number, peak_mib, use, write_csv
from models import SMALL, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.bench import Step, take_turns, times_as_fast
from prefix_grouper_plugins.cost import compare
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache, decoder
from prefix_grouper_plugins.modeling.recomputation import recomputable_layers
from prefix_grouper_plugins.token_budget import Most, RowTokens, cost_of_forward, pays_to_pack, plan_forwards

SHAPE = SMALL
LENGTHS = ((1024, 64), (512, 512))  # prompt and response
ROWS = (1, 2, 4, 8)  # of a micro-batch, with a group of 8
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # with micro-batches of 1 row
SHORT = (16, 512, 8, 8)  # prompt, response, group and rows where next to nothing is shared
CHUNK = 64  # positions whose logits exist at a time
DEPTHS = (4, 8, 24)  # layers of the models whose peaks are compared
MOST_ROWS_APART = 16  # of a group that is timed in the other ways, too


def group_of(prompt: int, response: int, group: int) -> tuple[Tensor, Tensor]:
    """Prompts ``[G, P]``, all the same, and completions ``[G, R]``."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, SHAPE.vocab_size, (1, prompt), generator=generator)
    return ids.expand(group, -1), torch.randint(1, SHAPE.vocab_size, (group, response), generator=generator)


def loss_of(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of log-probs, every token with an advantage of its own: ``hidden [N, H]``, ``targets [N]``."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([checkpoint(_loss_of_chunk, model.lm_head, *part, use_reentrant=False) for part in parts]).sum()


def _loss_of_chunk(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logps = head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return (logps * targets.cos()).sum()


def stock(model: nn.Module, prompts: Tensor, completions: Tensor, rows: int) -> None:
    for prompt, completion in zip(prompts.split(rows), completions.split(rows), strict=True):
        ids = torch.cat([prompt, completion], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hidden = decoder(model)(**inputs, use_cache=False).last_hidden_state[:, prompt.shape[1] - 1 : -1]
        loss_of(model, hidden.flatten(0, 1), completion.flatten()).backward()


def packed(model: nn.Module, prompts: Tensor, completions: Tensor, rows: int) -> None:
    for batch in _batches(prompts, completions, rows):
        _backward(model, batch)


def reused(model: nn.Module, prompts: Tensor, completions: Tensor, rows: int) -> None:
    (group, prompt), response = prompts.shape, completions.shape[1]
    if saves_nothing(prompt, response, group, rows):
        stock(model, prompts, completions, rows)
        return
    row = RowTokens.of("the prompt", prompt, response)
    micro_batches = [[row] * len(part) for part in range_parts(group, rows)]
    cache = PromptCache()
    cost = None if model.is_gradient_checkpointing else cost_of_forward("cpu")  # type: ignore[attr-defined]
    for forward in plan_forwards(micro_batches, Most(rows * (prompt + response)), group, cost_of_forward=cost):
        first, end = (number * rows for number in (forward.micro_batches.start, forward.micro_batches.stop))
        (batch,) = _batches(prompts[first:end], completions[first:end], end - first)
        if forward.shared:
            if first == 0:
                again = recomputable_layers(Anatomy(model)) if forward.recomputed else ()
                cache.run(model, PrefixLayout.from_rows([prompts[0]]), prompts[0, :-1], recompute=again)
            batch = batch.behind_prompt()
            cache.prepare(batch.layout, last=end >= group)
        _backward(model, batch)


def saves_nothing(prompt: int, response: int, group: int, rows: int) -> bool:
    """Whether the group is one micro-batch, which our trainer forwards as padded rows."""
    packed, padded = prompt - 1 + group * response, group * (prompt + response)
    return group <= rows and not pays_to_pack(packed, padded, group)


def _batches(prompts: Tensor, completions: Tensor, rows: int) -> list[GroupedBatch]:
    pairs = zip(prompts.split(rows), completions.split(rows), strict=True)
    return [GroupedBatch(p, torch.ones_like(p), c, torch.ones_like(c)) for p, c in pairs]


def _backward(model: nn.Module, batch: GroupedBatch) -> None:
    inputs = packed_inputs(batch.layout, batch.input_ids, batch.position_ids)
    hidden = decoder(model)(**inputs).last_hidden_state[0, batch.positions]
    loss_of(model, hidden, batch.labels[batch.positions]).backward()


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor, int], None]] = {"stock": stock, "packed": packed, "reused": reused}


def step_of(
    way: str,
    prompt: int,
    response: int,
    group: int,
    rows: int,
    *,
    layers: int | None = None,
    checkpointing: bool = False,
) -> Step:
    """One update of a model of its own, whose gradients exist already, so that they do not count as memory of the step."""
    torch.manual_seed(0)
    model = build(SHAPE if layers is None else dataclasses.replace(SHAPE, num_layers=layers), "cpu", torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    if way != "stock":
        enable_prefix_grouper(model, self_check=False)
    batch = group_of(prompt, response, group)

    def step() -> None:
        for weight in model.parameters():
            weight.grad.zero_()  # type: ignore[union-attr]
        WAYS[way](model, *batch, rows)

    return step


def ways_of(group: int) -> list[str]:
    return [way for way in WAYS if way == "reused" or group <= MOST_ROWS_APART]


def memory(way: str, sizes: Sequence[int], **options: Any) -> float:
    """MiB at the peak of a step, in a fresh process. Options are those of :func:`step_of`."""

    def measure() -> float:
        step = step_of(way, *sizes, **options)
        return peak_mib(lambda: step, "cpu")

    return in_a_fork(measure)


def measure(sizes: tuple[int, int, int, int], repeats: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    """A row of the table for each way, whose peak memory is known."""
    prompt, response, group, rows = sizes
    ways = ways_of(group)
    timings = take_turns({way: step_of(way, *sizes) for way in ways}, repeats=repeats)
    tokens = {
        "stock": group * (prompt + response),
        "packed": sum(prompt - 1 + response * len(part) for part in range_parts(group, rows)),
        "reused": prompt - 1 + group * response,
    }
    if saves_nothing(*sizes):
        tokens["reused"] = tokens["stock"]
    layout = PrefixLayout.from_groups([prompt], [[response] * group])
    cost = compare(SHAPE, layout, scored=group * response, element_size=4)
    flops = [own.training_flops + own.head for own in (cost.ordinary, cost.shared)]
    found = []
    for way in ways:
        row = {
            "prompt": prompt, "response": response, "group": group, "rows": rows, "way": way,
            "tokens": tokens[way], "token_ratio": number(tokens[way] / tokens["stock"], 3),
            "seconds": number(median(t.cpu for t in timings[way])),
            "times_as_fast": number(times_as_fast(timings[way], timings["stock"]), 3) if "stock" in ways else "",
            "bound": number(flops[0] / flops[1], 3) if way == "reused" else "",
            "peak_mib": number(peaks[way]),
        }  # fmt: skip
        print(row, flush=True)
        found.append(row)
    return found


def peaks_by_depth() -> list[dict[str, Any]]:
    """A row for each depth, with and without gradient checkpointing, of the smallest micro-batches."""
    sizes, found = (*LENGTHS[0], 8, 1), []
    for layers in DEPTHS:
        for checkpointing in (False, True):
            options = {"layers": layers, "checkpointing": checkpointing}
            peaks = {f"{way}_mib": number(memory(way, sizes, **options)) for way in ("stock", "reused")}
            found.append(options | peaks)
            print(found[-1], flush=True)
    return found


def range_parts(group: int, rows: int) -> list[range]:
    return [range(start, min(start + rows, group)) for start in range(0, group, rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of a micro-batch, with a group of 8")
    parser.add_argument("--groups", type=int, nargs="*", default=GROUPS, help="with micro-batches of 1 row")
    parser.add_argument("--peaks", action="store_true", help="peak memory of deeper models alone")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    output = args.output or RESULTS / f"prompt-reuse-{'peaks-' * args.peaks}cpu.csv"
    use("cpu")
    if args.peaks:
        write_csv(
            output, peaks_by_depth(), "cpu", "peak MiB of an update of 8 x (1024 + 64) tokens, micro-batches of a row"
        )
        return
    cases = [(*lengths, 8, rows) for lengths in LENGTHS for rows in args.rows] + [SHORT]
    cases += [(*LENGTHS[0], group, 1) for group in args.groups if (*LENGTHS[0], group, 1) not in cases]
    peaks = {case: {way: memory(way, case) for way in ways_of(case[2])} for case in cases}  # before any step runs here
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, args.repeats, peaks[case])
        write_csv(output, rows, "cpu", "seconds of the process, median of the turns; times_as_fast: against stock")


if __name__ == "__main__":
    main(sys.argv[1:])
