"""The Triton kernels compile ahead of time for sm_80, sm_90 and sm_100, without a GPU, and the code is what we count on.

A kernel that spills registers, or that leaves the matrix units of its GPU to those of an older one, still computes the right
numbers, slowly, so nothing else would tell. How much spills depends on the release of Triton: `SPILLS` has those that were
looked at, and others are skipped.
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
from prefix_grouper_plugins.attention.device import triton_version

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SMALL_SHARED_MEMORY = 99 * 1024  # compute capability 8.6, 8.9 and 12.x
# The instruction that multiplies matrices in half precision. From sm_90 on, and for tiles of 64 rows or more, operands come from
# shared memory; smaller tiles use the one of sm_80, which is much slower there.
MATRIX_UNITS = {80: r"\bmma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
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
# With all features, for what spills; wgmma in the backward of head dim 256, and tcgen05 where Triton can, without.
COVERING = [FIRST[kernel, arch, dim] for arch, dim in ((80, 96), (90, 128)) for kernel in KERNELS]
COVERING += [FIRST["dkdv", 80, 256]]
COVERING += [FIRST[(kernel, *on)]._replace(features=False) for kernel, on in (("dq", (90, 256)), ("dkdv", (90, 256)))]
COVERING += [FIRST["forward", 100, 128]._replace(features=False)]
# Bytes of a thread's registers that may spill, by release of Triton, kernel, architecture, columns of a head and tiles; 0 where
# nothing is said. For two bytes an element, the most of those with and without features.
SPILLS: dict[tuple[int, int], dict[tuple[str, int, int, Tiles], int]] = {
    (3, 4): {
        ("forward", 80, 256, Tiles(64, 32, 8, 3)): 16,
        ("forward", 80, 256, Tiles(64, 32, 8, 2)): 24,
        ("dq", 80, 64, Tiles(128, 64, 8, 2)): 8,
        ("dq", 90, 256, Tiles(64, 32, 8, 2)): 16,
        ("dq", 90, 256, Tiles(32, 32, 4, 2)): 8,
        ("dkdv", 80, 64, Tiles(64, 64, 8, 2)): 8,
        ("dkdv", 80, 128, Tiles(64, 32, 4, 2)): 64,
        ("dkdv", 90, 128, Tiles(64, 32, 4, 2)): 48,
        ("dkdv", 80, 256, Tiles(64, 32, 8, 2)): 56,
        ("dkdv", 90, 256, Tiles(64, 32, 8, 2)): 32,
        ("dkdv", 90, 256, Tiles(32, 64, 8, 2)): 248,
    },
    (3, 6): {
        ("forward", 90, 64, Tiles(128, 128, 8, 2)): 8,
        ("forward", 100, 128, Tiles(64, 32, 4, 3)): 48,
        ("dq", 90, 256, Tiles(64, 32, 8, 2)): 24,
        ("dq", 100, 64, Tiles(64, 64, 8, 2)): 8,
        ("dkdv", 80, 64, Tiles(32, 128, 8, 3)): 16,
        ("dkdv", 90, 128, Tiles(64, 32, 4, 2)): 24,
        ("dkdv", 90, 256, Tiles(64, 32, 8, 2)): 8,
        ("dkdv", 90, 256, Tiles(32, 64, 8, 2)): 88,
        ("dkdv", 100, 64, Tiles(64, 128, 8, 2)): 24,
        ("dkdv", 100, 64, Tiles(32, 128, 8, 3)): 96,
        ("dkdv", 100, 128, Tiles(64, 32, 4, 2)): 24,
        ("dkdv", 100, 256, Tiles(64, 32, 8, 2)): 8,
    },
    (3, 7): {
        ("dq", 90, 256, Tiles(64, 32, 8, 2)): 24,
        ("dq", 100, 64, Tiles(64, 64, 8, 2)): 16,
        ("dkdv", 90, 256, Tiles(32, 64, 8, 2)): 88,
        ("dkdv", 100, 128, Tiles(64, 32, 4, 2)): 8,
        ("dkdv", 100, 256, Tiles(64, 32, 8, 2)): 8,
    },
}


def why_not(case: Case) -> str | None:
    """Why the installed Triton says nothing about ``case``."""
    release = triton_version()
    name = ".".join(map(str, release))
    if release not in SPILLS:
        return f"nobody has looked at the code that Triton {name} makes: add the release to SPILLS"
    if case.arch == 100 and release < (3, 5) and case.kernel == "dkdv":
        return f"Triton {name} does not compile dK and dV for sm_100"
    return None


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


def padded(head_dim: int) -> int:
    """Columns of a tile."""
    return 1 << (head_dim - 1).bit_length()


def attention_kernel(case: Case) -> Any:
    from prefix_grouper_plugins.attention.backends.triton import backward_kernels as triton_backward
    from prefix_grouper_plugins.attention.backends.triton import forward_kernel as triton_forward

    kernels = {
        "forward": triton_forward.forward_kernel,
        "dq": triton_backward.dq_kernel,
        "dkdv": triton_backward.dkdv_kernel,
    }
    tiles, columns = case.tiles, padded(case.head_dim)
    constants: dict[str, Any] = {
        "HEAD_DIM": case.head_dim, "VALUE_DIM": case.head_dim, "HEAD_PADDED": columns, "VALUE_PADDED": columns,
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


def rows_of_products(case: Case) -> int:
    """Of the smaller operand: queries in the forward and for dQ, keys for dK and dV, whose scores are transposed."""
    return case.tiles.block_n if case.kernel == "dkdv" else case.tiles.block_m


def assert_fits(case: Case) -> None:
    if (reason := why_not(case)) is not None:
        pytest.skip(reason)
    kernel = attention_kernel(case)
    allowed = SPILLS[triton_version()].get((case.kernel, case.arch, padded(case.head_dim), case.tiles), 0)
    assert stack_bytes(kernel.asm["cubin"]) <= allowed, "spills more registers than the table says"
    assert kernel.metadata.shared <= SHARED_MEMORY[case.arch]
    itemsize = 4 if case.dtype == "fp32" else 2
    if case.arch == 80 and case.tiles == configurations(case.kernel, case.head_dim, itemsize, (8, 0))[-1]:
        assert kernel.metadata.shared <= SMALL_SHARED_MEMORY, "nothing is left for smaller GPUs"
    used = {arch for arch, name in MATRIX_UNITS.items() if re.search(name, kernel.asm["ptx"])}
    assert used == {case.arch if itemsize == 2 and rows_of_products(case) >= 64 else 80}


@pytest.mark.parametrize("case", COVERING, ids=lambda case: case.name)
def test_the_first_configurations_compile_to_the_code_that_we_count_on(case: Case) -> None:
    assert_fits(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_every_shipped_configuration_compiles_to_the_code_that_we_count_on(case: Case) -> None:
    assert_fits(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "memory"), [(100, SHARED_MEMORY[100]), (120, SMALL_SHARED_MEMORY)])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_configuration_compiles_and_fits_on_blackwell(
    kernel: str, head_dim: int, dtype: str, arch: int, memory: int
) -> None:
    """The one that short calls take; nobody has chosen tiles for these GPUs, so some spill a little."""
    tiles = configurations(kernel, head_dim, 4 if dtype == "fp32" else 2, (arch // 10, 0))[-1]
    assert attention_kernel(Case(kernel, arch, head_dim, tiles, True, dtype)).metadata.shared <= memory


@pytest.mark.parametrize("arch", [80, 90])
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
