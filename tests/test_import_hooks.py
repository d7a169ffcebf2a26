"""A hook runs once its module has been imported: as a name, a submodule or a program, and after an import that failed."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prefix_grouper_plugins.import_hooks import after_import

FILES = {
    "hooked_plain.py": "value = 1\n",
    "hooked_package/__init__.py": "import hooked_package.inner\nvalue = 2\n",
    "hooked_package/inner.py": "value = 3\n",
    "hooked_broken.py": "import hooked_switch\nassert hooked_switch.on, 'not yet'\nvalue = 4\n",
    "hooked_switch.py": "on = False\n",
    "hooked_data/__init__.py": "import pkgutil\nvalue = pkgutil.get_data(__name__, 'text.txt')\n",
    "hooked_data/text.txt": "five",
}


@pytest.fixture
def values(tmp_path, monkeypatch) -> dict[str, object]:
    """What the hooks of the modules in FILES saw, which are on the path for the time of a test."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: dict[str, object] = {}
    yield seen
    for name in [name for name in sys.modules if name.startswith("hooked_")]:
        del sys.modules[name]


def watch(values: dict[str, object], *names: str) -> None:
    def see(module: ModuleType) -> None:
        values[module.__name__] = module.value

    for name in names:
        after_import(name, see)


def test_a_hook_sees_its_module_complete_and_the_module_its_own_loader(values):
    watch(values, "hooked_plain")
    assert values == {}
    module = importlib.import_module("hooked_plain")
    assert values == {"hooked_plain": 1}
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_a_module_that_is_there_already_is_seen_at_once(values):
    importlib.import_module("hooked_plain")
    watch(values, "hooked_plain")
    assert values == {"hooked_plain": 1}


def test_a_submodule_and_its_package_are_seen_when_each_is_done(values):
    watch(values, "hooked_package", "hooked_package.inner")
    importlib.import_module("hooked_package")
    assert list(values.items()) == [("hooked_package.inner", 3), ("hooked_package", 2)]


def test_a_hook_may_import_a_module_that_another_hook_waits_for(values):
    after_import("hooked_plain", lambda _: importlib.import_module("hooked_package"))
    watch(values, "hooked_plain", "hooked_package")
    importlib.import_module("hooked_plain")
    assert values == {"hooked_package": 2, "hooked_plain": 1}


def test_a_module_that_fails_is_seen_when_it_is_imported_after_all(values):
    watch(values, "hooked_broken")
    with pytest.raises(AssertionError, match="not yet"):
        importlib.import_module("hooked_broken")
    assert values == {}
    importlib.import_module("hooked_switch").on = True
    importlib.import_module("hooked_broken")
    assert values == {"hooked_broken": 4}


def test_an_error_of_a_hook_reaches_the_importer(values):
    def fail(_: ModuleType) -> None:
        raise ValueError("the hook's own")

    after_import("hooked_plain", fail)
    with pytest.raises(ValueError, match="the hook's own"):
        importlib.import_module("hooked_plain")


def test_asking_where_a_module_is_imports_nothing(values):
    watch(values, "hooked_plain")
    assert importlib.util.find_spec("hooked_plain").origin.endswith("hooked_plain.py")
    assert values == {} and "hooked_plain" not in sys.modules
    importlib.import_module("hooked_plain")
    assert values == {"hooked_plain": 1}


def test_a_module_may_read_data_through_its_loader(values):
    watch(values, "hooked_data")
    importlib.import_module("hooked_data")
    assert values == {"hooked_data": b"five"}


def test_a_module_that_a_hook_waits_for_can_be_run_as_a_program(tmp_path):
    (tmp_path / "program.py").write_text("print('ran as', __name__)\n")
    code = (
        "import runpy\nfrom prefix_grouper_plugins.import_hooks import after_import\n"
        "after_import('program', print)\nrunpy.run_module('program', run_name='__main__')"
    )
    paths = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=paths)
    assert done.stdout == "ran as __main__\n", done.stderr
