"""What tests of several folders share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.processes import Processes


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
