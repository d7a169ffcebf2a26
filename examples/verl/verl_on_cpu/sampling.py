"""Sampling that repeats: a group of responses that follows from the weights, the prompt and a seed, and nothing else.

Two trainings that should be the same differ in the last bits of their weights as soon as one of them adds in another
order. Their responses should be the same nevertheless, or they train on different data from there on. So each token is
drawn by the Gumbel-max trick: the largest of `logits / temperature + noise`, where the noise follows from the seed.
A change of 1e-7 in the logits then changes about one token in ten million. (Inverting the cumulative distribution
would be far more fragile: there a tiny change shifts the boundaries of all tokens, and there are many.)

The whole group is decoded as one batch of fixed size, after one pass over the prompt, so that rounding is the same
whenever and in whatever order the single responses are asked for.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Response:
    """Sampled tokens, the end token included, and the log-probability of each at the temperature they were drawn at."""

    token_ids: list[int]
    log_probs: list[float]


def seeded_noise(shape: tuple[int, ...], *key: object) -> Tensor:
    """Standard Gumbel noise, float64 of `shape`, that follows from `key` by way of its `repr`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return -torch.empty(shape, dtype=torch.float64).exponential_(generator=generator).log()


@torch.no_grad()
def sample_group(
    model: PreTrainedModel,
    prompt_ids: list[int],
    numbers: range,
    max_tokens: int,
    temperature: float,
    end_id: int,
    seed: tuple[int, ...],
) -> list[Response]:
    """Sample the responses of one prompt that have these `numbers`; number `k` depends on `(seed, prompt, k)`.

    `temperature=0` takes the likeliest token each time; its log-probabilities are those at temperature 1.
    """
    group_size, vocab_size = len(numbers), model.config.vocab_size
    noise = torch.zeros(group_size, max_tokens, vocab_size, dtype=torch.float64)  # [G, R, V]
    if temperature > 0:
        noise = torch.stack([seeded_noise((max_tokens, vocab_size), seed, prompt_ids, k) for k in numbers])

    output = model(input_ids=torch.tensor([prompt_ids]), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = output.logits[:, -1].expand(group_size, -1)
    tokens, log_probs = [], []
    ended = torch.zeros(group_size, dtype=torch.bool)
    for position in range(max_tokens):
        scaled = logits.double() / (temperature or 1.0)
        token_ids = (scaled + noise[:, position]).argmax(-1)  # [G]
        tokens.append(token_ids)
        log_probs.append(scaled.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0])
        ended |= token_ids == end_id
        if ended.all() or position == max_tokens - 1:
            break
        # Rows that have ended go on until all have: a smaller batch would round differently.
        logits = model(input_ids=token_ids[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist(), strict=True)
    return [cut_after_end(*row, end_id) for row in rows]


def cut_after_end(token_ids: list[int], log_probs: list[float], end_id: int) -> Response:
    """Leave out what was decoded after the end token while other rows of the batch went on."""
    length = token_ids.index(end_id) + 1 if end_id in token_ids else len(token_ids)
    return Response(token_ids[:length], log_probs[:length])
