"""Whole GRPO trainings through Ray, `python -m verl.trainer.main_ppo`, of a tiny model on a CPU.

Three steps each. Rollouts depend on seed, step and prompt alone, so a training in which every update is that of verl's
own engine sees the same rewards. A training with verl's V1 trainer on two ranks is that of the demo, and its test, which always
runs, is beside the one of the demo, tests/examples/test_demo_verl.py.
"""

from __future__ import annotations

import json
from functools import cache

import pytest

pytest.importorskip("verl")

from verl_on_cpu.run import PRECISION, run_training
from verl_on_cpu.tiny import make_inputs

STEPS, RESPONSES = 3, 4
DYNAMIC = [  # a row may have 312 tokens, and its group more than the limit
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=320",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=320",
]
LORA = [
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.model.target_modules=all-linear",
]
REMOVE_PADDING = ["actor_rollout_ref.model.use_remove_padding=True"]
V0 = ["trainer.use_v1=False"]
GAE = "algorithm.adv_estimator=gae"
ON, OFF = ["model_engine=prefix_grouper"], ["actor_rollout_ref.actor.strategy=fsdp2"]
FLAG = ["actor_rollout_ref.actor.use_prefix_grouper=True"]


class Training(list[dict]):
    """verl's metrics of each step, and what the terminal showed."""

    def __init__(self, steps: list[dict], terminal: str) -> None:
        super().__init__(steps)
        self.terminal = terminal


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that runs one training and remembers it."""
    folder = tmp_path_factory.mktemp("verl")
    inputs = folder / "inputs"
    make_inputs(inputs, prompt_tokens=(100, 300), prompts=40)

    @cache
    def run(overrides: tuple[str, ...], workers: int) -> Training:
        common = [f"actor_rollout_ref.rollout.n={RESPONSES}", "data.max_response_length=12"]
        name = f"run{len(list(folder.iterdir()))}"
        environment = (
            {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu.platform,verl_on_cpu.critic"} if GAE in overrides else {}
        )
        steps = run_training(
            folder / name, [*common, *overrides], environment, inputs=inputs, workers=workers, steps=STEPS
        )
        return Training(steps, (folder / name / "log.txt").read_text(errors="replace"))

    return lambda *overrides, workers: run(tuple(overrides), workers)


# Micro-batches smaller than a group, whose parts reuse its prompt.
SINGLE_ROWS = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1",
]


@pytest.mark.exhaustive
def test_adapters_that_are_trained_by_verls_v0_see_the_rewards_of_a_training_without_sharing(train):
    """By verl's own flag, on one rank, with micro-batches of one row."""
    settings = [*V0, *LORA, *SINGLE_ROWS]
    shared, stock = train(*settings, *FLAG, *OFF, workers=1), train(*settings, *OFF, workers=1)
    check_equal(shared, stock)
    check_terminal(shared.terminal, stock.terminal, ["actor"])


@pytest.mark.exhaustive
def test_a_training_whose_groups_do_not_fit_into_a_micro_batch_sees_the_rewards_of_one_without_sharing(train):
    settings = [*DYNAMIC, *REMOVE_PADDING]
    shared, stock = train(*settings, *ON, workers=2), train(*settings, *OFF, workers=2)
    check_equal(shared, stock)
    check_terminal(shared.terminal, stock.terminal, ["actor", "reference policy"])


@pytest.mark.exhaustive
def test_a_critic_that_shares_learns_what_verls_own_learns(train):
    critic = [GAE, "critic.strategy=fsdp2", "critic.fsdp.use_torch_compile=False"]
    critic += [f"+critic.fsdp.mixed_precision={PRECISION}"]
    critic += ["critic.model.path=${actor_rollout_ref.model.path}", "critic.model.use_remove_padding=True"]
    critic += ["+critic.ppo_infer_max_token_len_per_gpu=2000", *REMOVE_PADDING, *ON]
    shared, verls = train(*critic, workers=1), train(*critic, "critic.fsdp.prefix_grouper=null", workers=1)
    check(shared)
    for step in shared:
        assert step["critic/prefix_grouper/token_ratio"] == step["critic/prefix_grouper/values_token_ratio"] < 0.4
        assert step["critic/prefix_grouper/fallbacks"] == 0
    assert rewards(shared) == rewards(verls)
    for name in ("critic/vf_loss", "critic/grad_norm", "actor/grad_norm"):
        assert [step[name] for step in shared] == pytest.approx([step[name] for step in verls], rel=1e-4)
    assert not [name for name in verls[0] if "critic/prefix_grouper" in name]


@pytest.mark.exhaustive
def test_merged_adapters_see_the_rewards_of_verl(train):
    """verl rounds merged weights to bfloat16 for the rollout, so what was sampled is not scored to 1e-6 either way."""
    merged = [*LORA, "actor_rollout_ref.model.lora.merge=True"]
    shared, stock = train(*merged, *ON, workers=2), train(*merged, *OFF, workers=2)
    assert rewards(shared) == rewards(stock)
    assert {step["prefix_grouper/rows_per_group"] for step in shared} == {RESPONSES}
    worst, usual = (max(s["training/rollout_probs_diff_max"] for s in steps) for steps in (shared, stock))
    assert worst == pytest.approx(usual, rel=1e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("trainer", [[], V0], ids=["V1", "V0"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "mode", [[], LORA, DYNAMIC, [*DYNAMIC, *LORA]], ids=["full", "lora", "dynamic", "dynamic lora"]
)
def test_the_full_grid_of_trainings(trainer, workers, mode, train):
    shared = train(*trainer, *mode, *ON, workers=workers)
    check(shared)
    assert rewards(shared) == rewards(train(*trainer, *mode, *OFF, workers=workers))


def check_equal(shared: list[dict], stock: list[dict], responses: int = RESPONSES, count: int = STEPS) -> None:
    """Each step with sharing is the step without."""
    check(shared, responses, count)
    assert rewards(shared) == rewards(stock)
    norms = [[step["actor/grad_norm"] for step in steps] for steps in (shared, stock)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert not [name for name in stock[0] if "prefix_grouper" in name]


def check(steps: list[dict], responses: int = RESPONSES, count: int = STEPS) -> None:
    """Sharing was on, whole, counted, and scored what the rollout had sampled."""
    assert len(steps) == count
    for step in steps:
        assert step["training/rollout_probs_diff_max"] < 1e-6, json.dumps(step)
        assert step["prefix_grouper/rows_per_group"] == responses
        assert step["prefix_grouper/fallbacks"] == 0
        assert step["prefix_grouper/token_ratio"] < 0.4
    assert len(set(rewards(steps))) > 1, "rewards that never change tell nothing"


def check_terminal(terminal: str, stock: str, engines: list[str], responses: int = RESPONSES) -> None:
    """Of the workers of each engine one says, once, that sharing is on and what is shared, and Ray shows it."""
    assert "prefix grouper" not in stock
    lines = [line for line in terminal.splitlines() if "prefix grouper is on for " in line]
    assert len(lines) == len(engines), lines
    for engine in engines:
        (line,) = [line for line in lines if f"the {engine}'s micro-batches" in line]
        assert "Qwen3ForCausalLM (" in line and f"of the {responses} rows of a prompt" in line


def rewards(steps: list[dict]) -> list[float]:
    return [step["critic/rewards/mean"] for step in steps]
