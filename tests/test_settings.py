"""Every option stands once in settings.py: what reads it elsewhere offers the same names, defaults and choices."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from prefix_grouper_plugins import settings
from prefix_grouper_plugins.attention.registry import BACKENDS
from prefix_grouper_plugins.integrations.trl import launch
from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperArguments

HYDRA = Path(launch.__file__).parents[1] / "verl/hydra"


def test_the_backends_that_can_be_named_are_those_of_the_registry():
    assert tuple(BACKENDS) == settings.BACKENDS


def test_the_training_arguments_are_the_settings_of_trl():
    own = fields(PrefixGrouperArguments)
    assert [option.name for option in own] == list(settings.TRL_OPTIONS)
    for option, setting in zip(own, settings.TRL_SETTINGS, strict=True):
        assert (option.default, option.metadata["help"]) == (setting.default, setting.help)
        assert option.metadata.get("choices", []) == list(setting.choices)


def test_the_help_of_the_launcher_names_every_option_and_its_choices():
    for name, setting in settings.TRL_OPTIONS.items():
        (line,) = [line for line in launch.__doc__.splitlines() if line.strip().startswith(f"--{name} ")]
        assert "[true|false]" in line if setting.is_switch else str(setting.default) in line


@pytest.mark.parametrize("role", ["actor", "ref"])
def test_the_yaml_files_of_verl_offer_every_setting(role):
    path = HYDRA / role / f"prefix_grouper_{role}.yaml"
    offered = yaml.safe_load(path.read_text().split("# @package")[0])["fsdp_config"]["prefix_grouper"]
    offered.pop("_target_")
    assert list(offered) == [setting.name for setting in settings.VERL_SETTINGS]
    for setting in settings.VERL_SETTINGS:
        from_actor = f"${{actor_rollout_ref.actor.fsdp_config.prefix_grouper.{setting.name}}}"
        assert offered[setting.name] in (setting.default, from_actor)


def test_a_value_that_is_no_choice_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"prefix_grouper_regroup is 'all': choose one of exact, group, none"):
        settings.TRL_REGROUP.check("all", "prefix_grouper_regroup")
