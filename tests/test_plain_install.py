"""With a plain ``pip install``, and the checkout as the working directory, the commands of the docs find everything.

Python then finds the package in the working directory, where the integrations are a link.
tests/integrations/verl/test_plain_install.py does the same for verl.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.installs import ROOT, Environment, plain_install

pytestmark = pytest.mark.slow
LAUNCH = ["-m", "prefix_grouper_plugins.integrations.trl.launch"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
SCRIPT = "import trl\nprint(trl.GRPOTrainer.__name__, trl.GRPOConfig.__name__)\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    pytest.importorskip("trl")
    return plain_install(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("command", [LAUNCH, [*TORCHRUN, *LAUNCH]], ids=["python", "torchrun"])
def test_the_launcher_puts_the_sharing_classes_in_trls_place(environment, tmp_path, command):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    out = environment.run(*command, str(script), "--use_prefix_grouper", cwd=ROOT)
    assert out.split() == ["PrefixGrouperGRPOTrainer", "PrefixGrouperGRPOConfig"]


def test_the_working_directory_decides_which_copy_is_imported(environment, tmp_path):
    code = "import prefix_grouper_plugins.integrations.trl as package; print(package.__file__)"
    for folder, holder in ((ROOT, ROOT), (tmp_path, environment.site)):
        assert holder in Path(environment.run("-c", code, cwd=folder).strip()).parents


def test_pytest_collects_the_tests(environment):
    out = environment.pytest("--collect-only", "-q", "tests/integrations/trl", "tests/attention", cwd=ROOT)
    assert "tests/integrations/trl/test_launch.py" in out and "tests/attention/" in out
