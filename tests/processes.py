"""Processes that form a group, for what happens only between processes. Slow to start: the fixture `processes` of
tests/conftest.py starts them once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = (2, 4)
SECONDS = 1200  # a process that waits for another one longer than this fails: stuck, not slow on a busy machine
_groups: dict[int, dist.ProcessGroup] = {}


class Processes:
    """Four gloo processes, of which each call takes the first two or all.

    They are spawned: a fork would inherit threads of torch that do not run.
    """

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        store = f"file://{folder / 'store'}"
        self._pools = [ProcessPoolExecutor(1, context, _join, (rank, store)) for rank in range(max(SIZES))]
        self._on_each(int)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each process of a group of ``size``; their errors come here.

        ``function`` is one of a test module, or a method of a picklable object.
        """
        futures = [pool.submit(_call, size, function, arguments) for pool in self._pools[:size]]
        return [future.result(SECONDS) for future in futures]

    def close(self) -> None:
        self._on_each(dist.destroy_process_group)
        for wait in (False, True):  # all of them at once
            for pool in self._pools:
                pool.shutdown(wait)

    def _on_each(self, function: Callable[[], Any]) -> None:
        for future in [pool.submit(function) for pool in self._pools]:
            future.result(SECONDS)


def _join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timedelta(seconds=SECONDS), max(SIZES), rank)
    _groups.update({size: dist.new_group(list(range(size))) for size in SIZES})


def _call(size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(_groups[size], *arguments)
