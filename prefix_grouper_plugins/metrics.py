"""What was shared, and what was not and why: counted on every forward, so that sharing is never silently off."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger("prefix_grouper_plugins")


def sharing_metrics(token_ratio: float, rows_per_group: float, fallbacks: float) -> dict[str, float]:
    """What every integration logs, by the names under which it does."""
    return {
        "prefix_grouper/token_ratio": token_ratio,
        "prefix_grouper/rows_per_group": rows_per_group,
        "prefix_grouper/fallbacks": float(fallbacks),
    }


class SharingMeter:
    """Counts packed forwards and fallbacks, and warns of each new reason once.

    Attributes:
        tokens_forwarded, row_tokens: what packed forwards processed, and what ordinary, unpadded ones would have.
        rows, groups: rows and distinct prompts in packed forwards.
        packed: packed forwards.
        fallbacks: ordinary forwards that should have been packed, by reason.
    """

    def __init__(self, *, warn: bool = True) -> None:
        self.tokens_forwarded = self.row_tokens = self.rows = self.groups = self.packed = 0
        self.fallbacks: Counter[str] = Counter()
        self._warn = warn

    def count_packed(self, *, tokens_forwarded: int, row_tokens: int, rows: int, groups: int) -> dict[str, float]:
        """Count one packed forward; return its metrics, named as the integrations log them."""
        self.packed += 1
        self.tokens_forwarded += tokens_forwarded
        self.row_tokens += row_tokens
        self.rows += rows
        self.groups += groups
        return sharing_metrics(tokens_forwarded / row_tokens, rows / groups, fallbacks=0)

    def count_fallback(self, reason: str) -> dict[str, float]:
        """Count one ordinary forward in place of a packed one; the first of each reason is logged as a warning."""
        if self._warn and reason not in self.fallbacks:
            logger.warning("prefix grouper: this forward runs without sharing: %s", reason)
        self.fallbacks[reason] += 1
        return {"prefix_grouper/fallbacks": 1.0}

    @property
    def token_ratio(self) -> float:
        """Tokens forwarded in packed forwards over the tokens of their rows; 1.0 where nothing was packed."""
        return self.tokens_forwarded / self.row_tokens if self.row_tokens else 1.0

    @property
    def rows_per_group(self) -> float:
        """Mean number of rows that shared one prompt; 0.0 where nothing was packed."""
        return self.rows / self.groups if self.groups else 0.0
