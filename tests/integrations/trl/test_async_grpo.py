"""TRL's asynchronous trainer on the CPU, with a stub in the place of vLLM: our packing and attention against TRL's own tree."""

from __future__ import annotations

import queue
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefix_grouper_plugins.integrations import trl as ours
from tests.integrations.trl.training import TRL

if Version("1.16") > TRL:
    with pytest.raises(ImportError, match=f"TRL {TRL} has no asynchronous trainer that packs prefix trees, upgrade it"):
        print(ours.PrefixGrouperAsyncGRPOTrainer)
    pytest.skip(f"TRL {TRL} has no asynchronous trainer that packs prefix trees", allow_module_level=True)

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow

from prefix_grouper_plugins.integrations.trl.async_grpo import (
    PackedTreeRow,
    PrefixGrouperAsyncGRPOTrainer,
    layout_of_tree,
)
from prefix_grouper_plugins.layout import PrefixLayout
from tests import tiny
from tests.integrations.trl.training import largest_difference, use_float64_head


def samples(seed, count, tokens=4, longest=9):
    """Token rows of few different tokens, so that they fork everywhere and some go on where others end."""
    draw = random.Random(seed)
    rows = [[draw.randint(3, 2 + tokens) for _ in range(draw.randint(2, longest))] for _ in range(count)]
    rows += [[*row, draw.randint(3, 2 + tokens)] for row in rows[: count // 3]] + rows[:1]
    return [
        {
            "input_ids": np.array(row),
            "completion_mask": np.array([0, *(draw.randint(0, 1) for _ in row[1:-1]), 1]),
            "old_log_probs": np.array([-2.0 - draw.random() for _ in row], dtype=np.float32),
            "advantage": draw.uniform(-1, 1),
            "group_id": draw.randint(0, 2),
        }
        for row in rows
    ]


@pytest.mark.parametrize("seed", range(30))
def test_our_packing_is_that_of_trl(seed):
    ours, theirs = PackedTreeRow(), TreeRow()
    for sample in samples(seed, 6):
        for budget in (5, 12, 25, 100):
            assert ours.fits(sample, budget) == theirs.fits(sample, budget)
        ours.add(sample)
        theirs.add(sample)
        assert (len(ours.tokens), ours.load, ours.trained) == (len(theirs.tokens), theirs.load, theirs.trained)
    packed, expected = ours.pack(), theirs.pack()
    assert packed.keys() == expected.keys()
    for name, values in expected.items():
        assert packed[name].dtype == values.dtype and torch.equal(packed[name], values), name


@pytest.mark.parametrize("seed", range(20))
def test_the_layout_is_read_back_from_what_trl_says_of_its_tree(seed):
    row = TreeRow()
    given = samples(seed, 5)
    for sample in given:
        row.add(sample)
    packed = row.pack()
    layout = layout_of_tree(*(packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")))
    ends = [torch.tensor([*sample["input_ids"].tolist(), -1]) for sample in given]
    expected = PrefixLayout.from_rows(ends)
    assert torch.equal(layout.segments, expected.segments)
    assert torch.equal(layout.subtree_end, expected.subtree_end)
    assert torch.equal(layout.position_ids, packed["position_ids"])


def test_segments_in_another_order_are_refused():
    with pytest.raises(ValueError, match="segment 1 has 2 tokens and parent 2"):
        PrefixLayout.from_segments([3, 2, 2], [-1, 2, 0])
    with pytest.raises(ValueError, match="depth-first pre-order"):
        PrefixLayout.from_segments([3, 2, 2, 1], [-1, 0, 0, 1])


class Rollouts:
    """A rollout worker that has sampled everything already."""

    def __init__(self) -> None:
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for seed in range(12):
            for sample in samples(seed, 6, tokens=20):
                self.rollout_buffer.put(
                    SimpleNamespace(prompt=[], completion=[], model_version=0, enqueued_at=None, metrics={}, **sample)
                )

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None: ...

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the trainer asks for more samples than there are")


class NoTransfer:
    """Weights stay where they are."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: [None for _ in args[0]] if args else None


def dense_tree_attention(module, query, key, value, attention_mask, *, scaling=None, sliding_window=None, **tree):
    """TRL's tree attention, written down: each segment's queries see their path, causally, at positions along it."""
    out = torch.zeros_like(query)
    queries, keys = tree["tree_cu_seqlens_q"].tolist(), tree["tree_cu_seqlens_k"].tolist()
    groups = query.shape[1] // key.shape[1]
    for segment, start in enumerate(queries[:-1]):
        end = queries[segment + 1]
        path = tree["tree_kv_index"][keys[segment] : keys[segment + 1]]
        k, v = (x[:, :, path].repeat_interleave(groups, 1) for x in (key, value))
        depth = torch.arange(len(path) - (end - start), len(path))[:, None]
        seen = torch.arange(len(path))[None]
        visible = (seen <= depth) & (seen > depth - (sliding_window or len(path) + 1))
        scores = (query[:, :, start:end] @ k.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
        out[:, :, start:end] = scores.softmax(-1) @ v
    return out.transpose(1, 2), None


def train(trainer_class, path, folder, **settings):
    torch.manual_seed(0)
    trainer = trainer_class(
        model=path,
        reward_funcs=None,
        args=AsyncGRPOConfig(
            output_dir=str(folder),
            token_budget=60,
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            learning_rate=1e-3,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": torch.float64},
        ),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        rollout_worker=Rollouts(),
        weight_transfer=NoTransfer(),
        **settings,
    )
    trainer.model.to(torch.float64)
    tiny.compute_norms_in_input_dtype(trainer.model)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert largest_difference(before, weights) > 1e-4, "nothing was trained"
    return weights, trainer


@pytest.mark.parametrize(("kind", "more"), [("qwen3", {}), ("mistral", {"sliding_window": 5})])
def test_asynchronous_training_on_a_cpu_gives_the_weights_of_dense_tree_attention(monkeypatch, tmp_path, kind, more):
    use_float64_head(monkeypatch)
    path = tiny.saved_model(tmp_path / "model", kind, **more)

    def register():
        AttentionInterface.register(TREE_ATTENTION, dense_tree_attention)
        AttentionMaskInterface.register(TREE_ATTENTION, lambda **kwargs: None)

    with monkeypatch.context() as patched:
        patched.setattr(async_grpo_trainer, "register_tree_attention", register)
        patched.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
        expected, _ = train(AsyncGRPOTrainer, path, tmp_path)
    shared, trainer = train(PrefixGrouperAsyncGRPOTrainer, path, tmp_path)
    assert largest_difference(expected, shared) <= 1e-12
    assert trainer.gate.reason is None and async_grpo_trainer.TREE_ATTENTION == TREE_ATTENTION
