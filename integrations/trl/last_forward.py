"""The forward by which DDP synchronises gradients, where micro-batches of an optimizer step share forwards.

DDP reduces the gradients of an optimizer step in its last backward, if it has seen a forward since the one before. It then
waits for every parameter; with ``find_unused_parameters`` for those that the last forward before the backward reaches, and it
stops where the backward reaches more. It also sends buffers to all processes before the forward that follows. So where
micro-batches share forwards, each process makes one forward under its eyes, the last of the step, and that forward reaches
the vision tower wherever the backward does. Where the rows of the last micro-batch have been forwarded before, or have no
image, one more row is forwarded: a token, or an image of another row. Its results are dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from prefix_grouper_plugins.batch import blocks_on_host
from prefix_grouper_plugins.integrations.trl.forward import Rows
from prefix_grouper_plugins.integrations.trl.images import DummyImageRow
from prefix_grouper_plugins.modeling import is_multimodal, transformers_model
from prefix_grouper_plugins.token_budget import RowTokens


def unseen(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Forwards in here are not the one by which DDP synchronises gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def shows_images(rows: Iterable[RowTokens]) -> bool:
    """Whether a row that is forwarded has images."""
    return any(row.images and row.prompt is not None for row in rows)


def row_besides(
    model: Any,
    rows: Rows,
    tokens: Iterable[RowTokens],
    window: Iterable[RowTokens],
    dummy: DummyImageRow,
    *,
    ahead: bool,
) -> Rows | None:
    """What is forwarded after the last micro-batch of an optimizer step on one of several processes; None if nothing is.

    Args:
        model: as DDP wraps it.
        rows: of the micro-batch.
        tokens: of the same rows.
        window: of all rows of the optimizer step so far that may share forwards with them, these included.
        dummy: lends the image, where a row of the generation batch has one.
        ahead: whether an earlier micro-batch has forwarded them.

    Returns:
        rows of which ``nothing_to_score`` forwards what is needed.
    """
    waits = not getattr(model, "find_unused_parameters", False)  # even if no process has shown the tower an image
    if is_multimodal(transformers_model(model).config) and dummy.is_chosen and (waits or shows_images(window)):
        if shows_images(tokens) and not ahead:
            return None
        if not shows_images(tokens):
            dummy.tell()
        blocks, images = dummy.alone(rows.input_ids.device)
        return Rows.of_blocks(blocks, blocks_on_host(*blocks), images)
    return rows if ahead else None
