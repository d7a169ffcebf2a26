"""Generation without vLLM, with each distinct prompt prefilled once.

TRL repeats every prompt for each of its completions and calls ``model.generate`` in ``_generate_single_turn``. Its prefill
then runs on the distinct prompts (:func:`~prefix_grouper_plugins.generation.shared_prefill`), and the same tokens are
sampled. vLLM and continuous batching share prompts by themselves and are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefix_grouper_plugins.generation import Prefill, shared_prefill
from prefix_grouper_plugins.metrics import GENERATION_FALLBACKS, GENERATION_TOKEN_RATIO, Counts, ReasonCounter


class SharedGeneration:
    """Counts what generation prefills, on this process.

    Args:
        warn: whether this process warns.

    Attributes:
        counts (`Counts`): all prefills so far; ``packed`` are those that were shared.
        fallbacks (`dict[str, int]`): prefills of every row, by reason.
    """

    def __init__(self, warn: bool) -> None:
        self.counts = Counts()
        self.fallbacks = ReasonCounter("prefix grouper: generation prefills every row: %s", warn=warn)

    @contextmanager
    def sharing(self, model: Any, metrics: Any) -> Iterator[None]:
        """Share the prefill of what ``model`` generates in this context.

        Args:
            model: the policy.
            metrics: the trainer's own lists of metrics by name, to which this prefill is added.
        """
        with shared_prefill(model, lambda prefill: self._count(prefill, metrics)):
            yield

    def _count(self, prefill: Prefill, metrics: Any) -> None:
        shared = prefill.reason is None
        self.counts += prefill.counts + Counts(packed=int(shared), fallbacks=int(not shared))
        if prefill.reason is not None:
            self.fallbacks.count(prefill.reason)
        metrics[GENERATION_TOKEN_RATIO].append(prefill.counts.token_ratio)
        metrics[GENERATION_FALLBACKS].append(float(not shared))
