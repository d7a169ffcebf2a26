"""What tests of several folders share."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.processes import Processes

# Files whose tests share processes that are started once for a session, so that one worker should run them all.
TOGETHER = (
    (
        "tests/modeling/self_check/test_gradients.py",
        "tests/modeling/test_prompt_reuse.py",
        "tests/modeling/test_sequence_parallel.py",
        "tests/modeling/test_sharded.py",
        "tests/test_metrics.py",
        "tests/test_row_sharing_distributed.py",
    ),
    (
        "tests/integrations/verl/test_engine.py",
        "tests/integrations/verl/test_equality.py",
        "tests/integrations/verl/test_first_batch.py",
        "tests/integrations/verl/test_losses.py",
        "tests/integrations/verl/test_worker.py",
        "tests/integrations/verl/vision/test_images.py",
    ),
)
SECONDS_OF_A_SLOW_TEST, SECONDS_OF_ANOTHER = 15.0, 0.3  # about, to begin with the groups that take longest


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` a worker gets whole groups of tests: those of a file, or of files that belong together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadGroups(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return LoadGroups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, begin with the groups that take longest."""
    if not hasattr(config, "workerinput"):
        return
    seconds: Counter[str] = Counter()
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        seconds[_group(item.nodeid)] += SECONDS_OF_A_SLOW_TEST if is_slow else SECONDS_OF_ANOTHER
    items.sort(key=lambda item: (-seconds[_group(item.nodeid)], _group(item.nodeid)))


def _group(nodeid: str) -> str:
    file = nodeid.split("::", 1)[0]
    return next((files[0] for files in TOGETHER if file in files), file)


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
