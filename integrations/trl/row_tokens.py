"""What each row of TRL's micro-batches adds to a packed forward, in tokens, and what it has in common with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from prefix_grouper_plugins.batch import Blocks, prompt_group
from prefix_grouper_plugins.integrations.trl.forward import Rows
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.token_budget import RowTokens


def tokens_of_rows(model: Any, on_host: Blocks, images: RowsOfImages) -> list[RowTokens]:
    """What each row adds to a packed forward.

    Rows have a prompt in common where it is equal, padding and images included.

    Args:
        model: that takes the rows.
        on_host: ids and masks as `blocks_on_host` returns them.
        images: those of the rows.
    """
    prompt_ids, prompt_mask, _, completion_mask = on_host
    ids = prompt_ids.masked_fill(~prompt_mask, -1)
    prompts, completions = prompt_mask.sum(1).tolist(), completion_mask.sum(1).tolist()
    rows = zip(images.keys(model, on_host), ids, prompts, completions, images.num_images, strict=True)
    return [
        RowTokens.of(prompt_group(key, row), prompt, completion)._replace(images=shown)
        for key, row, prompt, completion, shown in rows
    ]


def with_levels(rows: Sequence[RowTokens], on_host: Blocks, min_level: int | None) -> list[RowTokens]:
    """``rows``, from `tokens_of_rows`, with what completions of a prompt share.

    Args:
        rows, on_host: as there.
        min_level: as in `PrefixLayout.from_rows`.
    """
    prompts = [row.prompt for row in rows if row.prompt is not None]
    if min_level is None or len(set(prompts)) == len(prompts):
        return list(rows)
    mark = torch.tensor([-1])  # in the place of the prompt, whose last token is forwarded with each completion
    completions = [ids[own] for ids, own in zip(*on_host[2:], strict=True)]
    layout = PrefixLayout.from_rows(
        [torch.cat([mark, ids]) for ids in completions], [row.prompt for row in rows], min_level=min_level
    )
    lengths = (layout.segments[:, 1] - layout.segments[:, 0]).tolist()
    users = Counter(segment for path in layout.row_segments for segment in path)
    levels = [tuple((s, lengths[s]) for s in path if users[s] > 1) for path in layout.row_segments]
    return [row._replace(levels=own) for row, own in zip(rows, levels, strict=True)]


def tokens_of_unknown(model: Any, rows: Rows) -> list[RowTokens]:
    """Those of rows that are in no micro-batch: text may have a prompt that is open, images are not compared with such."""
    tokens = tokens_of_rows(model, rows.on_host, rows.images)
    return [row._replace(prompt=object()) if row.images and row.prompt is not None else row for row in tokens]
