"""What tests of several folders share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.processes import Processes

COSTLY = {"processes", "results"}  # fixtures that start processes for a whole session


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, bring forward what one of them should keep to itself, and then what takes long.

    Workers steal from the end of each other's queues. So tests that share a costly fixture stay with the worker that has
    it, and no worker is left with a long test at the end.
    """

    def key(item: pytest.Item) -> tuple[bool, bool]:
        shares = item.get_closest_marker("shares_a_fixture") or COSTLY & set(getattr(item, "fixturenames", ()))
        return not shares, item.get_closest_marker("slow") is None

    if hasattr(config, "workerinput"):
        items.sort(key=key)


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
