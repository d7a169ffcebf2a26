"""What does sharing cost on the host: microseconds of an attention layer, and how often a micro-batch waits for the device?

    python benchmarks/host_time.py             needs no GPU

A layer's forward and backward run through the CUDA driver with flash and Triton kernels that do nothing, so what is left is
Python, torch's dispatch, and the few operators between the kernels; the layers of a model follow one another as in a
training step. `machinery` is an autograd function that saves as many tensors and returns copies of its inputs: what torch takes
for any function with a backward of its own. `kernels` is what the stand-ins of the flash kernels take to make their outputs, as the
real ones would in C++. Ours is `attention` less both. `calls` are the functions that a layer calls, in Python or from it, and
`ours_calls` those less the machinery's: a busy machine changes the microseconds, and not these.

A wait is a read of a tensor that would lie on the device: an item, a list, a copy to the host, a mask taken as an index. They
are counted on marked tensors of a micro-batch, from the trainer's padded rows to the gradients, and listed with the line
that waits.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from emulation import flash_on_cpu
from harness import RESULTS, number, use, write_csv
from torch import Tensor

from prefix_grouper_plugins import (
    PrefixLayout,
    batch,
    enable_prefix_grouper,
    layout,
    prefix_grouped_logps,
    shared_prefix_attention,
)
from prefix_grouper_plugins.attention.backends.merged_lse import merge

ROOT = Path(__file__).parents[1]
LAYERS = 28
LAYOUTS = {
    "one group": PrefixLayout.from_groups([40], [[10] * 8]),
    "a short prompt, its keys gathered": PrefixLayout.from_groups([8], [[30] * 8]),
    "four groups": PrefixLayout.from_groups([40] * 4, [[10] * 8] * 4),
    "one response, its prompt given": PrefixLayout.from_groups([40], [[10]]).given(39),
}


# ---------------------------------------------------------------------------------------------------------- host time


class Machinery(torch.autograd.Function):
    """What attention asks of torch, whatever it computes: a forward that saves seven tensors, and a backward of three gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: None, call: None) -> Tensor:  # type: ignore[override]
        out = query.clone()
        ctx.set_materialize_grads(False)
        lse = query.new_empty(0)
        ctx.save_for_backward(query, key, value, out, lse, lse, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return query.clone(), key.clone(), value.clone(), None, None


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors_of(layout: PrefixLayout) -> list[Tensor]:
    """Query, key and value."""
    sizes = ((layout.num_queries, 4), (layout.num_tokens, 2), (layout.num_tokens, 2))
    return [torch.randn(tokens, heads, 16, dtype=torch.bfloat16, requires_grad=True) for tokens, heads in sizes]


def microseconds(ways: Sequence[Attention], layout: PrefixLayout, rounds: int) -> list[float]:
    """Of a layer's forward and backward on the process's clock, for each way: the best of ``rounds`` models, in turns."""
    tensors = tensors_of(layout)
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for place, run in enumerate(ways):
            started = time.process_time()
            outs = [run(*tensors) for _ in range(LAYERS)]
            torch.autograd.backward(outs, [torch.ones_like(outs[0])] * LAYERS)
            best[place] = min(best[place], time.process_time() - started)
            for x in tensors:
                x.grad = None
    return [seconds / LAYERS * 1e6 for seconds in best]


def no_flash(seen: list[tuple[Tensor, ...]] | None = None) -> tuple[Any, Any]:
    """Flash ops that return memory as it is; their inputs go into ``seen``, one of the forward and four of the backward."""

    def forward(query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        if seen is not None:
            seen.append((query,))
        lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
        return torch.empty_like(query), lse, lse, lse, lse

    def backward(do: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        if seen is not None:
            seen.append((do, *inputs[:3]))
        return tuple(torch.empty_like(x) for x in inputs[:3])

    return forward, backward


def microseconds_of_kernels(run: Attention, layout: PrefixLayout, rounds: int) -> float:
    """What the stand-ins of one layer take themselves: the kernels' own allocations, which are none of ours."""
    seen: list[tuple[Tensor, ...]] = []
    with flash_on_cpu(*no_flash(seen)), mock.patch.object(merge, "_fused", no_kernels):
        tensors = tensors_of(layout)
        run(*tensors).sum().backward()
    calls, best = [(no_flash()[len(inputs) > 1], inputs) for inputs in seen], float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for function, inputs in calls * LAYERS:
            function(*inputs)
        best = min(best, time.process_time() - started)
    return best / LAYERS * 1e6


class NoKernels:
    """Triton kernels that leave memory as it is."""

    @staticmethod
    def merge(*arguments: Any) -> None: ...

    accumulate = sum_copies = merge


def no_kernels(*tensors: Tensor) -> type[NoKernels]:
    return NoKernels


def _machinery_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return Machinery.apply(query, key, value, None, None)  # type: ignore[no-any-return]


def calls_of(run: Attention, layout: PrefixLayout) -> float:
    """Functions that a layer's forward and backward call, in Python or from it."""
    tensors = tensors_of(layout)

    def model() -> None:
        outs = [run(*tensors) for _ in range(LAYERS)]
        torch.autograd.backward(outs, [torch.ones_like(outs[0])] * LAYERS)

    model()
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()  # what it calls for what has died is no part of a layer
    try:
        with torch.autograd.set_multithreading_enabled(False):  # the profiler sees its own thread
            profile.runcall(model)
    finally:
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats()) / LAYERS


def host_times(rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a layer, for each layout."""
    rows = []
    for name, packed in LAYOUTS.items():
        with flash_on_cpu(*no_flash()), mock.patch.object(merge, "_fused", no_kernels):
            ours = functools.partial(shared_prefix_attention, layout=packed)
            attention, machinery = microseconds((ours, _machinery_alone), packed, rounds)
            calls, torchs_calls = calls_of(ours, packed), calls_of(_machinery_alone, packed)
        kernels = microseconds_of_kernels(ours, packed, rounds)
        found = {"attention_us": attention, "machinery_us": machinery, "kernels_us": kernels}
        found |= {"ours_us": attention - machinery - kernels, "calls": calls, "ours_calls": calls - torchs_calls}
        rows.append({"what": name, **{key: number(value, 3) for key, value in found.items()}, "waits": "", "where": ""})
        print(
            f"{name}: {attention:.0f} us a layer, {machinery:.0f} of them torch's own machinery, {kernels:.0f} the "
            f"kernels' stand-ins, {found['ours_us']:.0f} ours; {calls:.0f} calls, {found['ours_calls']:.0f} of them ours",
            flush=True,
        )
    return rows


# -------------------------------------------------------------------------------------------------------------- waits

_READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "masked_select",
    "equal",
}
_READS |= {"unique", "unique_consecutive", "bincount", "repeat_interleave", "allclose", "__contains__"}


class OnDevice(Tensor):
    """A tensor that stands for one on the device: what is computed from it stands there too, and reads of it are counted."""

    waits: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masks = name in ("__getitem__", "__setitem__") and any(
            isinstance(x, OnDevice) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in _READS or masks or (name == "to" and "cpu" in map(str, args[1:])):
            cls.waits[cls._line(name)] += 1
        result = super().__torch_function__(func, types, args, kwargs or {})
        read = name in ("cpu", "numpy", "tolist") or (name == "to" and "cpu" in map(str, args[1:]))
        return result.as_subclass(Tensor) if read and isinstance(result, Tensor) else result

    @staticmethod
    def _line(name: str) -> str:
        """The line of the package that reads, or of whoever does."""
        frames = [f for f in traceback.extract_stack()[:-2] if "prefix_grouper_plugins" in f.filename] or [None]
        frame = frames[-1]
        where = "torch or transformers" if frame is None else f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
        return f"{name} in {where}"


@contextmanager
def on_marked_tensors() -> Iterator[list[None]]:
    """In here what the package puts on the device is marked. Yields an entry for each copy of ids and masks to the host.

    On the CPU such a copy copies nothing, so it is counted by its call; tests/test_batch.py counts its reads.
    """
    OnDevice.waits.clear()
    copies: list[None] = []
    copy, move = batch.blocks_on_host, layout.on_device

    def counted(*there: Tensor) -> tuple[Tensor, ...]:
        copies.append(None)
        return copy(*(block.as_subclass(Tensor) for block in there))

    def marked(x: Tensor, device: Any) -> Tensor:
        return x if device is None else x.as_subclass(OnDevice)

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("prefix_grouper_plugins"):
                for function, instead in ((copy, counted), (move, marked)):
                    if vars(module).get(function.__name__) is function:
                        stack.enter_context(mock.patch.object(module, function.__name__, instead))
        yield copies


def waits_of_a_micro_batch() -> Counter[str]:
    """Reads of device tensors by line, from a trainer's padded rows to the gradients; of any micro-batch but the first."""
    from models import build, shape_of

    model = enable_prefix_grouper(build(shape_of("tiny"), "cpu", torch.float32), self_check=False)
    ids = torch.randint(256, (4, 20), generator=torch.Generator().manual_seed(0))
    ids[1:, :12] = ids[0, :12]
    blocks = [ids[:, :12], torch.ones(4, 12, dtype=torch.long), ids[:, 12:], torch.ones(4, 8, dtype=torch.long)]
    prefix_grouped_logps(model, *blocks)  # the first one reads once more: whether the model's head is understood
    with on_marked_tensors() as copies:
        logps, _ = prefix_grouped_logps(model, *(block.clone().as_subclass(OnDevice) for block in blocks))
        logps.sum().backward()
    copied = "one copy of ids and masks in prefix_grouper_plugins/batch.py (blocks_on_host)"
    return Counter({copied: len(copies), **OnDevice.waits})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="models, of which the fastest counts (default: 200)")
    parser.add_argument("--output", type=Path, default=RESULTS / "host-time.csv")
    args = parser.parse_args(arguments)
    use("cpu")
    rows = host_times(args.rounds)
    waits = waits_of_a_micro_batch()
    for line, count in waits.items():
        rows.append(
            {"what": "waits of a micro-batch", **dict.fromkeys(list(rows[0])[1:-2], ""), "waits": count, "where": line}
        )
        print(f"waits {count} x {line}", flush=True)
    write_csv(
        args.output,
        rows,
        "cpu",
        f"a layer's forward and backward of {LAYERS}, kernels that do nothing; not run on a GPU",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
