"""The audit of dependencies fails where there is a vulnerability, and says so where it could not ask."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "requirements" / "audit.py"


@pytest.fixture
def audit(monkeypatch):
    spec = importlib.util.spec_from_file_location("audit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: True)
    return module


def answers(monkeypatch, module, stdout, stderr=""):
    commands = []

    def run(command, **settings):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout, stderr)

    monkeypatch.setattr(module.subprocess, "run", run)
    return commands


def package(**more):
    return {"name": "numpy", "version": "2.4.6", "vulns": [], **more}


def test_a_vulnerability_is_a_failure_that_names_package_and_release(audit, monkeypatch):
    fault = {"id": "PYSEC-1", "fix_versions": ["2.4.7"]}
    skipped = {"name": "other", "skip_reason": "not on PyPI"}
    report = {"dependencies": [package(vulns=[fault]), package(), skipped]}
    commands = answers(monkeypatch, audit, json.dumps(report))
    assert audit.audit(["one.txt", "two.txt"]) == (
        1,
        "audit: 3 packages, 1 of them unknown to PyPI, 1 known vulnerabilities\nnumpy 2.4.6: PYSEC-1, mended in 2.4.7",
    )
    assert commands[0][-4:] == ["--requirement", "one.txt", "--requirement", "two.txt"]


def test_none_is_a_success(audit, monkeypatch):
    answers(monkeypatch, audit, json.dumps({"dependencies": [package()]}))
    assert audit.audit(["one.txt"]) == (0, "audit: 1 packages, 0 of them unknown to PyPI, 0 known vulnerabilities")


def test_without_data_or_tool_a_line_says_that_nothing_was_asked(audit, monkeypatch):
    answers(monkeypatch, audit, "", "ERROR: Failed to connect")
    assert audit.audit(["one.txt"]) == (0, "audit skipped: pip-audit reached no data (ERROR: Failed to connect)")
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert audit.audit(["one.txt"]) == (0, "audit skipped: pip-audit is not installed (pip install pip-audit)")
