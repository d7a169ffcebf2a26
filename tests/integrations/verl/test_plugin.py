"""The plugin reaches every process, costs those nothing that do not need it, and never fails in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

from prefix_grouper_plugins.integrations.verl import compatibility, switch
from prefix_grouper_plugins.integrations.verl.worker import ForwardedFlops, install_separate
from tests.processes import run_in_fork


def new_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process that has imported what verl needs, but not verl, which so loads its plugins afresh."""
    return run_in_fork("-c", code, cwd=Path.cwd(), env=os.environ | environment)


REGISTERED = """
from verl.workers.engine.base import EngineRegistry
engine = EngineRegistry._engines["language_model"].get("prefix_grouper", {})
print(sorted(engine), {cls.__name__ for cls in engine.values()})
"""


def test_importing_verl_sets_the_hooks_up_and_imports_no_engine():
    code = (
        "import verl, sys; print('prefix_grouper_plugins.integrations.verl.plugin' in sys.modules, "
        "[m for m in ('verl.workers.engine', 'verl.trainer.ppo.ray_trainer', 'transformers.modeling_utils', "
        "'prefix_grouper_plugins.integrations.verl.engine') if m in sys.modules])"
    )
    assert new_interpreter(code).stdout.strip() == "True []"


def test_verl_finds_the_engine_for_every_device():
    out = python("import verl.workers.engine" + REGISTERED)
    assert out.stdout.strip() == "['cpu', 'cuda', 'npu'] {'PrefixGrouperEngine'}", out.stderr


def test_the_engine_can_be_the_first_import_of_a_process():
    code = "from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine, switch\nprint(switch.failures)"
    out = new_interpreter(code + REGISTERED)
    assert out.stdout.splitlines() == ["[]", "['cpu', 'cuda', 'npu'] {'PrefixGrouperEngine'}"], out.stderr


def test_naming_one_of_our_classes_loads_the_plugin_where_verl_was_told_to_load_none():
    code = "from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngineConfig\nimport verl.workers.engine"
    out = python(code + REGISTERED, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "{'PrefixGrouperEngine'}" in out.stdout, out.stderr


# A release that renamed an argument, told to the plugin before it looks.
MOVED = """
from prefix_grouper_plugins.integrations.verl import compatibility
functions = compatibility._SIGNATURES["verl.workers.engine.fsdp.transformer_impl"]
functions["FSDPEngineWithLMHead.prepare_model_inputs"] = ("self", "micro_batch", "new")
"""


def test_another_release_of_verl_is_refused_with_the_supported_ones_when_the_engine_is_built():
    code = MOVED + "import verl.workers.engine" + REGISTERED + "next(iter(engine.values()))()"
    out = python(code)
    assert "{'RefusingEngine'}" in out.stdout, "other runs are not disturbed"
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: prefix grouper cannot run: ")
    assert "prepare_model_inputs takes ('self', 'micro_batch'), expected ('self', 'micro_batch', 'new')" in last
    assert "supports verl 0.9.1: pip install verl==0.9.1" in last


COMMAND = """
import sys
from verl.utils.config import validate_config
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", [
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4", "data.train_batch_size=256", *OVERRIDES])
validate_config(config, use_reference_policy=False, use_critic=False)
print("started")
"""


@pytest.mark.slow
def test_another_release_of_verl_stops_a_run_that_asks_before_it_starts_and_no_other():
    asked = python(MOVED + "OVERRIDES = ['model_engine=prefix_grouper']" + COMMAND)
    assert "started" not in asked.stdout
    assert "supports verl 0.9.1: pip install verl==0.9.1" in asked.stderr.strip().splitlines()[-1]
    assert python(MOVED + "OVERRIDES = []" + COMMAND).stdout.strip().endswith("started")


@pytest.mark.slow
def test_a_plugin_that_cannot_be_imported_stops_a_run_that_asks_and_no_other():
    broken = "import sys\nsys.modules['prefix_grouper_plugins.integrations.verl.engine'] = None\n"
    engine = python(broken + "import verl.workers.engine" + REGISTERED + "next(iter(engine.values()))()")
    assert "RuntimeError: prefix grouper cannot run: import of prefix_grouper_plugins" in engine.stderr
    assert "Unknown backend" not in engine.stderr
    assert python(broken + "OVERRIDES = []" + COMMAND).stdout.strip().endswith("started")


def test_a_node_without_the_package_says_which_package_it_lacks():
    """The config that reaches a worker names our class, so verl cannot get as far as `Unknown backend`."""
    code = """
import sys
sys.modules["prefix_grouper_plugins"] = None
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass
omega_conf_to_dataclass(OmegaConf.create({"_target_": "prefix_grouper_plugins.integrations.verl.PrefixGrouperOptions"}))
"""
    out = python(code)
    assert out.returncode and "prefix_grouper_plugins" in out.stderr.strip().splitlines()[-1] + out.stderr
    assert "Unknown backend" not in out.stderr


@pytest.mark.parametrize("module", sorted(compatibility._SIGNATURES))
def test_every_signature_is_that_of_the_installed_release(module):
    compatibility.check(module)


def test_a_signature_that_ray_has_extended_is_still_that_of_the_release(monkeypatch):
    """verl's V0 trainer makes a Ray actor of its workers before it validates the config."""

    def check(self, batch, _ray_trace_ctx=None):
        """As Ray leaves a method."""

    monkeypatch.setattr("verl.utils.config.validate_config", check)
    monkeypatch.setitem(compatibility._SIGNATURES, "verl.utils.config", {"validate_config": ("self", "batch")})
    compatibility.check("verl.utils.config")


def test_a_missing_function_is_refused_with_the_supported_releases(monkeypatch):
    monkeypatch.setitem(compatibility._SIGNATURES, "verl.utils.config", {"no_such_function": ()})
    with pytest.raises(ImportError, match=r"verl.utils.config.no_such_function is not there .*supports verl 0\.9\.1"):
        compatibility.check("verl.utils.config")


def test_failures_are_raised_for_those_who_ask(monkeypatch):
    switch.raise_failures()
    monkeypatch.setattr(switch, "failures", [ImportError("torch is too old")])
    with pytest.raises(RuntimeError, match="prefix grouper cannot run: torch is too old"):
        switch.raise_failures()


def test_layers_that_need_whole_rows_are_refused_under_ulysses_before_training():
    from prefix_grouper_plugins import UnsupportedModelError
    from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine, PrefixGrouperOptions
    from prefix_grouper_plugins.integrations.verl.engine import gate_of
    from tests.modeling import families

    engine = object.__new__(PrefixGrouperEngine)
    engine.options, engine.use_ulysses_sp = PrefixGrouperOptions(), True
    engine.gate = gate_of(engine.options, ulysses=True)
    with pytest.raises(UnsupportedModelError, match=r"cannot be shared under Ulysses.*on_unsupported=fallback"):
        engine._build_fsdp_module(families.build("falcon"))


def test_a_critic_that_trl_wraps_is_refused_with_the_critics_own_settings():
    from torch import nn

    from prefix_grouper_plugins import UnsupportedModelError
    from prefix_grouper_plugins.integrations.verl import PrefixGrouperOptions, PrefixGrouperValueEngine
    from prefix_grouper_plugins.integrations.verl.engine import gate_of
    from tests.modeling import families

    wrapper = nn.ModuleDict({"pretrained_model": families.build("qwen3"), "v_head": nn.Linear(32, 1)})
    wrapper.v_head = wrapper["v_head"]
    engine = object.__new__(PrefixGrouperValueEngine)
    engine.options, engine.use_ulysses_sp, engine._model_type = PrefixGrouperOptions(), False, "qwen2_vl"
    engine.gate = gate_of(engine.options, ulysses=False, settings=engine.settings)
    with pytest.raises(UnsupportedModelError) as error:
        engine._build_fsdp_module(wrapper)
    assert "the values of qwen2_vl are those of trl's wrapper" in str(error.value)
    assert str(error.value).endswith("or set critic.fsdp.prefix_grouper.on_unsupported=fallback")


def test_without_flash_attention_verls_own_path_under_ulysses_is_no_reference():
    from prefix_grouper_plugins.integrations.verl.verification import why_no_reference
    from prefix_grouper_plugins.modeling import Anatomy
    from tests.modeling import families

    model = families.build("qwen3")
    assert "with attn_implementation=sdpa verl's own path under Ulysses" in str(why_no_reference(Anatomy(model)))
    model.config._attn_implementation = "flash_attention_2"
    assert why_no_reference(Anatomy(model)) is None


# --------------------------------------------------------------------------------------------------------------- workers


def test_flops_are_those_of_what_was_forwarded():
    """Groups of two rows with prompts of 100 and responses of 50 tokens, in a model of verl's own estimate."""
    from transformers import Qwen2Config
    from verl.utils.flops_counter import FlopsCounter

    from prefix_grouper_plugins.metrics import Counts

    config = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    counter = FlopsCounter(config)
    tokens, pairs = 99 + 50 + 50, 99 * 100 // 2 + 2 * sum(range(100, 150))
    counts = Counts.of_rows([150, 150])
    counts.tokens_forwarded, counts.squares = tokens, 2 * pairs - tokens
    (estimated, promised) = ForwardedFlops(counter, SimpleNamespace(forwarded=counts)).estimate_flops([150, 150], 2.0)
    per_token = counter.estimate_flops([1], 2.0)[0] - 6 * 4 * 16 * 2 / 2.0 / 1e12
    expected = per_token * tokens + 6 * (2 * pairs - tokens) * 4 * 16 * 2 / 2.0 / 1e12
    assert estimated == pytest.approx(expected)
    assert promised == counter.estimate_flops([1], 2.0)[1]
    whole = ForwardedFlops(counter, SimpleNamespace(forwarded=Counts.of_rows([150, 150])))
    assert whole.estimate_flops([150, 150], 2.0)[0] == pytest.approx(counter.estimate_flops([150, 150], 2.0)[0])


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp2"])
def test_workers_of_separate_trainers_save_by_the_sharding(sharding):
    from omegaconf import OmegaConf

    class Worker:
        def _get_strategy_handlers(self):
            return self.config.actor.strategy

        def restore_model_from_cpu(self, n):
            self.restored_by = self.config.actor.strategy

    install_separate(SimpleNamespace(DetachActorWorker=Worker))
    actor = {"strategy": "prefix_grouper", "fsdp_config": {"prefix_grouper": {"sharding": sharding}}}
    worker = Worker()
    worker.config = OmegaConf.create({"actor": actor})
    assert worker._get_strategy_handlers() == sharding
    worker.restore_model_from_cpu(0)
    assert worker.restored_by == sharding
    assert worker.config.actor.strategy == "prefix_grouper"
    worker.config.actor.strategy = "megatron"
    assert worker._get_strategy_handlers() == "megatron"
