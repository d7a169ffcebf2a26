"""Training arguments: defaults, environment, choices, and trading accumulation for larger micro-batches."""

from __future__ import annotations

import os
import tempfile

import pytest
import trl
from transformers import HfArgumentParser

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperRLOOConfig
from tests import tiny
from tests.integrations.trl.training import largest_difference, train, use_float64_head


@pytest.mark.skipif("EXPECTED_TRL" not in os.environ, reason="make test-matrix says which TRL it means")
def test_the_release_under_test_is_the_one_that_was_asked_for():
    assert trl.__version__ == os.environ["EXPECTED_TRL"]


def config(**settings):
    return PrefixGrouperGRPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[], **settings)


def test_sharing_is_on_by_default_and_every_field_has_a_help_text():
    assert config().use_prefix_grouper is True
    own = [f for f in PrefixGrouperGRPOConfig.__dataclass_fields__.values() if "prefix_grouper" in f.name]
    assert len(own) == 7
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


def test_environment_wins_over_the_code(monkeypatch):
    monkeypatch.setenv("USE_PREFIX_GROUPER", "false")
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    made = config(use_prefix_grouper=True, prefix_grouper_backend="merged_lse")
    assert (made.use_prefix_grouper, made.prefix_grouper_backend) == (False, "blockwise")


@pytest.mark.parametrize("name", ["prefix_grouper_backend", "prefix_grouper_regroup", "prefix_grouper_on_unsupported"])
def test_a_value_that_is_no_choice_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is 'nonsense': choose one of"):
        config(**{name: "nonsense"})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, (8, 2, 2)),
        # As near as it gets: two accumulation steps can be traded, not more.
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, (4, 1, 2)),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, (8, 4, 4)),  # fits already
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}, (8, 1, 2)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "generation_batch_size": 16}, (8, 1, 2)),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}, (24, 1, 1)),
    ],
)
def test_rebatch_makes_room_for_whole_groups(before, after):
    made = config(num_generations=8, prefix_grouper_rebatch=True, **before)
    geometry = (made.per_device_train_batch_size, made.gradient_accumulation_steps, made.steps_per_generation)
    assert geometry == after
    plain = config(num_generations=8, **before)
    assert made.generation_batch_size == plain.generation_batch_size


def test_rebatch_is_refused_where_it_would_change_the_result():
    with pytest.raises(ValueError, match=r"loss_type='bnpo'.*multiple of 8"):
        config(
            num_generations=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            loss_type="bnpo",
            prefix_grouper_rebatch=True,
        )


def test_rebatched_training_learns_the_stock_weights(monkeypatch, tmp_path):
    path = tiny.saved_model(tmp_path, "llama")
    use_float64_head(monkeypatch)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_generations": 8}
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, prefix_grouper_rebatch=True, **settings)
    assert trainer.sharing.rows_per_group == 8
    assert largest_difference(stock, shared) <= 1e-12
