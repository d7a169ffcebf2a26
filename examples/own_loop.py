"""GRPO without a trainer: sample, score, learn. Each prompt is forwarded once, in sampling and in the update.

    python examples/own_loop.py --model Qwen/Qwen3-0.6B --steps 20

Two lines make the difference to an ordinary loop: `shared_prefill` around `generate`, and `share_rows` around the loop.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_grouper_plugins import share_rows
from prefix_grouper_plugins.generation import shared_prefill

PASSAGES = ["the quick brown fox jumps over the lazy dog . " * 12, "each position has one next token . " * 12]
GROUP, NEW_TOKENS = 8, 24


def reward(text):
    """Share of different words."""
    return len(set(text.split())) / max(len(text.split()), 1)


def sample(model, tokenizer, prompts):
    """Token ids and mask of prompts and completions, `[B, P + C]`, and the mask of completion tokens, `[B, C]`."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with torch.no_grad(), shared_prefill(model):
        ids = model.generate(**batch, do_sample=True, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)
    completions = ids[:, batch.input_ids.shape[1] :]
    ended = (completions == tokenizer.eos_token_id).cumsum(1)
    scored = ended - (completions == tokenizer.eos_token_id).int() == 0  # up to the first end of text, and with it
    return ids, torch.cat([batch.attention_mask, scored.long()], 1), scored


def log_probs(model, ids, mask, length):
    """Of the last `length` tokens of each row, `[B, length]`."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]


def train(model, tokenizer, steps, learning_rate=1e-5):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    with share_rows(model) as sharing:
        for step in range(steps):
            prompts = [passage for passage in PASSAGES for _ in range(GROUP)]
            with sharing.pause():
                ids, mask, scored = sample(model, tokenizer, prompts)
            texts = tokenizer.batch_decode(ids[:, -scored.shape[1] :], skip_special_tokens=True)
            rewards = torch.tensor([reward(text) for text in texts], device=ids.device).view(-1, GROUP)
            advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
            logps = log_probs(model, ids, mask, scored.shape[1])
            loss = -((logps - logps.detach()).exp() * advantages * scored).sum() / scored.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: reward {rewards.mean():.3f}, token ratio {sharing.meter.token_ratio:.2f}")
    return sharing.meter


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(given.model).to(device)
    train(loaded, AutoTokenizer.from_pretrained(given.model), given.steps)
