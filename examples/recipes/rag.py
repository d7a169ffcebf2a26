"""Long-form answers from retrieved pages, after RioRAG (arXiv 2505.20825): cover the facts, waste no words.

The pages are in the prompt. The reward is the share of the facts (nuggets) that the answer states, less what it is too long.
RioRAG lets a language model extract and check the facts; here they come with the data and are looked up as text.

    prefix-grouper trl examples/recipes/rag.py --model_name_or_path Qwen/Qwen3-1.7B --data_file rag.jsonl \
        --output_dir out --num_generations 8 --per_device_train_batch_size 8 --use_prefix_grouper
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

QUESTION = """Answer the question in a few paragraphs, by what the pages say.

Question: {question}

{pages}"""


@dataclass
class DataArguments:
    """Where the data are, and how long an answer may be."""

    data_file: str = field(metadata={"help": "JSON lines: `question`, `pages` and `nuggets` (lists of texts)"})
    most_words: int = field(default=300, metadata={"help": "from this length on the reward falls"})


def to_prompt(row):
    pages = "\n\n".join(f"Page {number}: {text}" for number, text in enumerate(row["pages"], 1))
    return {"prompt": [{"role": "user", "content": QUESTION.format(question=row["question"], pages=pages)}]}


def main():
    parser = TrlParser((DataArguments, GRPOConfig, ModelConfig))
    data_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}

    def informative(completions, nuggets, **kwargs):
        """Share of the facts that an answer states; beyond `most_words` it falls in proportion to the length."""
        rewards = []
        for said, facts in zip(completions, nuggets, strict=True):
            text = said[0]["content"].lower()
            stated = sum(fact.lower() in text for fact in facts) / len(facts)
            rewards.append(stated * min(1.0, data_args.most_words / max(len(text.split()), 1)))
        return rewards

    dataset = load_dataset("json", data_files=data_args.data_file, split="train")
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=informative,
        args=training_args,
        train_dataset=dataset.map(to_prompt, remove_columns=["question", "pages"]),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
