"""Commands and settings in the documentation are those of the code."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("verl")

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from verl.utils.config import validate_config

from prefix_grouper_plugins.integrations.verl import PrefixGrouperOptions
from prefix_grouper_plugins.integrations.verl.switch import is_asked_for
from prefix_grouper_plugins.settings import VERL_SETTINGS

ROOT = Path(__file__).resolve().parents[3]
PAGES = {page.name: page.read_text() for page in (ROOT / "docs/verl.md", ROOT / "README.md")}


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m verl.trainer.main_ppo ")]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_are_accepted_and_turn_sharing_on(page):
    found = commands(PAGES[page])
    assert found
    for overrides in found:
        GlobalHydra.instance().clear()
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides)
        validate_config(config, use_reference_policy=True, use_critic=False)
        assert is_asked_for(config.actor_rollout_ref)


def test_the_table_of_settings_is_that_of_the_code():
    table = re.search(r"<!-- settings -->(.*)<!-- /settings -->", PAGES["verl.md"], re.S)[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M))
    options = [option for option in fields(PrefixGrouperOptions) if not option.name.startswith("_")]
    assert list(rows) == [option.name for option in options]
    settings = {setting.name: setting for setting in VERL_SETTINGS}
    for option in options:
        default, choices, _ = rows[option.name].split(" | ")
        assert default == f"`{str(option.default).lower()}`"
        words = [*settings[option.name].words, "N"] if settings[option.name].words else ["true", "false"]
        assert re.findall(r"`(\w+)`", choices) == option.metadata.get("choices", words)


def test_the_yaml_offers_every_setting_with_its_default():
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", ["model_engine=prefix_grouper"])
    offered = dict(config.actor_rollout_ref.actor.fsdp_config.prefix_grouper)
    offered.pop("_target_")
    assert offered == {f.name: f.default for f in fields(PrefixGrouperOptions) if not f.name.startswith("_")}
