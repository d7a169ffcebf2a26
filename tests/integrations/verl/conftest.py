"""verl decides at import which platform it runs on: here, on a CPU, in this process and in those that tests start.

The platform is in examples/verl, which pyproject.toml puts on the path of the tests.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "verl"

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="verl_on_cpu.platform")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[Any], int], list[dict[str, Any]]]]:
    """A function that gives the results of cases on one process or on two, see engines.py."""
    from tests.integrations.verl.engines import Engines

    started: dict[int, Engines] = {}

    def run(cases: list[Any], processes: int) -> list[dict[str, Any]]:
        if processes not in started:
            started[processes] = Engines(tmp_path_factory.mktemp("engines"), processes)
        try:
            return started[processes].results(cases)
        except BaseException:
            started.pop(processes).close()  # the next list of cases gets new processes
            raise

    yield run
    for engines in started.values():
        engines.close()
