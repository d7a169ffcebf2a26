"""The token ratio of `plan` is the one that a training reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer
from prefix_grouper_plugins.plan.schedule import Prompts, TRLSizes, trl_schedule
from tests import tiny
from tests.integrations.trl.training import make_trainer

TOKENS = 6  # of every completion
GROUP = 4


def words(*numbers: int) -> str:
    return " ".join(tiny.WORDS[3 + number] for number in numbers)


DIFFERENT = [words(i, *range(i + 1)) for i in range(8)]  # of 2 to 9 tokens, none of which begins like another
ALIKE = [words(0, 1, 2, 3, last) for last in (4, 5)] * 2  # equal lengths, the same beginning, each of them twice


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def metric(model_path: str, prompts: list[str], tokens: int = TOKENS, **sizes: Any) -> float:
    """``prefix_grouper/token_ratio`` of one epoch."""
    trainer = make_trainer(
        model_path,
        shared=True,
        dtype=torch.float32,
        trainer_class=PrefixGrouperGRPOTrainer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        num_generations=GROUP,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        prefix_grouper_generation=False,
        prefix_grouper_share="prompt",  # few words, so that completions begin alike by chance
        prefix_grouper_self_check=False,
        max_steps=-1,
        num_train_epochs=1,
        logging_steps=1000,
        **sizes,
    )
    trainer.train()
    assert not trainer.sharing.fallbacks
    return trainer.sharing.update.token_ratio


@pytest.mark.parametrize(
    ("prompts", "rows", "accumulation"),
    [(DIFFERENT, 8, 1), (DIFFERENT[:4], 2, 4), (DIFFERENT[:6], 3, 4), (ALIKE, 16, 1)],
    ids=["whole groups", "reuse within a group", "reuse across groups", "prompts that begin alike"],
)
def test_the_token_ratio_is_that_of_a_training(
    model_path: str, prompts: list[str], rows: int, accumulation: int
) -> None:
    tokenizer = tiny.tokenizer()
    ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    schedule = trl_schedule(
        Prompts(ids, beginnings_share=True),
        [TOKENS] * GROUP * len(ids),
        TRLSizes(GROUP, rows, accumulation, accumulation),
    )
    measured = metric(model_path, prompts, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation)
    assert schedule.rows == GROUP * len(ids)  # every prompt once, so that their order makes no difference
    assert schedule.token_ratio == measured
    assert measured < 0.9


def test_a_batch_that_the_trainer_does_not_pack_counts_all_tokens_of_its_rows(model_path: str) -> None:
    prompts, tokens = [words(0), words(1)], 60
    schedule = trl_schedule(
        Prompts([torch.tensor(tiny.tokenizer()(prompt)["input_ids"]) for prompt in prompts], beginnings_share=True),
        [tokens] * GROUP * len(prompts),
        TRLSizes(GROUP, GROUP, 1, 1),
    )
    sizes = {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 1}
    assert schedule.token_ratio == metric(model_path, prompts, tokens, **sizes) == 1
