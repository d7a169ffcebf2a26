"""Tile sizes of the Triton kernels, and the choice among them: pinned by the user, else measured once and cached.

The configurations were chosen by compiling them ahead of time: with Triton 3.7 none spills registers on sm_80 and sm_90 or needs
more shared memory than these GPUs have, with any feature, but two of Hopper's for head dim 256, which use wgmma. The table
`SPILLS` in `tests/attention/backends/triton/test_compiles.py` has what spills, by release of Triton; most is that of dK and dV for
head dim 256, 88 bytes of a thread, and 248 with Triton 3.4. Tiles of 64 rows or more use the matrix units of their GPU. Triton's
autotuner times them at the first call of each size class with a head dim, dtype, number of query heads for a key head and
features, and keeps the result on disk. Calls of less than `TIMED_FROM` tokens, on which all take about the same time, neither
ask it nor decide for it. Results are the same bits in every run with the same configuration, and another configuration
rounds differently; ``PREFIX_GROUPER_TRITON_TILES`` pins it where that matters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from prefix_grouper_plugins.attention.backends.triton.tables import TABLE_BLOCK

ENVIRONMENT = "PREFIX_GROUPER_TRITON_TILES"
KERNELS = ("forward", "dq", "dkdv")
# Calls of fewer tokens, such as the self-check before the first packed forward, would choose by chance, once and for all.
TIMED_FROM = 1024
# Calls of up to four times as many tokens are of one class, and the classes end here: few programs want small tiles, and what
# one batch of 1,024 tokens shows does not hold for one of 100,000.
LARGEST_CLASS = 3
_PIN = re.compile(r"(\w+)=(\d+)x(\d+)x(\d+)x(\d+)")


class Tiles(NamedTuple):
    """One configuration: queries and keys of a tile, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By kernel and widest head dim, the likely best one first, and last one that fits the smallest GPUs. For two bytes an element:
HALF: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("forward", 64): (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3)),
    ("forward", 128): (Tiles(128, 32, 8, 3), Tiles(64, 32, 4, 3)),
    ("forward", 256): (Tiles(64, 32, 8, 3), Tiles(64, 32, 8, 2)),
    ("dq", 64): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    ("dq", 128): (Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
    ("dq", 256): (Tiles(32, 32, 4, 2),),
    ("dkdv", 64): (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 3), Tiles(64, 64, 8, 2)),
    ("dkdv", 128): (Tiles(32, 64, 8, 3), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)),
    ("dkdv", 256): (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
}
# More of them for compute capability 9.x, whose matrix units read their operands from shared memory; in front of HALF.
HOPPER: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("forward", 64): (Tiles(128, 128, 8, 2),),
    ("forward", 128): (Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    ("forward", 256): (Tiles(128, 32, 8, 2),),
    ("dq", 128): (Tiles(128, 64, 8, 2),),
    ("dq", 256): (Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2)),
    ("dkdv", 128): (Tiles(32, 128, 8, 2),),
    ("dkdv", 256): (Tiles(32, 64, 8, 2),),
}
# For float32, whose products are three TF32 ones. Above 128 every tile spills.
SINGLE: dict[tuple[str, int], tuple[Tiles, ...]] = {
    ("forward", 64): (Tiles(32, 32, 8, 1),),
    ("forward", 128): (Tiles(16, 16, 4, 1),),
    ("dq", 64): (Tiles(32, 32, 4, 1),),
    ("dq", 128): (Tiles(16, 32, 4, 1),),
    ("dkdv", 64): (Tiles(32, 32, 4, 1),),
    ("dkdv", 128): (Tiles(32, 16, 8, 1),),
}


def configurations(kernel: str, head_dim: int, itemsize: int, capability: tuple[int, int]) -> tuple[Tiles, ...]:
    """The shipped configurations of ``kernel``.

    Args:
        kernel: one of `KERNELS`.
        head_dim: the wider of head and value dim.
        itemsize: bytes of an element.
        capability: of the GPU.
    """
    key = kernel, next(width for width in (64, 128, 256) if head_dim <= width)
    if itemsize != 2:
        return SINGLE[key]
    return (HOPPER.get(key, ()) if capability[0] == 9 else ()) + HALF[key]


def pinned(kernel: str) -> Tiles | None:
    """The user's configuration for ``kernel``, from the environment variable.

    ``PREFIX_GROUPER_TRITON_TILES="forward=128x64x8x3 dkdv=64x64x8x2"`` pins two of the three kernels: queries x keys x
    warps x stages.

    Raises:
        ValueError: the variable does not read like that, or a tile does not divide `TABLE_BLOCK`.
    """
    return _parse(os.environ.get(ENVIRONMENT, ""), TABLE_BLOCK).get(kernel)


@lru_cache
def _parse(text: str, table_block: int) -> dict[str, Tiles]:
    pins: dict[str, Tiles] = {}
    for word in text.replace(",", " ").split():
        match = _PIN.fullmatch(word)
        if match is None or match[1] not in KERNELS:
            raise ValueError(f"{ENVIRONMENT}: {word!r} is not KERNEL=QUERIESxKEYSxWARPSxSTAGES of {', '.join(KERNELS)}")
        tiles = Tiles(*(int(number) for number in match.groups()[1:]))
        if any(block < 16 or table_block % block for block in tiles[:2]) or 0 in tiles:
            raise ValueError(f"{ENVIRONMENT}: tiles of {word!r} must be 16 or more and divide {table_block}")
        pins[match[1]] = tiles
    return pins


def launch(
    name: str,
    kernel: Any,
    grid: Callable[[dict[str, int]], tuple[int, int]],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    itemsize: int,
    capability: tuple[int, int] | None,
    tokens: int,
) -> None:
    """Run ``kernel`` with the pinned configuration, else with the one measured best.

    Short calls take the last one, which fits every GPU, and the interpreter takes the first.

    Args:
        name: one of `KERNELS`.
        kernel: the jitted function.
        grid: from ``BLOCK_M`` and ``BLOCK_N`` to the number of programs.
        arguments, constants: of the kernel, by position and by name.
        itemsize: bytes of an element of query, key and value.
        capability: of the GPU; None under the interpreter.
        tokens: of the call.
    """
    tiles = pinned(name)
    if tiles is None:
        width = max(constants["HEAD_DIM"], constants["VALUE_DIM"])
        choices = configurations(name, width, itemsize, capability or (8, 0))
        if capability is not None and len(choices) > 1 and tokens >= TIMED_FROM:
            _tuned(kernel, choices, capability)[grid](*arguments, **constants, size_class=size_class(tokens))
            return
        tiles = choices[0] if capability is None else choices[-1]
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    kernel[grid(blocks)](*arguments, **constants, **blocks, **options, size_class=size_class(tokens))


def size_class(tokens: int) -> int:
    """Which calls share a measured configuration: 1,024 tokens and more, 4,096, 16,384, or 65,536 and more."""
    return min(max(tokens // TIMED_FROM, 1).bit_length() - 1, 2 * LARGEST_CLASS) // 2


@lru_cache
def _tuned(kernel: Any, choices: tuple[Tiles, ...], capability: tuple[int, int]) -> Any:
    """The autotuner, one for each kind of GPU: its key says nothing of the device, and another may have less memory."""
    import triton

    configs = [
        triton.Config({"BLOCK_M": t.block_m, "BLOCK_N": t.block_n}, num_warps=t.warps, num_stages=t.stages)
        for t in choices
    ]
    # The dtypes of all tensors are part of the key by themselves. Kernels have the size class as an argument only for the key.
    key = ["HEAD_DIM", "VALUE_DIM", "WINDOWED", "CAPPED", "group", "size_class"]
    return triton.autotune(configs=configs, key=key, cache_results=True)(kernel)
