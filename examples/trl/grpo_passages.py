"""Teach a model to answer in the words of a long passage: an ordinary TRL script for GRPO.

Each prompt is a passage of about 1,000 tokens with one line of instruction. The reward of a completion is the number of
different words of the passage that it uses: one that babbles, repeats itself or stops early scores low.

    python examples/trl/grpo_passages.py --model_name_or_path demo/model --output_dir demo/stock --use_peft

It takes all options of TRL's `GRPOConfig` and `ModelConfig`.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

INSTRUCTION = "Use as many different words of this passage as you can:\n"
FULL_MARKS = 30  # different words of the passage


@dataclass
class PassageArguments:
    """What the prompts are made of."""

    text_file: str = field(
        default=str(Path(__file__).parent / "data" / "python_reference.txt"),
        metadata={"help": "Text with one paragraph a line."},
    )
    passage_tokens: int = field(default=1000, metadata={"help": "Length of a prompt in tokens, give or take 40."})
    num_passages: int = field(default=256, metadata={"help": "Number of prompts."})


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def own_words_reward(completions: list[str], passage: list[str], **kwargs) -> list[float]:
    """Score each completion from 0 to 1 by the number of different words that it takes from its passage."""
    rewards = []
    for completion, source in zip(completions, passage, strict=True):
        found = set(words(completion)) & set(words(source))
        rewards.append(min(len(found) / FULL_MARKS, 1.0))
    return rewards


def make_dataset(args: PassageArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """Cut passages that start at random paragraphs, each as long as fits the wanted number of prompt tokens."""
    paragraphs = Path(args.text_file).read_text(encoding="utf-8").splitlines()
    lengths = [len(tokenizer(paragraph + "\n")["input_ids"]) for paragraph in paragraphs]
    instruction_length = len(tokenizer(INSTRUCTION)["input_ids"])
    rng = random.Random(seed)
    rows = []
    for _ in range(args.num_passages):
        room = args.passage_tokens + rng.randint(-40, 40) - instruction_length
        index = rng.randrange(len(paragraphs))
        passage = ""
        while room > 0:
            paragraph, length = paragraphs[index % len(paragraphs)], lengths[index % len(paragraphs)]
            passage += cut(paragraph, room / length) + "\n"
            room -= length
            index += 1
        rows.append({"prompt": passage + INSTRUCTION, "passage": passage})
    return Dataset.from_list(rows)


def cut(paragraph: str, share: float) -> str:
    """The first `share` of a paragraph, in whole words."""
    if share >= 1:
        return paragraph
    return paragraph[: int(len(paragraph) * share)].rsplit(" ", 1)[0]


def main() -> None:
    """Train with the arguments of the command line and save the model."""
    parser = TrlParser((PassageArguments, GRPOConfig, ModelConfig))
    passage_args, training_args, model_args = parser.parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=own_words_reward,
        args=training_args,
        train_dataset=make_dataset(passage_args, tokenizer, training_args.seed),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
