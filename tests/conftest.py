"""What tests of several folders share."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.processes import Processes

COSTLY = ("processes", "results")  # fixtures that start processes for a whole session
SECONDS_OF_A_SLOW_TEST, SECONDS_OF_ANOTHER = 15.0, 0.3  # about, to begin with the groups that take longest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers (``--dist loadgroup``), leave to one of them what shares fixtures, longest groups first.

    The tests of a file are a group, as they share its fixtures, and so are all tests that share processes.
    """
    if not hasattr(config, "workerinput"):
        return
    groups = {item: _group(item) for item in items}
    seconds: Counter[str] = Counter()
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
        seconds[group] += SECONDS_OF_A_SLOW_TEST if item.get_closest_marker("slow") else SECONDS_OF_ANOTHER
    items.sort(key=lambda item: (-seconds[groups[item]], groups[item]))


def _group(item: pytest.Item) -> str:
    shared = [name for name in COSTLY if name in getattr(item, "fixturenames", ())]
    return shared[0] if shared else item.path.relative_to(item.config.rootpath).as_posix().replace("/", ".")


def pytest_collection_finish() -> None:
    """Every training calls ``gc.collect()``, which would walk through all imported modules: 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Four processes for all tests of a worker that need some: each takes seconds to import torch and transformers."""
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()
