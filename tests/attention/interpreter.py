"""A process in which Triton's kernels run on the CPU, in Python.

``TRITON_INTERPRET=1`` must be set before triton is imported, and other tests of a worker may have imported it (trl
does). So the tests hand functions to a process of their own. Tiles are small there, so that a small forest has many.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

TABLE_BLOCK = 64
SHORTEST_ITEM = 128
TILES = "forward=64x64x4x1 dq=32x64x4x1 dkdv=64x32x4x1"


def why_not() -> str | None:
    """Why there is no interpreter here; None if there is one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        return f"the interpreter of triton {version} cannot loop with numpy 2.4 and later"
    return None


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """``call(function, *arguments)`` runs a function of a test module in that process; its errors come here."""
    # Spawned: a fork would inherit triton as it was imported, and threads of torch that do not run.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
    try:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
    finally:
        pool.shutdown()


def _start() -> None:
    torch.set_num_threads(1)
    os.environ.update(TRITON_INTERPRET="1", PREFIX_GROUPER_TRITON_TILES=TILES)
    from prefix_grouper_plugins.attention.backends.triton import configs as triton_configs
    from prefix_grouper_plugins.attention.backends.triton import launches as triton_launches
    from prefix_grouper_plugins.attention.backends.triton import tables as triton_tables

    for module in (triton_configs, triton_launches, triton_tables):
        module.TABLE_BLOCK = TABLE_BLOCK
    triton_tables.SHORTEST_ITEM = SHORTEST_ITEM
