"""Rows for the self-check: a small tree of token ids."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_of_rows(words: list[int], reach: int, generator: torch.Generator) -> list[Tensor]:
    """Five rows: two prompts that begin alike, responses of mixed lengths, two of which begin alike.

    Args:
        words: token ids to take from.
        reach: a sliding window; what the prompts share is longer.
    """
    first = iter(words)  # branches begin with different words, so that they part where they should

    def text(length: int) -> Tensor:
        rest = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        return torch.tensor([next(first), *(words[i] for i in rest)])

    shared = text(reach + 5)
    prompts = torch.cat([shared, text(7)]), torch.cat([shared, text(4)])
    begun = torch.cat([prompts[0], text(4)])
    return [
        torch.cat([begun, text(6)]),
        torch.cat([begun, text(9)]),
        torch.cat([prompts[0], text(5)]),
        torch.cat([prompts[1], text(8)]),
        torch.cat([prompts[1], text(5)]),
    ]
