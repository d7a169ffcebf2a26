"""Reinforcement learning with one training example (arXiv 2504.20571): every prompt of every batch is the same.

So the groups of a micro-batch share their prompt as well: 32 completions forward it once. The question comes with worked
solutions in front, which makes the prompt long.

    prefix-grouper trl examples/recipes/one_example.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --data_file one.jsonl \
        --output_dir out --num_generations 8 --per_device_train_batch_size 32 --max_steps 200 --use_prefix_grouper
"""

import re
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    """Where the example is."""

    data_file: str = field(metadata={"help": "JSON lines: `prompt`, `answer` (a number); the first line is taken"})
    copies: int = field(default=1024, metadata={"help": "how often the example occurs in the data set"})


def right_number(completions, answer, **kwargs):
    """1 if the last number of a completion is the answer."""
    last = [(re.findall(r"-?\d+(?:\.\d+)?", text) or [None])[-1] for text in completions]
    return [float(found == str(wanted)) for found, wanted in zip(last, answer, strict=True)]


def main():
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    dataset = load_dataset("json", data_files=data_args.data_file, split="train")
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=right_number,
        args=training_args,
        train_dataset=dataset.select([0] * data_args.copies),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
