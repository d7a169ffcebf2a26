"""Training arguments: defaults, environment, choices, and trading accumulation for larger micro-batches."""

from __future__ import annotations

import os
import tempfile

import pytest
import trl
from transformers import HfArgumentParser

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperRLOOConfig
from prefix_grouper_plugins.settings import TRL_OPTIONS
from tests.integrations.trl.training import run_python


@pytest.mark.skipif("EXPECTED_TRL" not in os.environ, reason="make test-matrix says which TRL it means")
def test_the_release_under_test_is_the_one_that_was_asked_for_also_in_processes_in_other_folders(tmp_path):
    assert trl.__version__ == os.environ["EXPECTED_TRL"]
    for in_fork in (False, True):
        done = run_python(tmp_path, "-c", "import trl; print(trl.__version__)", in_fork=in_fork)
        assert done.stdout.strip() == os.environ["EXPECTED_TRL"]


def config(**settings):
    return PrefixGrouperGRPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[], **settings)


def test_sharing_is_on_by_default_and_every_field_has_a_help_text():
    assert config().use_prefix_grouper is True
    own = [f for f in PrefixGrouperGRPOConfig.__dataclass_fields__.values() if "prefix_grouper" in f.name]
    assert len(own) == len(TRL_OPTIONS)
    assert all(len(option.metadata["help"]) > 40 for option in own)


@pytest.mark.parametrize("cls", [PrefixGrouperGRPOConfig, PrefixGrouperRLOOConfig])
def test_command_line_sets_the_fields(cls):
    (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(
        [
            "--output_dir",
            tempfile.gettempdir(),
            "--use_cpu",
            "--use_prefix_grouper",
            "false",
            "--prefix_grouper_regroup",
            "group",
        ]
    )
    assert parsed.use_prefix_grouper is False
    assert parsed.prefix_grouper_regroup == "group"


def test_a_misspelt_variable_of_the_environment_is_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("USE_PREFIX_GROUPR", "false")
    monkeypatch.setenv("PREFIX_GROUPER_TRITON_TILES", "")
    assert PrefixGrouperGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True).use_prefix_grouper
    assert caplog.messages == [
        "prefix grouper: the environment variable USE_PREFIX_GROUPR sets nothing: did you mean USE_PREFIX_GROUPER?"
    ]


def test_environment_wins_over_the_code(monkeypatch):
    monkeypatch.setenv("USE_PREFIX_GROUPER", "false")
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    made = config(use_prefix_grouper=True, prefix_grouper_backend="merged_lse")
    assert (made.use_prefix_grouper, made.prefix_grouper_backend) == (False, "blockwise")


@pytest.mark.parametrize("name", ["prefix_grouper_backend", "prefix_grouper_regroup", "prefix_grouper_on_unsupported"])
def test_a_value_that_is_no_choice_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is 'nonsense': choose one of"):
        config(**{name: "nonsense"})
