"""Several turns with a tool: the model looks words up in a dictionary before it answers.

TRL calls the tool and puts its answer into the completion. Rollouts that make the same call get the same answer; sharing with
`--prefix_grouper_share tree` forwards that once too.

    prefix-grouper trl examples/recipes/tools.py --model_name_or_path Qwen/Qwen3-1.7B --data_file tools.jsonl \
        --output_dir out --num_generations 8 --per_device_train_batch_size 8 --max_completion_length 1024 \
        --use_prefix_grouper --prefix_grouper_share tree
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    """Where the data are."""

    data_file: str = field(
        metadata={"help": "JSON lines: `question`, `answer`, and `entries` (what the dictionary says, by word)"}
    )


def answered(completions, answer, **kwargs):
    """1 if the last message holds the answer."""
    return [float(wanted in said[-1]["content"]) for said, wanted in zip(completions, answer, strict=True)]


def used_the_tool(completions, **kwargs):
    """Share of the messages that are answers of the tool."""
    return [sum(message["role"] == "tool" for message in said) / len(said) for said in completions]


def main():
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    training_args.reward_weights = [1.0, 0.2]
    rows = [json.loads(line) for line in Path(data_args.data_file).read_text().splitlines()]
    entries = {word: text for row in rows for word, text in row["entries"].items()}

    def look_up(word: str) -> str:
        """Look a word up in the dictionary.

        Args:
            word: the word.
        """
        return entries.get(word, f"There is no entry for {word}.")

    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[answered, used_the_tool],
        args=training_args,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
        ),
        tools=[look_up],
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
