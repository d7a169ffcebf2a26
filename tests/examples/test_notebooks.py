"""The notebooks run cell by cell, on a tiny model in place of the one that they name, and print what they promise."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = runpy.run_path(str(EXAMPLES / "recipes" / "tiny.py"))
    folder = tmp_path_factory.mktemp("notebooks") / "model"
    tiny["make_model"](folder, tiny["make_tokenizer"](), 32, 1, torch.float32)
    return folder


def run(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """The namespace after the last cell of a notebook, and what its cells printed."""
    monkeypatch.chdir(model.parent)
    cells = json.loads((EXAMPLES / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert '"Qwen/Qwen3-0.6B"' in code[0], "the first cell names the model"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number, text in enumerate(code):
            exec(compile(text.replace("Qwen/Qwen3-0.6B", str(model)), f"{name}, cell {number}", "exec"), namespace)
    return namespace, printed.getvalue()


def test_the_quick_start_with_trl_ends_with_the_stock_weights(model, monkeypatch):
    namespace, printed = run("quickstart_trl", model, monkeypatch)
    assert "fallbacks: {}" in printed and "rows of a prompt in one forward: 8" in printed
    assert float(re.search(r"token ratio (\S+)", printed)[1]) < 0.4
    initial = AutoModelForCausalLM.from_pretrained(model).parameters()
    moved = max((a - b).abs().max() for a, b in zip(namespace["stock"].model.parameters(), initial, strict=True))
    assert namespace["difference"] < 0.2 * moved, "one step of Adam is 1e-5, whatever the gradient"


def test_the_loop_of_ones_own_has_the_ordinary_gradients(model, monkeypatch):
    namespace, printed = run("own_loop", model, monkeypatch)
    assert "fallbacks {}" in printed and float(re.search(r"token ratio (\S+),", printed)[1]) < 0.3
    assert namespace["expected"].norm() > 1e-3
    assert (namespace["found"] - namespace["expected"]).norm() < 1e-5 * namespace["expected"].norm()


def test_notebooks_hold_no_outputs():
    for path in (EXAMPLES / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells), path.name
