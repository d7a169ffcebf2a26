"""The Triton kernels compile ahead of time for sm_80 and sm_90, without a GPU, and no shipped configuration spills.

A kernel that spills registers still computes the right numbers, slowly, so nothing else would tell.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import pytest

from prefix_grouper_plugins.attention.backends.triton.configs import KERNELS, Tiles, configurations
from prefix_grouper_plugins.attention.backends.triton.tables import TABLE_BLOCK

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
SMALL_SHARED_MEMORY = 99 * 1024  # compute capability 8.6, 8.9 and 12.x
SCALARS = dict.fromkeys(("inner", "outer", "scale"), "fp32")
SCALARS |= dict.fromkeys(("num_tokens", "num_rows", "num_given", "group", "window", "size_class"), "i32")
# Pointers to something else than the elements of query, key and value.
POINTERS = dict.fromkeys(("ends_pointer", "depth_pointer", "rows_pointer", "spans_pointer"), "*i32")
POINTERS |= dict.fromkeys(("lse_pointer", "delta_pointer", "partial_lse_pointer"), "*fp32")
POINTERS |= dict.fromkeys(("copies_pointer", "first_pointer"), "*i32")
POINTERS |= dict.fromkeys(("dk_slots_pointer", "dv_slots_pointer", "slots_pointer", "total_pointer"), "*fp32")
POINTERS["gaps_pointer"] = "*u8"


class Case(NamedTuple):
    kernel: str
    arch: int
    head_dim: int
    tiles: Tiles
    features: bool
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.tiles))
        return (
            f"{self.kernel}-sm{self.arch}-{self.dtype}-d{self.head_dim}-{shape}-{'all' if self.features else 'plain'}"
        )


def cases(head_dims: tuple[int, ...], dtype: str = "bf16") -> list[Case]:
    itemsize = {"bf16": 2, "fp32": 4}[dtype]
    return [
        Case(kernel, arch, head_dim, tiles, features, dtype)
        for kernel in KERNELS
        for head_dim in head_dims
        for arch in SHARED_MEMORY
        for tiles in configurations(kernel, head_dim, itemsize, (arch // 10, arch % 10))
        for features in (False, True)
    ]


GRID = cases((96, 128, 256, 64)) + cases((64, 96, 128), "fp32")
FIRST = {(c.kernel, c.arch, c.head_dim): c for c in reversed(GRID) if c.features and c.dtype == "bf16"}
COVERING = [case for (_, arch, dim), case in FIRST.items() if (arch, dim) in ((80, 96), (90, 128), (80, 256))]


def compiled(kernel: Any, arch: int, dtype: str, constants: dict[str, Any], warps: int = 4, stages: int = 3) -> Any:
    """``kernel`` as the launcher would compile it: aligned pointers and strides, lengths not specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}") if name.endswith("_pointer") else "i32"
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def attention_kernel(case: Case) -> Any:
    from prefix_grouper_plugins.attention.backends.triton import backward_kernels as triton_backward
    from prefix_grouper_plugins.attention.backends.triton import forward_kernel as triton_forward

    kernels = {
        "forward": triton_forward.forward_kernel,
        "dq": triton_backward.dq_kernel,
        "dkdv": triton_backward.dkdv_kernel,
    }
    tiles, padded = case.tiles, 1 << (case.head_dim - 1).bit_length()
    constants: dict[str, Any] = {
        "HEAD_DIM": case.head_dim, "VALUE_DIM": case.head_dim, "HEAD_PADDED": padded, "VALUE_PADDED": padded,
        "WINDOWED": case.features, "CAPPED": case.features, "TABLE_BLOCK": TABLE_BLOCK,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
    }  # fmt: skip
    return compiled(kernels[case.kernel], case.arch, case.dtype, constants, tiles.warps, tiles.stages)


def stack_bytes(cubin: bytes) -> int:
    """Bytes of the stack that a thread needs, where ptxas puts spilled registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match, usage
    return int(match[1]) + int(match[2])


def assert_fits(case: Case) -> None:
    kernel = attention_kernel(case)
    assert stack_bytes(kernel.asm["cubin"]) == 0, "spills registers"
    assert kernel.metadata.shared <= SHARED_MEMORY[case.arch]
    itemsize = 4 if case.dtype == "fp32" else 2
    if case.arch == 80 and case.tiles == configurations(case.kernel, case.head_dim, itemsize, (8, 0))[-1]:
        assert kernel.metadata.shared <= SMALL_SHARED_MEMORY, "nothing is left for smaller GPUs"


@pytest.mark.parametrize("case", COVERING, ids=lambda case: case.name)
def test_the_first_configurations_compile_and_do_not_spill(case: Case) -> None:
    assert_fits(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_every_shipped_configuration_compiles_and_does_not_spill(case: Case) -> None:
    assert_fits(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "memory"), [(100, SHARED_MEMORY[90]), (120, SMALL_SHARED_MEMORY)])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_configuration_compiles_and_fits_on_blackwell(
    kernel: str, head_dim: int, dtype: str, arch: int, memory: int
) -> None:
    """The one that short calls take; nobody has chosen tiles for these GPUs, so some spill a little."""
    tiles = configurations(kernel, head_dim, 4 if dtype == "fp32" else 2, (arch // 10, 0))[-1]
    assert attention_kernel(Case(kernel, arch, head_dim, tiles, True, dtype)).metadata.shared <= memory


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_kernels_that_only_add_compile_and_do_not_spill(arch: int) -> None:
    from prefix_grouper_plugins.attention.backends.merged_lse import fused as triton_merge
    from prefix_grouper_plugins.attention.backends.triton import backward_kernels as triton_backward

    sizes = {"DIM": 96, "PADDED": 128}
    for kernel, constants in (
        (triton_backward.delta_kernel, {"VALUE_DIM": 256, "VALUE_PADDED": 256, "BLOCK_M": 64}),
        (triton_backward.add_slots_kernel, {**sizes, "TABLE_BLOCK": TABLE_BLOCK, "BLOCK_M": 64}),
        (triton_merge._merge_kernel, {**sizes, "GAPS": True}),
        (triton_merge._accumulate_kernel, {**sizes, "GAPS": True}),
        (triton_merge._sum_copies_kernel, {"COLUMNS": 1024}),
    ):
        assert stack_bytes(compiled(kernel, arch, "bf16", constants).asm["cubin"]) == 0
