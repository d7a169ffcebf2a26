"""One of two processes among which transformers cuts the layers of a model: packed rows against rows of the whole model.

    RANK=0 WORLD_SIZE=2 ... python -m tests.modeling.tensor_parallel FIGURES.json FOLDER ...

writes for each model of the folders whether the self-check has passed, the largest difference of a log-prob, and that of a
gradient tensor relative to its norm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper, self_check
from prefix_grouper_plugins.modeling import packed_inputs
from tests import tiny

ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)


def compare(folder: str) -> tuple[bool, float, float]:
    """See above."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    split = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").train()
    query = split.model.layers[0].self_attn.q_proj.weight
    assert isinstance(query, DTensor) and query.to_local().shape[0] == query.shape[0] // 2, "nothing was cut"
    passed = self_check(enable_prefix_grouper(split, self_check="later")).passed
    logits = split(**packed_inputs(LAYOUT, LAYOUT.pack(ROWS))).logits[0]
    packed = LAYOUT.unpack(logits.log_softmax(-1))
    rows = [whole(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for row in ROWS]
    for found in (packed, rows):
        sum(logps.gather(1, row[1:, None]).sum() for logps, row in zip(found, ROWS, strict=True)).backward()
    gradients = [0.0]
    own = dict(split.named_parameters())
    for name, weight in whole.named_parameters():
        if weight.grad is not None:
            grad = own[name].grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            gradients.append(float((grad - weight.grad).norm() / weight.grad.norm().clamp(min=1e-4)))
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(packed, rows, strict=True))
    return passed, difference, max(gradients)


def main(figures: str, *folders: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [compare(folder) for folder in folders]
    if dist.get_rank() == 0:
        Path(figures).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
