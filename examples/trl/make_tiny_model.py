"""Make a tokenizer and a tiny Qwen3 for the demo and train them briefly on the text in `data/`.

The model has under a million parameters. It reads the text for some twenty seconds and then writes a sentence or two
that look like English, so that GRPO has something to start from. Everything follows from the seed.

    python examples/trl/make_tiny_model.py demo/model
"""

import argparse
import os
import random
import re
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT = Path(__file__).parent / "data" / "python_reference.txt"
PAD, END = "<|pad|>", "<|end|>"


def make_tokenizer(text: str, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the paragraphs of `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build an untrained decoder: 3 layers of width 128, 4 query heads on 2 key/value heads."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)  # tied to the head: 0.02 learns slowly
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def read_tokens(text: str, tokenizer: PreTrainedTokenizerFast, end_share: float = 0.7) -> torch.Tensor:
    """The whole text as LongTensor[N]; after most sentences comes the end token, so that answers end."""
    rng = random.Random(0)
    newline = tokenizer("\n")["input_ids"]
    tokens: list[int] = []
    for paragraph in text.splitlines():
        for sentence in re.findall(r".+?(?:[.:](?= [A-Z])|$)", paragraph):
            tokens += tokenizer(sentence)["input_ids"]
            if rng.random() < end_share:
                tokens.append(tokenizer.eos_token_id)
        tokens += newline
    return torch.tensor(tokens)


def warm_up(model: Qwen3ForCausalLM, tokens: torch.Tensor, steps: int, window: int = 256, batch_size: int = 8) -> None:
    """Train on random windows of `tokens`, a LongTensor[N], with a learning rate that falls to zero."""
    rate = 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="model reads the text", unit="step", mininterval=1.0)
    for _ in bar:
        starts = torch.randint(len(tokens) - window, (batch_size,)).tolist()
        input_ids = torch.stack([tokens[start : start + window] for start in starts])
        loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def main() -> None:
    """Make the model and its tokenizer and save both to the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model and its tokenizer are saved")
    parser.add_argument("--warm-up-steps", type=int, default=120, help="training steps on the text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(text)
    model = make_model(tokenizer)
    started = time.perf_counter()
    warm_up(model, read_tokens(text, tokenizer), args.warm_up_steps)
    tokenizer.save_pretrained(args.folder)
    model.save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters() / 1e6:.2f} M parameters, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
