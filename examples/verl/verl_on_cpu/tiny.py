"""A tiny model, its tokenizer and a data set, made on the spot: what a verl training reads.

`make_inputs` writes two things into a folder: `model/`, a decoder of about 0.1 M parameters with random weights and a
byte-level tokenizer, and `train.parquet`, prompts in verl's format.
"""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

TEXT = Path(__file__).parents[2] / "trl" / "data" / "python_reference.txt"
KINDS = ("qwen2", "qwen3", "llama")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHAT_TOKENS = 19  # that the template adds to a prompt


def make_inputs(
    folder: Path,
    *,
    kind: str = "qwen3",
    tie_word_embeddings: bool = False,
    layers: int = 2,
    hidden_size: int = 64,
    prompts: int = 64,
    prompt_tokens: tuple[int, int] = (400, 600),
    seed: int = 0,
) -> None:
    """Write model, tokenizer and data into `folder`; `prompt_tokens` are the bounds of a prompt's length."""
    logging.disable_progress_bar()  # for a file of half a megabyte
    tokenizer = make_tokenizer()
    model = make_model(kind, tokenizer, tie_word_embeddings, layers, hidden_size, seed)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    rows = make_rows(prompts, prompt_tokens, seed)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that nothing has to be trained, and four special ones."""
    symbols = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=symbols[0],
        eos_token=symbols[1],
        extra_special_tokens=symbols[2:4],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    kind: str,
    tokenizer: PreTrainedTokenizerFast,
    tie_word_embeddings: bool,
    layers: int,
    hidden_size: int,
    seed: int,
) -> PreTrainedModel:
    """Build a decoder with random weights: 4 query heads on 2 key/value heads of width `hidden_size / 4`."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_rows(prompts: int, prompt_tokens: tuple[int, int], seed: int) -> list[dict]:
    """Cut passages of a text into chat prompts, in the columns that verl reads."""
    text = TEXT.read_text(encoding="ascii", errors="ignore").replace("\n", " ")
    rng = random.Random(seed)
    rows = []
    for index in range(prompts):
        length = rng.randint(*prompt_tokens) - CHAT_TOKENS
        start = rng.randrange(len(text) - length)
        rows.append(
            {
                "data_source": "passages",
                "prompt": [{"role": "user", "content": text[start : start + length]}],
                "ability": "letters",
                "reward_model": {"style": "rule", "ground_truth": ""},
                "extra_info": {"index": index},
            }
        )
    return rows
