"""The first real micro-batch of a run, both ways: for model classes that no test has compared.

A few tokens cannot show everything: a capacity of experts, a chunk longer than the rows, a special token that only this
class knows. So before its results are used a trainer runs its first micro-batch on the ordinary path and on the shared one,
and compares log-probs and gradients (:mod:`.micro_batch`). Under ``torch.no_grad`` log-probs alone are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.self_check.micro_batch import Backward, Compared, Scored, compare_micro_batch

Scoring = Callable[[Any], Tensor]


def compare_first_batch(
    model: nn.Module,
    ordinary: Scoring,
    shared: Mapping[str, Scoring],
    mask: Tensor,
    device: torch.device,
    backward: Backward | None = None,
) -> Compared:
    """Compare the log-probs of one micro-batch, and the gradients of a sum of them with random signs. Leaves no trace.

    Args:
        model: as it is trained, see :func:`.micro_batch.compare_micro_batch`.
        ordinary: scores the micro-batch with the model that it is given, ``[B, C]``, on the ordinary path.
        shared: likewise, on each shared path, by name.
        mask: ``[B, C]``, 1 where a token counts.
        device: of the random states.
        backward: see there.
    """
    signs = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(0)).to(mask.device) * 2.0 - 1

    def path(score: Scoring) -> Callable[[Any], Scored]:
        def run(inner: Any) -> Scored:
            log_probs = score(inner)
            return Scored([log_probs], [mask], (log_probs * signs)[mask != 0].sum())

        return run

    paths = {name: path(score) for name, score in shared.items()}
    result = compare_micro_batch(model, path(ordinary), paths, device, backward=backward)
    return replace(result, reason=None if result.reason is None else f"on the first batch {result.reason}")
