"""DPO on long prompts: policy and reference forward the prompt of a pair once instead of twice.

    prefix-grouper trl examples/recipes/dpo_long.py --model_name_or_path Qwen/Qwen3-1.7B --data_file pairs.jsonl \
        --output_dir out --per_device_train_batch_size 4 --max_length 8192 --use_prefix_grouper
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class DataArguments:
    """Where the data are."""

    data_file: str = field(
        metadata={"help": "JSON lines: `prompt`, `chosen`, `rejected` (texts, or lists of messages)"}
    )


def main():
    parser = TrlParser((DataArguments, DPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_dataset("json", data_files=data_args.data_file, split="train"),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
