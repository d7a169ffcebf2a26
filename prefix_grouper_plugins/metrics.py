"""What was shared, and what was not and why: counted on every forward, so that sharing is never silently off.

The one counter. Trainers count their forwards in a :class:`SharingMeter`, by pass; whatever else can take a slower way
than it was asked for counts that in a :class:`ReasonCounter`. Torch is imported only where processes add up.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

logger = logging.getLogger("prefix_grouper_plugins")

UPDATE = "update"  # the forwards that the loss is made of
OLD_LOG_PROB = "old_log_prob"  # log-probs of the policy that sampled
REF_LOG_PROB = "ref_log_prob"  # log-probs of the reference policy
VALUES = "values"  # values of a critic
PASSES = (UPDATE, OLD_LOG_PROB, REF_LOG_PROB, VALUES)

METRICS = (
    "prefix_grouper/token_ratio",
    "prefix_grouper/rows_per_group",
    "prefix_grouper/fallbacks",
    "prefix_grouper/tokens_forwarded",
    "prefix_grouper/row_tokens",
    "prefix_grouper/shared_at_level_1",
    "prefix_grouper/shared_at_level_2",
    "prefix_grouper/shared_at_level_3",
    "prefix_grouper/old_log_prob_token_ratio",
    "prefix_grouper/old_log_prob_rows_per_group",
    "prefix_grouper/ref_log_prob_token_ratio",
    "prefix_grouper/ref_log_prob_rows_per_group",
    "prefix_grouper/values_token_ratio",
    "prefix_grouper/values_rows_per_group",
)
# Of generation without vLLM, in TRL.
GENERATION_TOKEN_RATIO = "prefix_grouper/generation_token_ratio"
GENERATION_FALLBACKS = "prefix_grouper/generation_fallbacks"


@dataclass
class Counts:
    """Of one forward or several.

    Attributes:
        tokens_forwarded, row_tokens: what was processed, and what ordinary, unpadded forwards would have processed.
        squares, row_squares: the same for pairs of a query and a key that it sees: twice their number, less one for each
            query, so that a row of ``L`` tokens counts ``L ** 2``, as in estimates of FLOPs. 0 where nobody counts them.
        rows, groups: rows, and distinct prompts among those of one forward.
        packed, fallbacks: shared forwards, and ordinary ones that should have been shared.
        ordinary: ordinary forwards of rows that had too little in common, which are no fallbacks.
        shared_1, shared_2, shared_3: tokens of the rows that were not forwarded since rows share them at the first, at the
            second, and at deeper levels of their tree.
    """

    tokens_forwarded: int = 0
    row_tokens: int = 0
    squares: int = 0
    row_squares: int = 0
    rows: int = 0
    groups: int = 0
    packed: int = 0
    fallbacks: int = 0
    shared_1: int = 0
    shared_2: int = 0
    shared_3: int = 0
    ordinary: int = 0

    @classmethod
    def of_rows(cls, lengths: Sequence[int]) -> Counts:
        """Of rows of ``lengths`` tokens in an ordinary forward, which itself is not counted."""
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        return cls(tokens, tokens, squares, squares, rows=len(lengths), groups=len(lengths))

    @classmethod
    def of_levels(cls, shared: Sequence[int]) -> Counts:
        """Nothing but what rows share: the tokens of each level, `PrefixLayout.shared_by_level`."""
        first, second, *deeper = [*shared, 0, 0]
        return cls(shared_1=first, shared_2=second, shared_3=sum(deeper))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))

    @property
    def forwards(self) -> int:
        return self.packed + self.fallbacks + self.ordinary

    @property
    def token_ratio(self) -> float:
        """Tokens forwarded over the tokens of the rows; 1.0 where nothing was counted."""
        return self.tokens_forwarded / self.row_tokens if self.row_tokens else 1.0

    @property
    def rows_per_group(self) -> float:
        """Mean number of rows that shared one prompt; 0.0 where nothing was counted."""
        return self.rows / self.groups if self.groups else 0.0

    @property
    def shared_at_levels(self) -> tuple[float, float, float]:
        """Tokens shared at the first, the second and at deeper levels, over the tokens of the rows."""
        tokens = max(self.row_tokens, 1)
        return self.shared_1 / tokens, self.shared_2 / tokens, self.shared_3 / tokens


class ReasonCounter(dict[str, int]):
    """How often something was done in another way than it was asked for, by reason.

    Args:
        message: what is logged as a warning, with ``%s`` for the reason, when a reason is counted for the first time.
        warn: False to count only.
    """

    def __init__(self, message: str, *, warn: bool = True) -> None:
        super().__init__()
        self._message, self._warn = message, warn

    def count(self, reason: str, times: int = 1) -> None:
        if self._warn and reason not in self:
            logger.warning(self._message, reason)
        self[reason] = self.get(reason, 0) + times


class SharingCounts:
    """Counts by pass, and the reasons of fallbacks.

    Attributes:
        passes (`dict[str, Counts]`): for each of ``PASSES``.
        fallbacks (`dict[str, int]`): ordinary forwards that should have been packed, of all passes, by reason.
    """

    def __init__(self) -> None:
        self.passes = {name: Counts() for name in PASSES}
        self.fallbacks: dict[str, int] = {}

    def __add__(self, other: SharingCounts) -> SharingCounts:
        both = SharingCounts()
        both.passes = {name: self.passes[name] + other.passes[name] for name in PASSES}
        both.fallbacks = dict(Counter(self.fallbacks) + Counter(other.fallbacks))
        return both

    @property
    def total(self) -> Counts:
        """Of all passes."""
        return sum(self.passes.values(), Counts())

    @property
    def update(self) -> Counts:
        """Of the update alone."""
        return self.passes[UPDATE]

    def metrics(self, *, share: bool = False) -> dict[str, float]:
        """Named as every integration logs them (``METRICS``).

        ``fallbacks`` is of all passes, everything else of the update; other passes that made a forward have figures of
        their own.

        Args:
            share: ``fallbacks`` as a share of all forwards instead of their number.
        """
        total = self.total
        named = {
            "prefix_grouper/token_ratio": self.update.token_ratio,
            "prefix_grouper/rows_per_group": self.update.rows_per_group,
            "prefix_grouper/fallbacks": total.fallbacks / max(total.forwards, 1) if share else float(total.fallbacks),
        }
        named["prefix_grouper/tokens_forwarded"] = float(self.update.tokens_forwarded)
        named["prefix_grouper/row_tokens"] = float(self.update.row_tokens)
        for level, share_of_rows in enumerate(self.update.shared_at_levels, 1):
            named[f"prefix_grouper/shared_at_level_{level}"] = share_of_rows
        for name, counts in self.passes.items():
            if name != UPDATE and counts.forwards:
                named[f"prefix_grouper/{name}_token_ratio"] = counts.token_ratio
                named[f"prefix_grouper/{name}_rows_per_group"] = counts.rows_per_group
        return named

    def summed(self, device: Any, group: Any = None) -> SharingCounts:
        """The sum over the processes of ``group``, reasons included. A collective; these counts where there is one process.

        Args:
            device: where the group's collectives run.
            group: by default all processes.
        """
        import torch
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return self
        numbers = torch.tensor([astuple(self.passes[name]) for name in PASSES], dtype=torch.int64, device=device)
        dist.all_reduce(numbers, group=group)
        everywhere = SharingCounts()
        everywhere.passes = {name: Counts(*row) for name, row in zip(PASSES, numbers.tolist(), strict=True)}
        if everywhere.total.fallbacks:
            found: list[dict[str, int]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(found, dict(self.fallbacks), group=group)
            everywhere.fallbacks = dict(sum(map(Counter, found), Counter[str]()))
        return everywhere


class SharingMeter(SharingCounts):
    """Counts packed forwards and fallbacks, and warns of each new reason once.

    Args:
        warn: False where another process does the talking.

    Attributes:
        recent (`SharingCounts`): since the last :meth:`take`.

    Its counts are of all forwards so far; its properties are those of :class:`Counts`, over all passes.
    """

    def __init__(self, *, warn: bool = True) -> None:
        super().__init__()
        self.fallbacks: ReasonCounter = ReasonCounter(
            "prefix grouper: this forward runs without sharing: %s", warn=warn
        )
        self._warn = warn
        self._reported: set[str] = set()
        self.recent = SharingCounts()

    @property
    def tokens_forwarded(self) -> int:
        return self.total.tokens_forwarded

    @property
    def row_tokens(self) -> int:
        return self.total.row_tokens

    @property
    def rows(self) -> int:
        return self.total.rows

    @property
    def groups(self) -> int:
        return self.total.groups

    @property
    def packed(self) -> int:
        return self.total.packed

    @property
    def token_ratio(self) -> float:
        return self.total.token_ratio

    @property
    def rows_per_group(self) -> float:
        return self.total.rows_per_group

    def count_packed(self, counts: Counts, *, during: str = UPDATE) -> None:
        """Count one packed forward of ``counts`` in the pass ``during``."""
        self._add(counts + Counts(packed=1), during)

    def count_rows(self, lengths: Sequence[int], *, during: str = UPDATE) -> None:
        """Count one ordinary forward of rows that had nothing or too little in common, which is no fallback.

        Args:
            lengths: tokens of each of its rows.
            during: the pass.
        """
        self._add(Counts.of_rows(lengths) + Counts(ordinary=1), during)

    def count_fallback(self, reason: str, lengths: Sequence[int] = (), *, during: str = UPDATE) -> None:
        """Count one ordinary forward in place of a packed one.

        Args:
            reason: why it was not shared; the first of each reason is logged as a warning.
            lengths: tokens of each of its rows.
            during: the pass.
        """
        self._add(Counts.of_rows(lengths) + Counts(fallbacks=1), during)
        self.fallbacks.count(reason)
        self.recent.fallbacks[reason] = self.recent.fallbacks.get(reason, 0) + 1

    def take(self) -> SharingCounts:
        """What was counted since the last call of this method."""
        taken, self.recent = self.recent, SharingCounts()
        return taken

    def warn_of(self, everywhere: SharingCounts) -> None:
        """Warn of the reasons in ``everywhere``, counts summed over processes, that this process has not logged yet."""
        for reason in everywhere.fallbacks:
            if self._warn and reason not in self.fallbacks and reason not in self._reported:
                logger.warning("prefix grouper: forwards of another process run without sharing: %s", reason)
            self._reported.add(reason)

    def _add(self, counts: Counts, during: str) -> None:
        self.passes[during] += counts
        self.recent.passes[during] += counts
