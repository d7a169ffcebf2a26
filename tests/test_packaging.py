"""Every way to install holds the files of the checkout; the core needs torch and transformers alone and imports them late;
imports point one way."""

from __future__ import annotations

import ast
import configparser
import graphlib
import importlib
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.installs import PACKAGE, ROOT, Environment, copy_of_checkout, files_below


def module_of(file: str) -> str:
    """Name of the module in a file of the package."""
    return ".".join([PACKAGE, *Path(file).with_suffix("").parts]).removesuffix(".__init__")


SOURCES = {module_of(file): ROOT / PACKAGE / file for file in files_below(ROOT / PACKAGE) if file.endswith(".py")}


def run(code: str, cwd: Path, *arguments: str) -> str:
    """Standard output of ``code`` in an interpreter of its own."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- what is built and installed -------------------------------------------------------------------------------------------------------


def names_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """By kind: the wheel built from the checkout, the sdist, and the wheel built from that sdist."""
    pytest.importorskip("build")
    copy = copy_of_checkout(tmp_path_factory.mktemp("tree"))
    found = {}
    for folder, kinds in (("direct", ["--wheel"]), ("through_sdist", [])):  # without a kind: sdist, and wheel from it
        out = tmp_path_factory.mktemp(folder)
        command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", str(out), str(copy)]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found |= {f"{path.suffix} {folder}": path for path in out.iterdir()}
    return {
        "wheel": found[".whl direct"],
        "sdist": found[".gz through_sdist"],
        "wheel from sdist": found[".whl through_sdist"],
    }


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return built["wheel"]


def test_wheel_and_sdist_hold_the_files_of_the_checkout(built):
    expected = files_below(ROOT / PACKAGE)
    assert {"integrations/trl/trainer.py", "integrations/verl/hydra/actor/prefix_grouper_actor.yaml"} <= expected
    for kind in ("wheel", "wheel from sdist"):
        outside = {name for name in names_of(built[kind]) if not name.startswith(f"{PACKAGE}/")}
        assert all(".dist-info/" in name for name in outside), kind
        assert {name.removeprefix(f"{PACKAGE}/") for name in names_of(built[kind]) - outside} == expected, kind
    with tarfile.open(built["sdist"]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
    assert all(member.isreg() for member in members.values()), "no links, which some unpackers do not keep"
    below = {name.removeprefix(f"{PACKAGE}/") for name in members if name.startswith(f"{PACKAGE}/")}
    assert below == expected
    assert not [name for name in members if name.startswith(("tests/", "integrations/"))]


@pytest.mark.parametrize("kind", ["plain", "editable", "from sdist"])
def test_an_installation_holds_the_files_of_the_checkout(built, tmp_path, kind):
    (tmp_path / "tree").mkdir()
    copy = copy_of_checkout(tmp_path / "tree")
    what = {"plain": [str(copy)], "editable": ["--editable", str(copy)], "from sdist": [str(built["sdist"])]}
    environment = Environment(tmp_path / "environment")
    environment.install(*what[kind])
    code = f"import {PACKAGE}.integrations.trl, {PACKAGE} as package; print(package.__path__[0])"
    folder = Path(environment.run("-c", code, cwd=tmp_path).strip())
    assert (copy if kind == "editable" else environment.site) in folder.parents
    assert files_below(folder) == files_below(ROOT / PACKAGE)


def test_the_wheel_tells_verl_and_the_shell_where_to_enter(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        groups = configparser.ConfigParser()
        groups.read_string(archive.read(name).decode())
    assert dict(groups["verl.plugins"]) == {"prefix_grouper": f"{PACKAGE}.integrations.verl.plugin"}
    assert dict(groups["console_scripts"]) == {"prefix-grouper": f"{PACKAGE}.cli:main"}
    assert f"{PACKAGE}.integrations.verl.plugin" in SOURCES


@pytest.mark.parametrize("address", ["", "https://example.org/owner/name/blob/v1"])
def test_links_of_the_package_page_work_outside_of_the_repository(address):
    readme = (ROOT / "README.md").read_text()
    made = runpy.run_path(str(ROOT / "docs" / "package_page.py"))["page"](readme, address)
    targets = re.findall(r"\]\(([^)\s]+)\)", made)
    assert all(target.startswith("https://") for target in targets)
    assert "docs/images/demo.png" in readme and bool(targets) == bool(address)
    if address:
        assert "https://example.org/owner/name/raw/v1/docs/images/demo.png" in targets
        assert "https://example.org/owner/name/blob/v1/docs/quickstart-trl.md" in targets
    assert len(made.split()) > 0.9 * len(readme.split()), "the text is all there"


def test_the_package_page_names_the_project_urls_of_a_release():
    with_project_urls = runpy.run_path(str(ROOT / "docs" / "package_page.py"))["with_project_urls"]
    made, read = (ROOT / "setup.cfg").read_text(), configparser.ConfigParser()
    read.read_string(with_project_urls(made, "https://example.org/owner/name/blob/v1"))
    urls = dict(line.split(" = ") for line in read["metadata"]["project_urls"].strip().splitlines())
    assert urls["Source"] == "https://example.org/owner/name" and urls["Issues"] == f"{urls['Source']}/issues"
    for name in ("Documentation", "Changelog"):
        assert (ROOT / urls[name].removeprefix("https://example.org/owner/name/blob/v1/")).is_file(), name
    with pytest.raises(ValueError, match="has no /blob/: give an address such as"):
        with_project_urls(made, "https://example.org/owner/name")


@pytest.mark.slow
def test_the_installed_wheel_imports_without_the_checkout(wheel, tmp_path):
    pytest.importorskip("trl")
    environment = Environment(tmp_path / "environment")
    environment.install(str(wheel))
    code = (
        f"import sys, {PACKAGE}.integrations.trl.trainer, {PACKAGE}.integrations.verl\n"
        f"print(*(module.__file__ for name, module in sys.modules.items() if name.split('.')[0] == '{PACKAGE}'))"
    )
    files = environment.run("-c", code, cwd=tmp_path).split()
    assert len(files) > 20 and all(environment.site in Path(file).parents for file in files)


# --- the core alone --------------------------------------------------------------------------------------------------


def test_importing_the_core_imports_no_trainer(tmp_path):
    code = (
        f"import {PACKAGE}, {PACKAGE}.cli, {PACKAGE}.metrics, sys\n"
        "print([name for name in ('trl', 'peft', 'verl', 'ray') if name in sys.modules])"
    )
    assert run(code, tmp_path).strip() == "[]"


def test_the_core_imports_where_trl_and_peft_are_not_installed(tmp_path):
    code = f"import sys\nsys.modules.update(trl=None, peft=None, verl=None, ray=None)\nimport {PACKAGE}"
    run(code, tmp_path)


# --- names that are imported when they are asked for -----------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        PACKAGE,
        f"{PACKAGE}.cli",
        f"{PACKAGE}.integrations.trl",
        f"{PACKAGE}.integrations.trl.launch",
        f"{PACKAGE}.integrations.verl",
        f"{PACKAGE}.integrations.verl.plugin",
    ],
)
def test_importing_a_package_that_every_process_imports_is_cheap(tmp_path, module):
    code = f"import {module}, sys\nprint([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert run(code, tmp_path).strip() == "[]"


def test_every_public_name_is_there_and_comes_from_its_own_module():
    package = importlib.import_module(PACKAGE)
    for name in package.__all__:
        value = getattr(package, name)
        assert vars(package)[name] is value, f"{name} is looked up again each time"
        if name != "__version__":
            assert value.__name__ == name
            assert value.__module__.startswith(f"{PACKAGE}.")
    everything: dict[str, object] = {}
    exec(f"from {PACKAGE} import *", everything)
    assert set(package.__all__) <= everything.keys()


def test_a_name_that_is_not_there_is_missed_in_the_usual_words(tmp_path):
    package = importlib.import_module(PACKAGE)
    with pytest.raises(AttributeError, match=f"^module '{PACKAGE}' has no attribute 'prefix_layout'$"):
        package.prefix_layout  # noqa: B018
    assert not hasattr(package, "torch")
    with pytest.raises(ImportError, match="cannot import name 'prefix_layout'"):
        exec(f"from {PACKAGE} import prefix_layout")


def lazily_named(module: str) -> dict[str, str]:
    """Name -> module, from the arguments of ``lazy_names(...)`` in the file of ``module``."""
    calls = [node for node in ast.walk(ast.parse(SOURCES[module].read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if ast.unparse(call.func) == "lazy_names"]
    homes: dict[str | None, Any] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    homes |= homes.pop(None, {})  # `**{"package.module": [...]}`
    return {name: f"{module}.{home}" for home, names in homes.items() for name in names}


def named_for_type_checkers(module: str) -> dict[str, str]:
    """Name -> module, from the imports under ``if TYPE_CHECKING:``."""
    blocks = [node for node in ast.parse(SOURCES[module].read_text()).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.integrations.trl", f"{PACKAGE}.integrations.verl"])
def test_type_checkers_see_the_names_that_are_imported_late(module):
    assert lazily_named(module) == named_for_type_checkers(module)
    (names,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(SOURCES[module].read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert set(names) - {"__version__"} == lazily_named(module).keys()


# --- which way imports point -----------------------------------------------------------------------------------------


def imports(module: str) -> Iterator[str]:
    """Full names that ``module`` imports anywhere in its file, `importlib.import_module("...")` included."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            # `from package import x` may name a module, or something that the package has in its __init__
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from {full if full in SOURCES else node.module for full in names.values()}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value


def test_the_contracts_of_pyproject_hold():
    """Layers, no backend or integration that imports another, no training framework in the core."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_runs_in_a_circle():
    """A package and its own modules included, which the contract of siblings leaves out, and modules named in strings."""
    graph = {module: {t for t in imports(module) if t in SOURCES and t != module} for module in SOURCES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
