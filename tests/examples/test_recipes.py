"""Each recipe is a script of stock TRL, shares its prompts with the flag, and learns what it learns without."""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl
from transformers import Qwen3ForCausalLM, Trainer
from trl import DPOTrainer, GRPOTrainer

from prefix_grouper_plugins.integrations import trl as ours
from tests.integrations.trl.training import largest_difference, trained_weights, use_float64_head

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
GRPO = ["--num_generations", "4", "--per_device_train_batch_size", "4", "--max_completion_length", "12"]
LORA = ["--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"]
ARGUMENTS = {
    "rerank": ["model", "rerank.jsonl", *GRPO],
    "rag": ["model", "rag.jsonl", *GRPO],
    "one_example": ["model", "one.jsonl", *GRPO, "--per_device_train_batch_size", "8", "--copies", "8"],
    "tools": ["tools-model", "tools.jsonl", *GRPO, "--max_completion_length", "400"],
    "vision_lora": ["vision-model", "vision.jsonl", *GRPO, *LORA],
    "dpo_long": ["model", "pairs.jsonl", "--per_device_train_batch_size", "2", "--max_length", "1024"],
}
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    # The gradient of a key bias, and the like, is zero but for rounding, which Adam would blow up to its step size.
    "adam_epsilon": 1e-6,
    "dtype": "auto",
    "bf16": "false",
    "use_cpu": "true",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipes")
    runpy.run_path(str(RECIPES / "tiny.py"))["make"](made, length=6, dtype=torch.float64)
    return made


def say_what_a_script_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model calls no tool, so generation is scripted: one call, the same in two rollouts each, then an answer."""

    def generate(self: Any, *_: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **__: Any) -> torch.Tensor:
        tokenizer = runpy.run_path(str(RECIPES / "tiny.py"))["make_tools_tokenizer"]()
        rows = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            answered = "<tool_response>" in tokenizer.decode(ids[mask.bool()])
            word = ("reddoor", "bluetree")[row % 2]
            call = f'<tool_call>\n{{"name": "look_up", "arguments": {{"word": "{word}"}}}}\n</tool_call><|im_end|>'
            said = f"It is {'e' if random.Random(row).random() < 0.5 else 'w' * row}.<|im_end|>" if answered else call
            rows.append(torch.tensor(tokenizer(said, add_special_tokens=False)["input_ids"]))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([input_ids, padded], dim=1)

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", generate)


def learned(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, shared: bool) -> tuple[Any, dict, dict]:
    """The trainer that the script of a recipe has built and trained, its initial and its final weights."""
    built: list[Any] = []
    train = Trainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        built.append((self, trained_weights(self)))
        return train(self, *args, **kwargs)

    model, data, *arguments = ARGUMENTS[name]
    given = {**COMMON, "model_name_or_path": folder / model, "data_file": folder / data, "output_dir": folder / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", noted)
        use_float64_head(patch)
        if name == "tools":
            say_what_a_script_says(patch)
        if shared:  # what the launcher does
            for kind in ("GRPOTrainer", "GRPOConfig", "DPOTrainer", "DPOConfig"):
                patch.setattr(trl, kind, getattr(ours, f"PrefixGrouper{kind}"))
            arguments += ["--prefix_grouper_generation", "false"] if name == "tools" else []
            arguments += ["--prefix_grouper_share", "tree"] if name == "tools" else []
        options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        patch.setattr(sys, "argv", [name, *options, *arguments])
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        torch.manual_seed(0)
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    ((trainer, initial),) = built
    return trainer, initial, trained_weights(trainer)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_shares_and_learns_the_stock_weights(monkeypatch, folder, name):
    stock, initial, expected = learned(monkeypatch, folder, name, shared=False)
    assert type(stock) in (GRPOTrainer, DPOTrainer)
    assert largest_difference(initial, expected) > 1e-4, "nothing was learned"
    trainer, _, weights = learned(monkeypatch, folder, name, shared=True)
    # Norms and rotary angles are computed in float32.
    assert largest_difference(expected, weights) <= 1e-6
    assert dict(trainer.sharing.fallbacks) == {}
    bounds = {"dpo_long": 0.6, "tools": 0.45, "one_example": 0.25}
    assert trainer.sharing.update.token_ratio < bounds.get(name, 0.4)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_knows_nothing_of_sharing_but_the_flag_that_its_docstring_names(name):
    docstring, code = (RECIPES / f"{name}.py").read_text().split('"""', 2)[1:]
    assert "prefix" not in code.lower()
    assert f"prefix-grouper trl examples/recipes/{name}.py" in docstring and "--use_prefix_grouper" in docstring


def test_the_page_has_each_recipe_with_its_figures():
    page = (RECIPES.parents[1] / "docs" / "recipes.md").read_text()
    assert set(ARGUMENTS) == {path.stem for path in RECIPES.glob("*.py")} - {"tiny"}
    for name in ARGUMENTS:
        assert f"examples/recipes/{name}.py)" in page
