"""Sharing of sampled tokens: conversations of several turns that fork late, trained as the stock trainer trains them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from prefix_grouper_plugins.integrations.trl import reuse
from prefix_grouper_plugins.layout import PrefixLayout
from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, train, use_float64_head

SYSTEM = [3 + i % 20 for i in range(30)]  # the same in front of every prompt
ROLLOUTS = 8


def conversations(depth, branching, seed=""):
    """A `rollout_func`: every path of a tree of turns, each sampled, and all but the last with a tool's answer behind it.

    Rollouts of a prompt take the same turns until they fork. What the tool says is masked by `env_mask`.
    """

    def rollout(prompts, trainer):
        out = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": None}
        for row, prompt in enumerate(prompts):
            path, ids, mask = row % ROLLOUTS, [], []
            for turn in range(depth):
                fork = path // branching ** (depth - 1 - turn)
                draw = random.Random(f"{seed}{prompt}-{trainer.state.global_step}-{turn}-{fork}")
                sampled = [3 + fork % branching, *(draw.randint(3, 23) for _ in range(draw.randint(5, 8)))]
                answer = [draw.randint(3, 23) for _ in range(draw.randint(6, 14))] if turn < depth - 1 else []
                ids += sampled + answer
                mask += [1] * len(sampled) + [0] * len(answer)
            out["prompt_ids"].append(SYSTEM + trainer.processing_class(prompt)["input_ids"])
            out["completion_ids"].append([*ids, 1])
            out["env_mask"].append([*mask, 1])
        return out

    return rollout


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


SETTINGS = {
    "num_generations": ROLLOUTS,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "max_completion_length": 100,
    "max_steps": 1,
    "beta": 0.04,
    "prefix_grouper_self_check": False,
    "rollout": {"rollout_func": conversations(3, 2)},
}


@pytest.fixture(scope="module")
def stock(path):
    """Weights of the stock trainer by settings that are not the default, made once each."""
    made = {}

    def trained(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            made[key] = train(path, shared=False, **{**SETTINGS, **changes})
        return made[key]

    return trained


@pytest.fixture(autouse=True)
def float64_head(monkeypatch):
    use_float64_head(monkeypatch)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def trie_size(rows):
    """Nodes of the tree of ``rows``, and how many branches go out beyond the first of each fork: counted by dicts."""
    tree = {}
    for row in rows:
        node = tree
        for token in row:
            node = node.setdefault(token, {})
    nodes, extra, stack = 0, 0, [tree]
    while stack:
        node = stack.pop()
        nodes += len(node)
        extra += max(len(node) - 1, 0)
        stack += node.values()
    return nodes, extra


def assert_all_shared_tokens_are_counted(trainer):
    """What was not forwarded is shared at some level, or the last token of a row."""
    update = trainer.sharing.update
    shared = update.shared_1 + update.shared_2 + update.shared_3
    assert shared == update.row_tokens - update.rows - update.tokens_forwarded > 0


@pytest.mark.parametrize("share", ["tree", "auto", "prompt"])
def test_conversations_that_fork_late_give_the_stock_weights(path, stock, share):
    expected, stock_trainer = stock()
    weights, trainer = train(path, shared=True, prefix_grouper_share=share, **SETTINGS)
    assert largest_difference(expected, weights) <= 1e-12
    assert not trainer.sharing.fallbacks
    assert logged(trainer, "reward") == logged(stock_trainer, "reward")
    assert_all_shared_tokens_are_counted(trainer)
    levels = [logged(trainer, f"prefix_grouper/shared_at_level_{level}")[0] for level in (1, 2, 3)]
    assert [level > 0 for level in levels] == [True, share != "prompt", share != "prompt"], "the prompt, and two turns"
    ratios = logged(trainer, "prefix_grouper/token_ratio")
    assert all(ratio > 0.5 for ratio in ratios) if share == "prompt" else all(ratio < 0.42 for ratio in ratios)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "cispo", "mask_truncated_completions": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "lora": True},
        # Micro-batches of 3 of the 8 rollouts reuse one forward of the prompt, and share turns among themselves.
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8, "steps_per_generation": 8},
        {"loss_type": "bnpo", "gradient_checkpointing": True},
    ],
    ids=["cispo", "gspo-lora", "reuse", "bnpo"],
)
def test_trees_go_with_losses_adapters_and_reuse(path, stock, changes, caplog):
    expected, _ = stock(**changes)
    weights, trainer = train(path, shared=True, prefix_grouper_share="tree", **{**SETTINGS, **changes})
    assert largest_difference(expected, weights) <= 1e-12
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.total.token_ratio < 0.6
    assert_all_shared_tokens_are_counted(trainer)
    said = [
        r.message for r in caplog.records if "what completions begin alike with is shared in each forward" in r.message
    ]
    assert len(said) == ("steps_per_generation" in changes), "where a group is several forwards"
    assert all(f"batch {trainer.sharing.update.token_ratio:.1%} are forwarded" in line for line in said)


@pytest.mark.parametrize("branching", [2, 4])
def test_tool_use_of_depth_four_forwards_the_tree_and_one_token_for_each_extra_branch(path, monkeypatch, branching):
    """Depth 4: the shared system prompt and the prompt, then turns that fork. A branch repeats the token that it forks from,
    and no row's last token is forwarded."""
    depth = {2: 3, 4: 2}[branching] + 1
    monkeypatch.setattr(f"{__name__}.ROLLOUTS", branching ** (depth - 1))
    rollout = conversations(depth, branching)
    seen = []
    forwards = PrefixLayout.from_rows.__func__

    def spy(cls, rows, keys=None, **options):
        layout = forwards(cls, rows, keys, **options)
        seen.append(([row.tolist() for row in rows], layout))
        return layout

    monkeypatch.setattr(PrefixLayout, "from_rows", classmethod(spy))
    rows = ROLLOUTS
    settings = {
        **SETTINGS,
        "num_generations": rows,
        "per_device_train_batch_size": rows,
        "rollout": {"rollout_func": rollout},
    }
    settings |= {"gradient_accumulation_steps": 1, "steps_per_generation": 1}
    _, trainer = train(path, shared=True, prefix_grouper_share="tree", **settings)
    batch, layout = next((batch, layout) for batch, layout in seen if batch[0][: len(SYSTEM)] == SYSTEM)
    nodes, extra = trie_size(batch)
    ends = len({tuple(row) for row in batch})
    assert layout.num_tokens == nodes + extra - ends, "the tree, one more for each extra branch, no last tokens"
    assert trainer.sharing.update.tokens_forwarded == layout.num_tokens
    assert math.isclose(trainer.sharing.update.token_ratio, layout.num_tokens / sum(map(len, batch)))


def test_rows_of_a_window_lie_in_the_order_of_their_tree(monkeypatch, path, stock):
    """TRL shuffles the 16 rows over 4 micro-batches of 4: each then holds one fork's rows, and gives the stock weights."""
    monkeypatch.setattr(
        reuse, "HAS_FUSED_HEAD", True
    )  # where TRL keeps logits, their number keeps rows of a group apart
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    expected, _ = stock(**changes)
    found = {}
    for share in ("prompt", "tree"):
        settings = {**SETTINGS, **changes, "prefix_grouper_share": share}
        weights, found[share] = train(path, shared=True, **settings)
        assert largest_difference(expected, weights) <= 1e-12
    updates = {share: trainer.sharing.update for share, trainer in found.items()}
    assert updates["tree"].packed == 2, (
        "by its tree a whole group fits into the tokens of a micro-batch of 4 padded rows"
    )
    assert updates["prompt"].packed > 2
    # Of 4 rows that share the first turn, two and two share the second; prompts are reused by the next micro-batch.
    assert found["tree"].sharing.update.token_ratio < 0.75 * found["prompt"].sharing.update.token_ratio


def test_each_row_has_its_own_advantage_at_tokens_that_rows_share(path):
    """The gradient of a shared token is the sum over its rows, each weighed by its own advantage and mask."""
    from prefix_grouper_plugins import enable_prefix_grouper, prefix_grouped_logps

    model = tiny.model("qwen3").double()
    tiny.compute_norms_in_input_dtype(model)
    prompt = torch.randint(3, 24, (1, 9)).expand(4, -1)
    completions = torch.randint(3, 24, (4, 12))
    completions[:, :5] = completions[0, :5]
    completions[1] = completions[0]  # a whole row twice
    completions[2, :9] = completions[3, :9]
    mask = torch.ones_like(completions)
    mask[3, 9:] = 0  # the beginning of row 2
    advantages, masked = torch.randn(4, 12).double(), torch.rand(4, 12) < 0.7

    def gradients(logps):
        (logps * advantages * masked * mask).sum().backward()
        found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        model.zero_grad()
        return found

    ids = torch.cat([prompt, completions], dim=1)
    logits = model(input_ids=ids, attention_mask=torch.cat([torch.ones_like(prompt), mask], dim=1)).logits[:, 8:-1]
    stock = logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    expected = gradients(stock)
    enable_prefix_grouper(model, self_check=False)
    logps, _ = prefix_grouped_logps(model, prompt, torch.ones_like(prompt), completions, mask, min_level=1)
    assert ((logps - stock) * mask).abs().max() <= 1e-12
    assert largest_difference(expected, gradients(logps)) <= 1e-12
