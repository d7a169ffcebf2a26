"""TRL's own multi-turn rollouts, with real tools and environments: what is sampled is scripted, everything else is TRL's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, skip_before, use_float64_head

skip_before("1.9.2", "cannot read tool calls with the installed transformers, which wants a `response_template`")
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3_instruct_2507.jinja"
ROLLOUTS = 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    return f"The word {word} means {sum(map(ord, word)) % 97} things, and here is a long explanation of it."


class Room:
    """An environment whose rollouts begin with what they see, which differs at the end of the prompt."""

    made = 0

    def __init__(self) -> None:
        self.number, Room.made = Room.made, Room.made + 1
        self.steps = 0

    def reset(self, **_: object) -> str:
        self.steps = 0
        return f" You stand in front of door {self.number % 2}."

    def walk(self, word: str) -> str:
        """Walks on.

        Args:
            word: where to.
        """
        self.steps += 1
        return f"You have walked {self.steps} times, now towards {word}, and see another door."


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=base)
    made.add_special_tokens(
        {"additional_special_tokens": SPECIAL[1:], "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    )
    made.add_tokens(MARKS)
    made.chat_template = TEMPLATE.read_text()
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer):
    folder, ends = (
        tmp_path_factory.mktemp("tools"),
        {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id},
    )
    tiny.saved_model(folder, "qwen3", vocab_size=len(tokenizer) + 7, max_position_embeddings=2048, **ends)
    GenerationConfig(**ends).save_pretrained(folder)
    return str(folder)


def script(trainer, tokenizer, tool):
    """Let the model say what a script says: two calls, of which rollouts make the same ones, then an answer."""

    def say(row, ids):
        calls = tokenizer.decode(ids).count("<tool_response>")
        alike = (row % 2, row % 4, row)[min(calls, 2)]
        draw = random.Random(f"{trainer.state.global_step}-{calls}-{alike}")
        if calls < 2:
            call = f'{{"name": "{tool}", "arguments": {{"word": "{draw.choice("abcdef") * 3}"}}}}'
            return f"<tool_call>\n{call}\n</tool_call><|im_end|>"
        return "The answer is " + "".join(draw.choices("xyz", k=draw.randint(2, 6))) + "<|im_end|>"

    def generate(*_, input_ids, attention_mask, **__):
        prompts = [ids[own.bool()].tolist() for ids, own in zip(input_ids, attention_mask, strict=True)]
        said = [say(row, ids) for row, ids in enumerate(prompts)]
        rows = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([input_ids, padded], dim=1)

    trainer.model.generate = generate


def train(path, tokenizer, monkeypatch, *, shared, rollout, **changes):
    use_float64_head(monkeypatch)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(Room, "made", 0)
    asked = [{"prompt": [{"role": "user", "content": f"What is {word}?"}]} for word in ("one", "two", "three", "four")]
    settings = {
        "num_generations": ROLLOUTS,
        "per_device_train_batch_size": ROLLOUTS,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 600,
        "max_steps": 1,
        "beta": 0.05,
        "prefix_grouper_self_check": False,
        "prefix_grouper_generation": False,  # generation is scripted
        "train_dataset": Dataset.from_list(asked),
        "processing_class": tokenizer,
        "rollout": rollout,
        **changes,
    }
    trainer = make_trainer(path, shared=shared, **settings)
    script(trainer, tokenizer, "look_up" if "tools" in rollout else "walk")
    torch.manual_seed(5)
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}, trainer


def shared_and_compared(path, tokenizer, monkeypatch, rollout, share):
    """What the shared trainer counted in its update; its weights are the stock trainer's."""
    expected, stock = train(path, tokenizer, monkeypatch, shared=False, rollout=rollout)
    assert logged(stock, "tools/call_frequency") == [2.0] and logged(stock, "tools/failure_frequency") == [0.0]
    weights, trainer = train(path, tokenizer, monkeypatch, shared=True, rollout=rollout, prefix_grouper_share=share)
    assert largest_difference(expected, weights) <= 1e-12
    assert logged(trainer, "reward") == logged(stock, "reward")
    assert not trainer.sharing.fallbacks
    return trainer.sharing.update


def test_tool_use_gives_the_stock_weights_and_what_tools_say_is_forwarded_once(path, tokenizer, monkeypatch):
    update = shared_and_compared(path, tokenizer, monkeypatch, {"tools": [look_up]}, "tree")
    assert update.groups == 1
    assert update.token_ratio < 0.25, "with the prompt alone it would be 0.4"
    assert update.shared_2 > 0, "calls and answers of several rollouts"


def test_environments_give_the_stock_weights_and_prompts_that_part_near_their_end_show_as_shared(
    path, tokenizer, monkeypatch
):
    """Environments put what a rollout sees behind the prompt: here two prompts a group, which part at the very end."""
    update = shared_and_compared(path, tokenizer, monkeypatch, {"environment_factory": Room}, "auto")
    assert update.groups == 2, "distinct prompts"
    assert update.token_ratio < 0.2
    assert update.shared_1 > 0.4 * update.row_tokens, "what both prompts have in common"
    assert update.shared_2 > 0.2 * update.row_tokens, "the rest, calls and answers of each"
