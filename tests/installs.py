"""Environments into which a copy of the checkout is installed, with the packages of the present one beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "prefix_grouper_plugins"
INPUTS = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copy_of_checkout(folder: Path) -> Path:
    """What a build reads, links kept as links. Building there leaves neither build/ nor egg-info in the checkout."""
    for name in (PACKAGE, "integrations"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in INPUTS:
        shutil.copy(ROOT / name, folder)
    return folder


def files_below(package: Path) -> set[str]:
    """Files of an installed or checked-out package, relative to its folder; links to folders are followed."""
    found = (Path(folder) / name for folder, _, names in os.walk(package, followlinks=True) for name in names)
    return {path.relative_to(package).as_posix() for path in found if path.suffix != ".pyc"}


class Environment:
    """A virtual environment with an installation of its own, which sees this environment's other packages.

    Those come through a .pth file: the .pth files beside them, such as the one of an editable installation of this
    checkout, are not read there. What tests set in the environment, PYTHONPATH and verl's variables, is left out.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (self.site / "packages.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, *arguments: str) -> None:
        """``pip install``, offline and without dependencies."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "install"]
        command = [*pip, "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *arguments]
        done = subprocess.run(command, cwd=self.site, capture_output=True, text=True, env=self.variables())
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str, cwd: Path) -> str:
        """Standard output of this environment's Python with ``arguments``."""
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=self.variables())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pytest(self, *arguments: str, cwd: Path) -> str:
        """Standard output of the command ``pytest``, which does not put the working directory on the path."""
        script = self.python.with_name("pytest")
        script.write_text("import sys, pytest\nsys.exit(pytest.console_main())\n")
        return self.run(str(script), "-p", "no:cacheprovider", *arguments, cwd=cwd)

    @staticmethod
    def variables() -> dict[str, str]:
        left_out = ("PYTHONPATH", "PYTEST_", "VERL_")
        return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


def plain_install(folder: Path) -> Environment:
    """``pip install .`` of a copy of the checkout."""
    (folder / "tree").mkdir()
    environment = Environment(folder / "environment")
    environment.install(str(copy_of_checkout(folder / "tree")))
    return environment
