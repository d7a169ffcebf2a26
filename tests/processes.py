"""Processes that start fast, and processes that form a group, for what happens only between processes.

They are forked from a server that has imported what takes seconds to import, and has run nothing of it: a fork of a process
that has run torch would inherit threads that do not run.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Neither trl nor this package, so that a command finds those as a new interpreter would: not imported yet.
_SLOW_IMPORTS = (
    "torch.distributed.fsdp datasets accelerate peft transformers.trainer transformers.models.auto.modeling_auto"
)
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(_SLOW_IMPORTS.split())
SIZES = (2, 4)
SECONDS = 1200  # what a process waits for another one in a collective: one that takes longer is stuck, not slow
_groups: dict[int, dist.ProcessGroup] = {}


class Processes:
    """Four gloo processes, of which each call takes the first two or all. The fixture `processes` starts them once."""

    def __init__(self, folder: Path) -> None:
        store = f"file://{folder / 'store'}"
        self._pools = [ProcessPoolExecutor(1, _FORKS, _join, (rank, store)) for rank in range(max(SIZES))]
        self._on_each(int)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each process of a group of ``size``; their errors come here.

        ``function`` is one of a test module, or a method of a picklable object.
        """
        futures = [pool.submit(_call, size, function, arguments) for pool in self._pools[:size]]
        return [future.result() for future in futures]

    def close(self) -> None:
        self._on_each(dist.destroy_process_group)
        for wait in (False, True):  # all of them at once
            for pool in self._pools:
                pool.shutdown(wait)

    def _on_each(self, function: Callable[[], Any]) -> None:
        for future in [pool.submit(function) for pool in self._pools]:
            future.result()


def _join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, timedelta(seconds=SECONDS), max(SIZES), rank)
    _groups.update({size: dist.new_group(list(range(size))) for size in SIZES})


def _call(size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(_groups[size], *arguments)


class Fork:
    """As ``subprocess.Popen`` of ``python *command``, as far as a script needs it that starts others, and as fast as `run_in_fork`.

    Args:
        command: what follows ``python``.
        env: the environment.
        output: the file that both outputs go to.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        self._process = _FORKS.Process(target=_become, args=(tuple(command), Path.cwd(), dict(env), [output, output]))
        self._process.start()
        self.wait = self._process.join
        self.terminate = self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode


def run_in_fork(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As ``python *command``, without the seconds for the imports of other packages.

    Not for tests of when something is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_become, args=(command, cwd, dict(os.environ if env is None else env), files))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _become(command: tuple[str, ...], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    what, *rest = command
    if what == "-m":
        sys.argv, sys.path[:0] = rest, [str(folder)]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv, sys.path[:0] = [what, *rest[1:]], [str(folder)]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[:0] = [what, *rest], [str((folder / what).parent)]
        runpy.run_path(what, run_name="__main__")
