"""Two processes (gloo, FSDP2) learn the weights that two processes of the stock trainer learn, and none waits for the other."""

from __future__ import annotations

import pytest

from tests.integrations.trl.distributed_training import EQUAL, SHARDED
from tests.integrations.trl.sharded_training import MODES
from tests.integrations.trl.test_distributed import errors_of

pytestmark = pytest.mark.slow


# "verified" does what "sharded" and "rows ahead" do, at once.
COVERING = [mode for mode in MODES if mode != "verified"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return errors_of(tmp_path_factory.mktemp("sharded"), [f"{SHARDED}{mode}" for mode in COVERING])


@pytest.mark.parametrize("mode", COVERING)
def test_sharded_processes_learn_the_stock_weights(errors, mode):
    """The prompt is forwarded once per optimizer step, and every process makes the same forwards and backwards."""
    assert EQUAL in errors[f"{SHARDED}{mode}"]


@pytest.mark.exhaustive
def test_a_verification_compares_forwards_that_processes_have_matched(tmp_path):
    modes = [f"{SHARDED}verified"]
    assert list(errors_of(tmp_path, modes)) == modes
