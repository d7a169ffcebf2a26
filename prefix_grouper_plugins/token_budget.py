"""How many micro-batches run as one forward: as many as hold no more tokens than one of them holds padded.

Trainers choose the rows of a micro-batch by the memory they have, and a stock micro-batch of ``b`` rows holds ``b`` padded
rows. Where rows share their prompts, several micro-batches fit into as many tokens, and one forward for all of them keeps
the device busier than one for each.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple


class RowTokens(NamedTuple):
    """What a row adds to a packed forward.

    Attributes:
        prompt: what it has in common with the rows of its prompt; None where the row is not forwarded.
        prompt_tokens: tokens of the prompt that are forwarded once for all rows, ``P - 1``.
        completion_tokens: tokens of the completion.
        levels: name and tokens of what its completion has in common with others of its prompt, where that is shared.
    """

    prompt: Hashable
    prompt_tokens: int
    completion_tokens: int
    levels: tuple[tuple[Hashable, int], ...] = ()


def num_that_fit(
    micro_batches: Sequence[Sequence[RowTokens]], budget: int, *, held: int = 0, opened: Collection[Hashable] = ()
) -> int:
    """How many of ``micro_batches``, from the first on, one forward takes: those that fit, and the first in any case.

    Args:
        micro_batches: at least one, in the order in which they run.
        budget: tokens.
        held: tokens that are in memory already, those of open prompts.
        opened: prompts that have been forwarded, and count in ``held``.
    """
    prompts, tokens = set(opened), held
    levels: set[Hashable] = set()
    for number, rows in enumerate(micro_batches):
        for row in rows:
            if row.prompt is None:
                continue
            tokens += row.completion_tokens + (0 if row.prompt in prompts else row.prompt_tokens)
            prompts.add(row.prompt)
            tokens -= sum(shared for name, shared in row.levels if name in levels)
            levels.update(name for name, _ in row.levels)
        if tokens > budget:
            return max(number, 1)
    return len(micro_batches)
