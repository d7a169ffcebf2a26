"""The wheel holds what it should, the core stands on torch and transformers alone and loads them late, and imports point
one way."""

from __future__ import annotations

import ast
import configparser
import graphlib
import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "prefix_grouper_plugins"
# Where the folders of the checkout are installed.
FOLDERS = {ROOT / PACKAGE: PACKAGE, ROOT / "integrations": f"{PACKAGE}.integrations"}
# From the ground up; a floor may use the floors below it and itself, not its neighbours.
FLOORS: list[set[str]] = [
    {"import_hooks", "lazy", "metrics", "version"},
    {"layout"},
    {"forest", "rows"},
    {"attention", "batch", "micro_batches", "cost"},
    {"modeling"},
    {"scoring"},
    {"bench"},
    {"integrations"},
    {"cli"},
]


def run(code: str, cwd: Path, *arguments: str) -> str:
    """Standard output of ``code`` in an interpreter of its own."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the checkout gets neither build/ nor egg-info."""
    pytest.importorskip("build")
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (PACKAGE, "integrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_package_of_the_checkout(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, installed in FOLDERS.items():
        for path in folder.rglob("__init__.py"):
            for module in path.parent.glob("*.py"):
                where = f"{installed.replace('.', '/')}/{module.relative_to(folder).as_posix()}"
                assert where in names, f"setup.cfg leaves out {where}"
    assert f"{PACKAGE}/integrations/trl/trainer.py" in names
    assert f"{PACKAGE}/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/", "integrations/"))]


def test_the_wheel_holds_what_hydra_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("integrations/verl/hydra/*/*.yaml")]
    assert "integrations/verl/hydra/actor/prefix_grouper_actor.yaml" in files
    for file in files:
        assert f"{PACKAGE}/{file}" in names, f"setup.cfg leaves out {file}"
    assert len([name for name in names if name.endswith(".yaml")]) == len(files)


def test_the_wheel_tells_verl_and_the_shell_where_to_enter(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
        groups = configparser.ConfigParser()
        groups.read_string(archive.read(name).decode())
    assert dict(groups["verl.plugins"]) == {"prefix_grouper": f"{PACKAGE}.integrations.verl.plugin"}
    assert dict(groups["console_scripts"]) == {"prefix-grouper": f"{PACKAGE}.cli:main"}
    assert f"{PACKAGE}.integrations.verl.plugin" in SOURCES


IMPORT_FROM_TARGET = """
import pathlib, sys
target = pathlib.Path(sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path.insert(0, str(target))
import prefix_grouper_plugins
import prefix_grouper_plugins.integrations.trl
import prefix_grouper_plugins.integrations.verl
names = [name for name in sys.modules if name.split(".")[0] == "prefix_grouper_plugins"]
assert len(names) > 4
for name in names:
    assert target in pathlib.Path(sys.modules[name].__file__).parents, sys.modules[name].__file__
print("imported from the target")
"""


@pytest.mark.slow
def test_the_installed_wheel_imports_without_the_checkout(wheel, tmp_path):
    pytest.importorskip("trl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    result = subprocess.run([*command, str(wheel)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "imported from the target" in run(IMPORT_FROM_TARGET, tmp_path, str(target))


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
    return {name: f"{module}.{keyword.arg}" for keyword in call.keywords for name in ast.literal_eval(keyword.value)}


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


def sources() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for folder, installed in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [installed, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(module: str) -> Iterator[str]:
    """Full names that ``module`` imports anywhere in its file, `importlib.import_module("...")` included."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} imports relatively"
            # `from package import x` may name a module, or something that the package has in its __init__
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            yield from {full if full in SOURCES else node.module for full in names.values()}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value


def floor(module: str) -> tuple[int, str]:
    """Its floor's number and its part of the house; the public names stand below the integrations that use them."""
    if module == PACKAGE:
        return 6, PACKAGE
    part = module.split(".")[1]
    (number,) = [i for i, parts in enumerate(FLOORS) if part in parts] or pytest.fail(f"{module} stands on no floor")
    return number, part


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module):
    for target in imports(module):
        top = target.split(".")[0]
        assert top not in ("tests", "benchmarks"), f"{module} imports {target}"
        if not module.startswith(f"{PACKAGE}.integrations"):
            assert top not in ("trl", "peft", "verl", "ray"), f"{module} imports {target}"
        if top != PACKAGE:
            continue
        (own, part), (below, other) = floor(module), floor(target)
        assert below < own or other == part, f"{module} imports {target}, which does not stand below it"


def test_no_integration_imports_another_and_only_the_cli_names_one():
    for module in SOURCES:
        for target in imports(module):
            if not target.startswith(f"{PACKAGE}.integrations."):
                continue
            named = target.split(".")[2]
            assert module == f"{PACKAGE}.cli" or module.split(".")[1:3] == ["integrations", named], (module, target)


def test_no_import_runs_in_a_circle():
    graph = {module: {t for t in imports(module) if t in SOURCES and t != module} for module in SOURCES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
