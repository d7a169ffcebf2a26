"""Reranking by reasoning, after Rank-R1 (arXiv 2503.06034): which of 20 documents is the most relevant to a query?

Query and documents are one long prompt, the answer is short: the prompt is nearly all that a group forwards.

    prefix-grouper trl examples/recipes/rerank.py --model_name_or_path Qwen/Qwen3-1.7B --data_file rerank.jsonl \
        --output_dir out --num_generations 8 --per_device_train_batch_size 8 --use_prefix_grouper
"""

import re
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
QUESTION = """Which of these documents is the most relevant to the query? Think first, then give its number:
<think> your reasoning </think> <answer> number </answer>

Query: {query}

{documents}"""


@dataclass
class DataArguments:
    """Where the data are."""

    data_file: str = field(
        metadata={"help": "JSON lines: `query`, `documents` (a list of texts), `relevant` (the number of one, from 1)"}
    )


def to_prompt(row):
    documents = "\n\n".join(f"[ {number} ] {text}" for number, text in enumerate(row["documents"], 1))
    return {"prompt": [{"role": "user", "content": QUESTION.format(query=row["query"], documents=documents)}]}


def correct(completions, relevant, **kwargs):
    """1 for the right number between the answer tags."""
    found = [re.search(r"<answer>\s*\[?\s*(\d+)\s*\]?\s*</answer>", said[0]["content"]) for said in completions]
    return [float(bool(match) and int(match[1]) == number) for match, number in zip(found, relevant, strict=True)]


def well_formed(completions, **kwargs):
    """Share of the tags that occur exactly once."""
    return [sum(said[0]["content"].count(tag) == 1 for tag in TAGS) / len(TAGS) for said in completions]


def main():
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    training_args.reward_weights = [1.0, 0.2]
    dataset = load_dataset("json", data_files=data_args.data_file, split="train")
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[correct, well_formed],
        args=training_args,
        train_dataset=dataset.map(to_prompt, remove_columns=["query", "documents"]),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
