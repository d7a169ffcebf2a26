"""How many kernels does one attention layer of `merged_lse` launch on CUDA, and how many entries of length 0 do they get?

    python benchmarks/layer_kernels.py               needs no GPU

The driver of the CUDA path runs on bfloat16 tensors of the CPU, with flash kernels that compute nothing. What it asks of
torch around them is counted by dispatching; views and empty tensors launch nothing. A flash backward counts as the five
kernels that FlashAttention-2 launches for grouped heads: delta, the gradients, dq to the inputs' dtype, and a sum over the
query heads of a key head for each of dk and dv.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import RESULTS, write_csv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefix_grouper_plugins import PrefixLayout
from prefix_grouper_plugins.attention.backends.merged_lse import cuda, merge
from prefix_grouper_plugins.forest import forest_of

FLASH_BACKWARD = 5
CASES = {
    "one group": PrefixLayout.from_groups([40], [[10] * 8]),
    "four groups": PrefixLayout.from_groups([40] * 4, [[10] * 8] * 4),
    "a part of a group, its prompt given": PrefixLayout.from_groups([40], [[10] * 8]).given(39),
    "a short prompt, its keys gathered": PrefixLayout.from_groups([8], [[30] * 8]),
    "one response, its prompt given": PrefixLayout.from_groups([40], [[10]]).given(39),
    "rows that share nothing": PrefixLayout.from_groups([1], [[10] * 8]),
}
# Operators that return a view or memory that nobody has written to.
NO_KERNEL = {"aten.slice", "aten.empty", "aten.new_empty", "aten.alias", "aten.view", "aten.detach", "aten.t"}


class Kernels(TorchDispatchMode):
    """Counts operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        result = func(*args, **(kwargs or {}))
        unchanged = isinstance(result, Tensor) and any(result is x for x in args) and not name.endswith("_")
        if name not in NO_KERNEL and not unchanged:
            self.counts[name] += 1
        return result


def count(layout: PrefixLayout) -> tuple[Counter[str], Counter[str], int]:
    """Kernels of the forward and of the backward by name, and entries of length 0 in all calls."""
    forest = forest_of(layout.segments, layout.num_given)
    q, k, v = (
        torch.randn(tokens, heads, 16, dtype=torch.bfloat16)
        for tokens, heads in ((forest.num_queries, 4), (forest.num_tokens, 2), (forest.num_tokens, 2))
    )
    forward, backward = Kernels(), Kernels()
    kernels = forward
    lengths: list[Tensor] = []

    def flash_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
        kernels.counts["flash forward"] += 1
        lengths.extend(rest[:2])
        return torch.empty_like(query), torch.empty(query.shape[1], query.shape[0]), query, query, query

    def flash_backward(do: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        kernels.counts["flash backward"] += FLASH_BACKWARD
        return tuple(torch.empty(x.shape, dtype=x.dtype) for x in inputs[:3])

    def fused(name: str) -> Any:
        return mock.Mock(side_effect=lambda *arguments: kernels.counts.update([name]))

    triton = mock.Mock(merge=fused("merge"), accumulate=fused("add"), sum_copies=fused("sum of copies"))
    with (
        mock.patch.object(merge, "_fused", return_value=triton),
        mock.patch.object(cuda, "flash_ops", return_value=(flash_forward, flash_backward)),
    ):
        cuda.forward(q, k, v, forest, 0.1)  # makes the tables, once for all layers
        kernels.counts.clear()
        lengths.clear()
        copies = cuda.copies_for_both(q, k, forest)
        with forward:
            keys, values = (k, v) if copies is None else copies.of(k, v)  # saved for the backward, see `eager`
            out, lse = cuda.forward(q, keys, values, forest, 0.1)
            out = out.to(q.dtype)
        kernels = backward
        with backward:
            for grad, x in zip(cuda.backward(q, q, keys, values, out, lse, forest, 0.1), (q, k, v), strict=True):
                grad.to(x.dtype)
    for kernel_counts in (forward.counts, backward.counts):
        for name in ("aten.empty_like", "aten.split"):
            kernel_counts.pop(name, None)
    return forward.counts, backward.counts, sum(int((cu.diff() == 0).sum()) for cu in lengths)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.csv")
    args = parser.parse_args(arguments)
    rows = []
    for name, layout in CASES.items():
        forward, backward, empty = count(layout)
        rows.append(
            {
                "case": name,
                "forward": forward.total(),
                "backward": backward.total(),
                "entries_of_length_0": empty,
                "forward_kernels": "; ".join(f"{kernel} x{times}" for kernel, times in sorted(forward.items())),
                "backward_kernels": "; ".join(f"{kernel} x{times}" for kernel, times in sorted(backward.items())),
            }
        )
        print(f"{name}: {forward.total()} + {backward.total()} kernels, {empty} entries of length 0", flush=True)
    write_csv(args.output, rows, "cpu", "one layer, grouped heads, bfloat16; emulated kernels, not run on a GPU")


if __name__ == "__main__":
    main(sys.argv[1:])
