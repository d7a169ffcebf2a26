"""A training through Ray on two nodes, a rank on each, against two stock ranks on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl")

from verl_on_cpu.run import run_training
from verl_on_cpu.tiny import make_inputs

from tests.integrations.verl.two_nodes import two_nodes

pytestmark = pytest.mark.exhaustive  # two Ray clusters, one after the other, take minutes

ON, OFF = "model_engine=prefix_grouper", "actor_rollout_ref.actor.strategy=fsdp2"
COMMON = ["data.max_response_length=12"]
PATIENCE = 600.0  # seconds without progress: a hang, on however busy a machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, prompt_tokens=(100, 300), prompts=40)
    return folder


def train(folder: Path, inputs: Path, *overrides: str, **options: Any) -> list[dict[str, float]]:
    return run_training(folder, [*COMMON, *overrides], inputs=inputs, patience=PATIENCE, **options)


def rewards(steps: list[dict[str, float]]) -> list[float]:
    return [step["critic/rewards/mean"] for step in steps]


def test_a_rank_on_each_of_two_nodes_sees_the_rewards_of_two_ranks_on_one(inputs, tmp_path):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    with two_nodes(tmp_path / "two") as address:
        apart = train(tmp_path / "two", inputs, ON, cluster=address, workers=1, steps=3)
    stock = train(tmp_path / "one", inputs, OFF, workers=2, steps=3)
    assert rewards(apart) == rewards(stock)
    assert [step["prefix_grouper/rows_per_group"] for step in apart] == [4, 4, 4]
    assert [step["actor/grad_norm"] for step in apart] == pytest.approx(
        [step["actor/grad_norm"] for step in stock], rel=1e-4
    )
