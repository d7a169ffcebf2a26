"""With a plain ``pip install``, and the checkout as the working directory, verl finds the engine and its settings."""

from __future__ import annotations

import pytest
import yaml

from tests.installs import ROOT, Environment, plain_install

pytest.importorskip("verl")
pytestmark = pytest.mark.slow

VALIDATE = """
import os, verl, hydra
from verl.trainer import main_ppo
from verl.utils.config import validate_config

folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
options = ["actor.use_prefix_grouper=True", "actor.ppo_micro_batch_size_per_gpu=8", "actor.ppo_mini_batch_size=8",
           "rollout.n=8", "rollout.name=vllm", "rollout.log_prob_micro_batch_size_per_gpu=8",
           "ref.log_prob_micro_batch_size_per_gpu=8"]
overrides = [f"actor_rollout_ref.{option}" for option in options]
with hydra.initialize_config_dir(folder, version_base=None):
    config = hydra.compose("ppo_trainer", [*overrides, "trainer.n_gpus_per_node=1", "data.train_batch_size=8"])
validate_config(config, use_reference_policy=False, use_critic=False)
print("strategy:", config.actor_rollout_ref.actor.strategy)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Environment:
    return plain_install(tmp_path_factory.mktemp("plain"))


def test_verls_command_knows_the_engine(environment):
    command = ["-m", "verl.trainer.main_ppo", "model_engine=prefix_grouper", "--cfg", "job"]
    out = environment.run(*command, cwd=ROOT)
    job = yaml.safe_load(out[out.index("actor_rollout_ref:") :])
    assert job["actor_rollout_ref"]["actor"]["strategy"] == "prefix_grouper"


def test_verls_own_switch_turns_sharing_on(environment):
    out = environment.run("-c", VALIDATE, cwd=ROOT)
    assert "strategy: prefix_grouper" in out


def test_pytest_collects_the_tests_of_verl(environment):
    out = environment.pytest("--collect-only", "-q", "tests/integrations/verl", "tests/examples", cwd=ROOT)
    assert "tests/integrations/verl/test_plugin.py" in out
