"""What is known of single model types stands in one table, and rules read its fields and flags, never words of a report."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import check_support
from prefix_grouper_plugins.modeling.mixers import table
from prefix_grouper_plugins.modeling.model_types import MODEL_TYPES, ModelType, known_of

ROOT = Path(__file__).parents[2]
# The table of types; that of classes that mix tokens, by the files in which transformers defines them.
MAY_NAME_TYPES = {"modeling/model_types.py", "modeling/mixers/table.py"}
LAYER_TYPES = {"mamba"}  # in a config's `layer_types`; a model type has the same name


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in (ROOT / "prefix_grouper_plugins", ROOT / "integrations"):
        for path in sorted(folder.rglob("*.py")):
            name = str(path.relative_to(folder))
            if not name.startswith("integrations/") and name not in MAY_NAME_TYPES:
                yield name, ast.parse(path.read_text())


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that the code can read: all but docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def named_types(tree: ast.Module) -> list[tuple[int, str]]:
    """Model types among the code's strings: as the whole of one, or in a string that is a list of them."""
    found = []
    for node in strings(tree):
        words = node.value.split()
        if (
            words
            and node.value not in LAYER_TYPES
            and all(word in MODEL_TYPES or word in CONFIG_MAPPING for word in words)
        ):
            found.append((node.lineno, node.value))
    return found


def test_no_other_file_names_a_model_type() -> None:
    checked = dict(sources())
    assert {"cost.py", "scoring.py", "modeling/images.py", "verl/vision/images.py"} <= checked.keys()
    assert {name: found for name, tree in checked.items() if (found := named_types(tree))} == {}


@pytest.mark.parametrize("code", ['x = {"gemma3"}', 'x = "qwen2_vl qwen3_vl".split()', 'kind == "minimax"'])
def test_the_search_finds_names_of_types(code: str) -> None:
    assert named_types(ast.parse(code))


def test_an_unknown_type_has_the_defaults() -> None:
    assert known_of("no_such_type") == ModelType()
    assert not known_of("no_such_type").verified


def test_facts_of_a_type_add_up() -> None:
    known = known_of("qwen2_vl")
    assert known.verified_with_images and known.verls_forward and known.compared_in_verl and known.plain_tower
    assert known_of("phi").layer_cost == "ungated" and known_of("phi").verified


def test_rewording_a_label_of_the_report_changes_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(
        "mamba2", num_hidden_layers=1, hidden_size=32, vocab_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1,
        use_bias=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    before = check_support(model)
    assert "adds a bias to what it mixes" in before.left_padding_reasons[0]
    reworded = {
        name: dataclasses.replace(mixer, kind=f"Some {i}") for i, (name, mixer) in enumerate(table._MIXERS.items())
    }
    monkeypatch.setattr(table, "_MIXERS", reworded)
    after = check_support(model)
    assert after.layers[0].attention.startswith("Some ")
    assert dataclasses.replace(after, layers=()) == dataclasses.replace(before, layers=())
