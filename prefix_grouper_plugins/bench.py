"""Time attention over a packed group against attention over each of its rows, forward and backward, on this machine.

`prefix-grouper bench` prints it for a user's own lengths; the scripts in benchmarks/ measure more methods with the same
clocks. Methods take turns, one run of each at a time, so that a machine which is busy for a while slows all of them;
ratios are taken turn by turn, and the median of them counts.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_grouper_plugins.attention import shared_prefix_attention
from prefix_grouper_plugins.forest import visible_pairs, visible_pairs_of_rows
from prefix_grouper_plugins.layout import PrefixLayout

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # packed [T, H, D], [T, H_kv, D], [T, H_kv, D] -> [T, H, D]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One group, and the shape of one attention layer.

    Attributes:
        prompt, response, group: tokens of the prompt and of each response, and how many responses.
        num_heads, num_kv_heads, head_dim: of the layer.
        device, dtype: where and in what precision.
    """

    prompt: int
    response: int
    group: int
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def layout(self) -> PrefixLayout:
        return PrefixLayout.from_groups([self.prompt], [[self.response] * self.group], device=self.device)

    @property
    def pair_ratio(self) -> float:
        """Visible pairs of the rows, divided by those of the packed group: what sharing can gain at most."""
        return visible_pairs_of_rows(self.layout.row_lengths) / visible_pairs(self.layout.segments)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value for so many tokens, with gradients."""

        def random(heads: int) -> Tensor:
            shape = (tokens, heads, self.head_dim)
            return torch.randn(shape, device=self.device, dtype=self.dtype, requires_grad=True)

        return random(self.num_heads), random(self.num_kv_heads), random(self.num_kv_heads)

    def step(self, attention: Attention, tokens: int) -> Step:
        """Forward and backward of ``attention`` on ``tokens`` random tokens that are made now."""
        inputs = self.inputs(tokens)
        grad = torch.randn_like(inputs[0])

        def run() -> None:
            torch.autograd.grad(attention(*inputs), inputs, grad)

        return run


def shared_step(case: Case, backend: str = "auto") -> Step:
    """Our attention over the packed group."""
    layout = case.layout
    return case.step(lambda q, k, v: shared_prefix_attention(q, k, v, layout, backend=backend), layout.num_tokens)


def row_step(case: Case) -> Step:
    """Causal flash attention over each row alone, rows laid end to end: what a padding-free trainer runs today.

    On CUDA one varlen flash call (of torch, through a layout that shares nothing); on the CPU, whose flash kernel has no
    varlen form, one call of ``scaled_dot_product_attention`` for each row.
    """
    lengths = list(case.layout.row_lengths)
    if case.device == "cpu":
        return case.step(lambda q, k, v: _row_by_row(q, k, v, lengths), sum(lengths))
    # A group of one response is one segment, of as many tokens as its prompt and response less one.
    alone = PrefixLayout.from_groups([2] * len(lengths), [[n - 1] for n in lengths], device=case.device)
    flash = "merged_lse"  # one causal segment for each row: a single call, nothing to merge
    return case.step(lambda q, k, v: shared_prefix_attention(q, k, v, alone, backend=flash), alone.num_tokens)


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    out = []
    for row in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in row)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: by the wall clock, and of the process on all its cores (CUDA: the wall clock again)."""

    wall: float
    cpu: float


def take_turns(
    steps: Mapping[str, Step], *, repeats: int, seconds: float = 0.0, device: str = "cpu", warm_up: bool = True
) -> dict[str, list[Timing]]:
    """Run the steps in turns, ``repeats`` times, and on until ``seconds`` are over (at most 25 times).

    With ``warm_up`` each runs once before that, unless the caller has seen to it.
    """
    for step in steps.values() if warm_up else ():
        step()
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    started = time.perf_counter()
    for turn in range(max(repeats, 25)):
        if turn >= repeats and time.perf_counter() - started > seconds:
            break
        for name, step in steps.items():
            timings[name].append(_timed(step, device))
    return timings


def _timed(step: Step, device: str) -> Timing:
    cuda = device != "cpu"
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timing(wall, wall if cuda else cpu)


def times_as_fast(ours: list[Timing], theirs: list[Timing], clock: str = "cpu") -> float:
    """Median over the turns of their time divided by ours."""
    return median(getattr(b, clock) / getattr(a, clock) for a, b in zip(ours, theirs, strict=True))


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Processor or GPU, versions and date: what belongs to every figure."""
    if device == "cpu":
        machine = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    else:
        machine = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"machine": machine, **versions, "date": datetime.date.today().isoformat()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
