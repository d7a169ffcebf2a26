"""Questions about images, with LoRA: the vision tower sees the images of a group once.

    prefix-grouper trl examples/recipes/vision_lora.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \
        --data_file vision.jsonl --output_dir out --num_generations 8 --per_device_train_batch_size 8 \
        --use_peft --lora_r 16 --lora_dropout 0 --lora_target_modules all-linear --use_prefix_grouper
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Image, Sequence
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    """Where the data are."""

    data_file: str = field(
        metadata={"help": "JSON lines: `images` (paths relative to the file), `question`, `answer` (a text)"}
    )


def answered(completions, answer, **kwargs):
    """1 if the completion holds the answer."""
    return [float(wanted in said[0]["content"].split()) for said, wanted in zip(completions, answer, strict=True)]


def read(path):
    """The data set: a prompt, its images, and the answer."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "images": [str(path.parent / name) for name in row["images"]],
                "answer": row["answer"],
            }
            for row in rows
        ]
    )
    return dataset.cast_column("images", Sequence(Image()))


def main():
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=answered,
        args=training_args,
        train_dataset=read(Path(data_args.data_file)),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
