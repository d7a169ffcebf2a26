"""An image for micro-batches that have none, where other ranks have one.

Most vision-language models do not run their vision tower without an image. A rank whose tower runs gathers its sharded
parameters, and waits for ranks whose towers do not: with verl such a step crashes or hangs. verl has forwards of its own
for some models, which show the tower an empty picture then. For the others a packed row borrows one: the placeholders of
some row stand behind it as padding, which belongs to no row. Nothing that is computed there reaches a loss.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name

from prefix_grouper_plugins.integrations.verl.vision.images import RowInputs, images_of, row_inputs

_KEY = "dummy_image"


class DummyImage(NamedTuple):
    """Placeholder tokens, ``LongTensor[n]`` on the CPU, and what the processor made of the images that they stand for."""

    placeholders: Tensor
    inputs: RowInputs


def dummy_image(micro_batch: TensorDict) -> DummyImage | None:
    """What :func:`add_dummy_images` has given to this micro-batch."""
    found: DummyImage | None = tu.get_non_tensor_data(micro_batch, _KEY, None)
    return found


def add_dummy_images(micro_batches: Sequence[TensorDict], placeholders: Collection[int], group: Any) -> None:
    """Give an image to each micro-batch without one, if that of another rank has one. In place, on all ranks of ``group``.

    Args:
        micro_batches: of this rank, as many as on any other, run in this order.
        placeholders: token ids that stand for images.
        group: the ranks that shard the model.
    """
    shown = [any(map(images_of, row_inputs(batch))) for batch in micro_batches]
    needed = torch.tensor(shown, dtype=torch.int, device=get_device_name())
    dist.all_reduce(needed, op=dist.ReduceOp.MAX, group=group)
    lacking = [
        i for i, (mine, any_rank) in enumerate(zip(shown, needed.tolist(), strict=True)) if any_rank and not mine
    ]
    ranks = dist.get_world_size(group)
    # The first rank with an image, counted down so that one reduction tells both that and whether some rank lacks one.
    lender = ranks - dist.get_rank(group) if any(shown) else 0
    asked = torch.tensor([lender, int(bool(lacking))], device=get_device_name())
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
    first, somebody_lacks = asked.tolist()
    if not somebody_lacks:
        return
    whole: Any = dist.group.WORLD if group is None else group
    image = [_some_image(micro_batches, placeholders) if first == lender else None]
    dist.broadcast_object_list(image, src=dist.get_global_rank(whole, ranks - first), group=group)
    for i in lacking:
        tu.assign_non_tensor(micro_batches[i], **{_KEY: image[0]})


def _some_image(micro_batches: Sequence[TensorDict], placeholders: Collection[int]) -> DummyImage:
    tokens = torch.tensor(sorted(placeholders), dtype=torch.long)
    for batch in micro_batches:
        for row, ids in zip(row_inputs(batch), batch["input_ids"].unbind(), strict=True):
            if shown := images_of(row):
                ids = ids.cpu()
                return DummyImage(ids[torch.isin(ids, tokens)], shown)
    raise AssertionError("no row has an image")
