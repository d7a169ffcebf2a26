"""A dummy image for micro-batches without images, if another rank has some.

Most vision-language models run their vision tower only on images. A rank whose tower runs gathers the tower's sharded
parameters and waits for all ranks, so with verl such a step crashes or hangs. For some models verl has its own forward,
which then gives the tower an empty image. For the others a dummy image is added to the packed row: its placeholders
follow as padding, which belongs to no row, so nothing that is computed there reaches a loss.
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
    """Placeholder tokens, ``LongTensor[n]`` on the CPU, and the processor's tensors of their images."""

    placeholders: Tensor
    inputs: RowInputs


def dummy_image(micro_batch: TensorDict) -> DummyImage | None:
    """The one that :func:`add_dummy_images` added to this micro-batch, or None."""
    found: DummyImage | None = tu.get_non_tensor_data(micro_batch, _KEY, None)
    return found


def add_dummy_images(micro_batches: Sequence[TensorDict], placeholders: Collection[int], group: Any) -> None:
    """Add a dummy image to each micro-batch that has no image while that of another rank has one. In place.

    A collective: every rank of ``group`` calls it.

    Args:
        micro_batches: those of this rank, in the order in which they run; every rank has the same number.
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
    # Counted down, so that one reduction finds both the first rank with an image and whether any rank lacks one.
    source = ranks - dist.get_rank(group) if any(shown) else 0
    found = torch.tensor([source, int(bool(lacking))], device=get_device_name())
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    first, any_lacking = found.tolist()
    if not any_lacking:
        return
    whole: Any = dist.group.WORLD if group is None else group
    image = [_some_image(micro_batches, placeholders) if first == source else None]
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
