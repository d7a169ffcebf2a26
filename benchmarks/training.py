"""What does a whole GRPO training without vLLM cost, generation and rewards included?

    python benchmarks/training.py             CPU, one thread: 4 layers, 600 prompt tokens, 32 new tokens, 8 completions

TRL's trainer, ours with the update shared alone, and ours as it is by default (generation prefills each prompt once, too),
in turns. The model has random weights in float32; `difference` is the largest one between the trained weights and those of
the stock trainer, which shows that the same tokens were sampled. A training begins with imports and ends with a collection
of garbage, which nothing shares: the more steps, the less they count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from harness import RESULTS, use, write_csv
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperGRPOTrainer

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(1997))]
WAYS = ("stock", "update shared", "ours")


def tokenizer(words: Sequence[str] = WORDS) -> Any:
    splitting = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    splitting.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=splitting, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [(sum(ids) * 7919) % 13 / 10 for ids in completion_ids]


def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(WORDS),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def run(way: str, prompt: int, response: int, group: int, steps: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds that ``train()`` computes (one thread, so a busy machine does not count), and the weights."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (steps * 2, prompt), generator=generator)
    rows = [{"prompt": " ".join(WORDS[i] for i in row)} for row in ids.tolist()]
    config: Any = GRPOConfig if way == "stock" else PrefixGrouperGRPOConfig
    trainer: Any = GRPOTrainer if way == "stock" else PrefixGrouperGRPOTrainer
    with tempfile.TemporaryDirectory() as folder:
        built = trainer(
            model=model(),
            reward_funcs=reward,
            args=config(
                output_dir=folder,
                max_completion_length=response,
                max_steps=steps,
                num_generations=group,
                per_device_train_batch_size=group,
                learning_rate=1e-4,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=1,
                generation_kwargs={"min_new_tokens": response},
                **({} if way == "stock" else {"prefix_grouper_generation": way == "ours"}),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        torch.manual_seed(5)
        start = time.process_time()
        built.train()
        seconds = time.process_time() - start
    return seconds, {name: weight.detach().clone() for name, weight in built.model.named_parameters()}


def measured(sizes: Sequence[int], steps: int, repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each way, from trainings in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    difference: dict[str, float] = {}
    for _ in range(repeats):
        stock: dict[str, torch.Tensor] = {}
        for way in WAYS:
            taken, weights = run(way, *sizes, steps)
            stock = stock or weights
            difference[way] = max(float((weights[name] - stock[name]).abs().max()) for name in stock)
            seconds[way].append(taken)
    names = dict(zip(("prompt", "response", "group"), sizes, strict=True))
    return [
        {
            **names,
            "steps": steps,
            "way": way,
            "seconds": f"{median(seconds[way]):.2f}",
            "times_as_fast": f"{median(seconds['stock']) / median(seconds[way]):.2f}",
            "difference": f"{difference[way]:.1e}",
        }
        for way in WAYS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=3, default=(600, 32, 8), metavar=("PROMPT", "RESPONSE", "GROUP"))
    parser.add_argument("--steps", type=int, nargs="+", default=(3, 10), help="optimizer steps of each training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "training-cpu.csv")
    given = parser.parse_args(arguments)
    use("cpu")
    rows = []
    for steps in given.steps:
        rows += measured(given.sizes, steps, given.repeats)
        for row in rows[-len(WAYS) :]:
            print(row, flush=True)
    write_csv(given.output, rows, "cpu", f"medians of {given.repeats} runs in turns")


if __name__ == "__main__":
    main()
