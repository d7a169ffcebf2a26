"""Rows for the self-check: two small trees of token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LONGEST = 136  # the rows pass 64 and 128, sizes in which much code cuts a sequence
_LARGEST_CHUNK = 512  # larger chunks of a config are left to the first batch
_MARGIN = 8  # places that padding and positions which do not count from 0 need
PROMPTS_DIFFER_BY = 3  # tokens
_CHUNK = re.compile(r"chunk|block_size")
_MOST_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# Tokens that ordinary rows contain: between the turns of a chat, or at the beginning. Not placeholders of images.
_INSIDE = ("eos_token_id", "bos_token_id", "sep_token_id")


def longest_row(configs: Sequence[Any], limit: int | None, reach: int, tables: Sequence[int] | None = None) -> int:
    """How long the longest rows of a self-check should be, in tokens.

    Args:
        configs: those of the model.
        limit: a length that no row may reach, or None.
        reach: a sliding window to go beyond, or 0.
        tables: for longer rows than usual, the numbers of places in tables of the model that positions may be looked up in: a
            position beyond such a table would end the process on a GPU.
    """
    values = [(name, v) for config in configs for name, v in vars(config).items() if type(v) is int and v > 0]
    chunks = [v for name, v in values if _CHUNK.search(name) and v <= _LARGEST_CHUNK]
    wanted = max([_LONGEST if tables is None else 2 * _LONGEST, *(chunk + _MARGIN for chunk in chunks)]) + reach
    most = [v - _MARGIN for name, v in values if name in _MOST_POSITIONS]
    most += [max(v // 2, _LONGEST) for v in tables or () if v > _LONGEST + _MARGIN]  # packed they are twice as long
    return min([wanted, *most, *([] if limit is None else [limit - 1])])


def special_tokens(configs: Sequence[Any]) -> list[int]:
    """Ids of the special tokens that occur inside of ordinary rows, each once."""
    found: dict[Any, None] = {}
    for name in _INSIDE:
        for config in configs:
            value = getattr(config, name, None)
            found |= dict.fromkeys(value if isinstance(value, (list, tuple)) else [value])
    return [token for token in found if isinstance(token, int)]


def tree_of_rows(
    words: Sequence[int], special: Sequence[int], reach: int, long: int, longest: int, generator: torch.Generator
) -> tuple[list[Tensor], list[int]]:
    """Five rows: two prompts that begin alike, responses of mixed lengths, two of which begin alike; and a short row by itself.

    The last one stands far behind in the packed row, but its tokens are the first ones of their row.

    Args:
        words: ordinary token ids to take from.
        special: special tokens to put between them.
        reach: a sliding window; what the prompts share is longer.
        long, longest: lengths of the longest row of the first and of the second prompt, if what they share leaves them so much.
            The first row stands where it would stand alone, so that the other one shows more.
        generator: of the random words.

    Returns:
        the rows, and the length of each row's prompt.
    """
    first = iter(words)  # branches begin with different words, so that they part where they should

    def text(length: int, tokens: Sequence[int] = ()) -> Tensor:
        rest = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        made = torch.tensor([next(first), *(words[i] for i in rest)])
        for i, token in enumerate(tokens):
            made[(i + 1) * length // (len(tokens) + 1)] = token
        return made

    shared = text(reach + min(54, max(5, (long - reach) * 2 // 5 - 2)), special)
    prompts = torch.cat([shared, text(4 + PROMPTS_DIFFER_BY)]), torch.cat([shared, text(4)])
    begun = torch.cat([prompts[0], text(4)])
    rows = [
        torch.cat([begun, text(max(long - len(begun), 6), special)]),
        torch.cat([begun, text(9)]),
        torch.cat([prompts[0], text(6, special[:1])]),  # odd where the one before is even
        torch.cat([prompts[1], text(max(longest - len(prompts[1]), 8), list(special[:1]) * 2)]),
        text(12),
    ]
    return rows, [len(prompts[0])] * 3 + [len(prompts[1]), 6]
