"""Is attention on this GPU right, and what does a layer launch? `make gpu-check`: some minutes on one GPU.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --dry-run       tiny, on the CPU, with emulated flash kernels: does the script run?

First each backend on layouts up to 128,000 tokens, in memory that was filled with NaN before, against torch's own attention
over each row: outputs and gradients (`difference`, relative, in the Frobenius norm) and whether all of them are finite. Then
a layer's milliseconds on the host and in all, and its kernels. Last the tests of tests/attention that need a GPU. Each case
runs in a process of its own (`isolated.py`). The exit status is 1 where a case has failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from harness import number, use
from isolated import ROOT, Work, add_options, emit, run_all
from torch import Tensor

from prefix_grouper_plugins import PrefixLayout, shared_prefix_attention
from prefix_grouper_plugins.attention import available_backends

COLUMNS = ("backend", "tokens", "difference", "finite", "host_ms", "wall_ms", "kernels", "slowest_kernels")
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-7B
# Half precision rounds each output and gradient by 2**-9 of itself or so, and torch's own attention does too.
LARGEST_DIFFERENCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
BACKENDS = ("merged_lse", "triton")
GROUPS: dict[str, tuple[list[int], list[list[int]]]] = {
    "short prompt": ([64], [[512] * 8]),
    "three groups": ([256] * 3, [[100] * 4] * 3),
    "prompts of 2, 300 and 1 tokens": ([2, 300, 1], [[1] * 5, [7] * 9, [3]]),
    "long prompt": ([16384], [[1024] * 16]),
    "120,000 tokens of prompt": ([120000], [[512] * 8]),
}
TINY_GROUPS: dict[str, tuple[list[int], list[list[int]]]] = {
    "short prompt": ([6], [[9] * 3]),
    "three groups": ([20] * 3, [[6] * 4] * 3),
    "long prompt": ([70], [[9] * 4]),
}
# Trees of three levels above the responses, which are merged in one pass: tokens of a segment of each level, and how many hang on
# each above. What copying costs decides whether levels are merged, so the forward's case has a key head for each query head.
MERGED_FORWARD, MERGED_BACKWARD = "three levels merged in the forward", "three levels merged in the backward"
TREES = {
    MERGED_FORWARD: ((700, 700, 700, 90), (2, 2, 4)),
    MERGED_BACKWARD: ((8000, 2000, 2000, 90), (2, 2, 4)),
}
TINY_TREES = {MERGED_FORWARD: ((20, 20, 20, 4), (2, 2, 3)), MERGED_BACKWARD: ((90, 20, 20, 4), (3, 3, 2))}
LAYERS = ((8192, 1024, 8), (16384, 1024, 16), (1024, 256, 8), (256, 512, 8), (64, 512, 8))
TINY_LAYERS = ((40, 6, 3), (6, 9, 3))
TESTS = ("tests/attention/test_attention_cuda.py", "tests/attention/backends/merged_lse/test_cuda.py")


class Machine:
    """Where the cases run: a GPU, or for a dry run the CPU with emulated kernels."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.shape = (4, 2, 16) if dry else (HEADS, KV_HEADS, HEAD_DIM)
        self.layers = TINY_LAYERS if dry else LAYERS

    def layouts(self) -> dict[str, Callable[[], PrefixLayout]]:
        """Functions that make them, so that a case makes its own alone."""
        groups = TINY_GROUPS if self.dry else GROUPS
        found = {name: lambda lengths=lengths: self._groups(*lengths) for name, lengths in groups.items()}
        tree, short, response = (9, 2, 4) if self.dry else (700, 24, 90)
        found["system prompt above two prompts"] = lambda: self._tree(tree, tree, response)
        found["a short beginning above two prompts"] = lambda: self._tree(short, 4 * tree, response)
        for name, sizes in (TINY_TREES if self.dry else TREES).items():
            found[name] = lambda sizes=sizes: self._levels(*sizes)
        prompt = 30 if self.dry else 8192
        found["two responses to a given prompt"] = lambda: self._groups([prompt], [[response] * 2]).given(prompt - 1)
        found["one response to a given prompt"] = lambda: self._groups([prompt], [[response]]).given(prompt - 1)
        return found  # type: ignore[return-value]

    def _groups(self, prompts: list[int], responses: list[list[int]]) -> PrefixLayout:
        return PrefixLayout.from_groups(prompts, responses, device=self.device)

    def _tree(self, system: int, prompt: int, response: int) -> PrefixLayout:
        """Rows of a system prompt, one of two prompts and a response, each of other tokens."""
        generator = torch.Generator().manual_seed(0)
        pieces = [torch.randint(1 << 20, (n,), generator=generator) for n in [system, prompt, prompt] + [response] * 6]
        beginning, prompts, responses = pieces[0], pieces[1:3], pieces[3:]
        rows = [torch.cat([beginning, prompts[i % 2], tokens]).to(self.device) for i, tokens in enumerate(responses)]
        return PrefixLayout.from_rows(rows)

    def _levels(self, lengths: tuple[int, ...], children: tuple[int, ...]) -> PrefixLayout:
        """A tree whose segments on one level are of one length, and have as many segments below them."""
        segments, parents = [lengths[0]], [-1]

        def grow(parent: int, level: int) -> None:
            for _ in range(children[level]):
                segments.append(lengths[level + 1])
                parents.append(parent)
                if level + 1 < len(children):
                    grow(len(parents) - 1, level + 1)

        grow(0, 0)
        return PrefixLayout.from_segments(segments, parents)

    def heads(self, name: str) -> tuple[int, int]:
        """Query heads and key heads of a layout."""
        return self.shape[0], self.shape[0 if name == MERGED_FORWARD else 1]

    def inputs(self, layout: PrefixLayout, name: str = "") -> list[Tensor]:
        """Query, key and value, with gradients."""
        torch.manual_seed(0)
        (heads, kv_heads), head_dim = self.heads(name), self.shape[2]
        sizes = ((layout.num_queries, heads), (layout.num_tokens, kv_heads), (layout.num_tokens, kv_heads))
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "requires_grad": True}
        return [torch.randn(tokens, count, head_dim, **options) for tokens, count in sizes]

    def why_not(self, backend: str) -> str | None:
        """Why a backend cannot run here."""
        return available_backends(self.device, self.dtype, self.shape[2])[backend]


def step(attention: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    out = attention(*tensors)
    generator = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def row_by_row(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout) -> Tensor:
    """Torch's own attention over each path from a root to a segment: the reference.

    A segment's queries see its ancestors and, causally, itself. Keys of a path are gathered, so this shares nothing with ours.
    """
    outs, paths = [], []
    for start, end, parent, _ in layout.segments.tolist():
        own = torch.arange(start, end, device=key.device)
        paths.append(own if parent < 0 else torch.cat([paths[parent], own]))
        if start < layout.num_given:
            continue
        path = paths[-1]
        q = query[start - layout.num_given : end - layout.num_given]
        # Made-up queries in front of the segment's own make the causal mask square, which flash kernels take.
        q = torch.cat([q.new_zeros(len(path) - len(q), *q.shape[1:]), q]).transpose(0, 1)[None]
        k, v = (x[path].transpose(0, 1)[None] for x in (key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        outs.append(out[0, :, start - end :].transpose(0, 1))
    return torch.cat(outs)


def compare(machine: Machine, name: str, backend: str) -> None:
    """One layout with one backend, against the reference."""
    layout = machine.layouts()[name]()
    facts = {"backend": backend, "tokens": layout.num_tokens}
    if (reason := machine.why_not(backend)) is not None:
        emit(**facts, status=f"left out: {reason}")
        return
    tensors = machine.inputs(layout, name)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return shared_prefix_attention(query, key, value, layout, backend=backend)

    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written to then holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    poisoned = step(attention, tensors)
    torch.use_deterministic_algorithms(False)
    found = step(attention, tensors)
    finite = all(bool(torch.isfinite(x).all()) for x in (*poisoned, *found))
    expected = step(lambda *x: row_by_row(*x, layout), tensors)
    differences = [relative(a, b) for both in (poisoned, found) for a, b in zip(both, expected, strict=True)]
    limit = LARGEST_DIFFERENCE[machine.dtype]
    well = finite and max(differences) <= limit
    emit(
        **facts,
        difference=" ".join(number(x, 2) for x in differences[4:]),
        finite=finite,
        status="ok" if well else f"failed: differences of output, dq, dk and dv are to be at most {limit}, and finite",
    )


def relative(a: Tensor, b: Tensor) -> float:
    """Of the difference, in the Frobenius norm; infinite where there is a NaN."""
    value = ((a - b).float().norm() / b.float().norm()).item()
    return value if value == value else float("inf")


def time_layer(machine: Machine, sizes: tuple[int, int, int], backend: str) -> None:
    """Milliseconds and kernels of a layer, forward and backward."""
    prompt, response, group = sizes
    layout = PrefixLayout.from_groups([prompt], [[response] * group], device=machine.device)
    facts = {"backend": backend, "tokens": layout.num_tokens}
    if (reason := machine.why_not(backend)) is not None:
        emit(**facts, status=f"left out: {reason}")
        return
    tensors = machine.inputs(layout)
    grad = torch.randn_like(tensors[0])

    def run() -> None:
        torch.autograd.grad(shared_prefix_attention(*tensors, layout, backend=backend), tensors, grad)

    repeats = 2 if machine.dry else 20
    for _ in range(3):
        run()
    wait(machine)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    host = time.perf_counter() - started
    wait(machine)
    wall = time.perf_counter() - started
    times = {"host_ms": number(host / repeats * 1e3), "wall_ms": number(wall / repeats * 1e3)}
    emit(**facts, **times, **({} if machine.dry else kernels_of(run)))


def wait(machine: Machine) -> None:
    if not machine.dry:
        torch.cuda.synchronize()


def kernels_of(run: Callable[[], None]) -> dict[str, Any]:
    """How many kernels a step launches, and its slowest ones with their microseconds."""
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    slowest = sorted(events, key=lambda event: -event.self_device_time_total)[:8]
    text = "; ".join(f"{e.key[:60]} x{e.count} {e.self_device_time_total:.0f} us" for e in slowest)
    return {"kernels": sum(event.count for event in events), "slowest_kernels": text}


def run_tests(dry: bool) -> None:
    """The tests that need a GPU, side by side; in a dry run they are only collected."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        emit(status=f"left out: {' and '.join(missing)} not installed")
        return
    side_by_side = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *TESTS]
    command += ["--collect-only"] if dry else side_by_side
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines() or [result.stderr.strip()[-300:]]
    print("\n".join(lines[-40:]), flush=True)
    emit(difference=lines[-1][:200], status="failed: see the log" if result.returncode else "ok")


def works(machine: Machine) -> list[Work]:
    """All cases, in the order in which they run."""
    script = ["benchmarks/gpu_check.py", *(["--dry-run"] if machine.dry else []), "--case"]
    names = [f"{name}/{backend}" for backend in BACKENDS for name in machine.layouts()]
    names += [f"layer {','.join(map(str, sizes))}/{backend}" for backend in BACKENDS for sizes in machine.layers]
    # Triton compiles some ten kernels once; they stay on disk for the cases behind.
    found = [Work(name, [*script, name], 180.0 if name.endswith("triton") else 90.0) for name in names]
    return [*found, Work("tests", [*script, "tests"], 270.0)]


def run_case(machine: Machine, name: str) -> None:
    """One case, in the process that is its own."""
    if name == "tests":
        run_tests(machine.dry)
        return
    what, _, backend = name.rpartition("/")
    with ExitStack() as stack:
        if machine.dry:
            from emulation import flash_on_cpu

            stack.enter_context(flash_on_cpu())
        if what.startswith("layer "):
            prompt, response, group = map(int, what.removeprefix("layer ").split(","))
            time_layer(machine, (prompt, response, group), backend)
        else:
            compare(machine, what, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "gpu-check.csv")
    args = parser.parse_args(arguments)
    machine = Machine(args.dry_run)
    use(machine.device)
    if args.case:
        run_case(machine, args.case)
        return 0
    note = f"{machine.shape[0]}:{machine.shape[1]} heads of {machine.shape[2]}, {machine.dtype}; difference: of output, dq, dk, dv"
    return int(run_all(works(machine), args, COLUMNS, note) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
