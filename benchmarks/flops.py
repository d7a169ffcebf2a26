"""What does a training step cost over the grid of the Prefix Grouper paper (arXiv 2506.05433)? FLOPs and memory, counted.

    python benchmarks/flops.py                 prefix 4096, 8192, 16384; prefix/response 0.5 ... 32; G = 2, 4, 8, 16

Qwen2.5-7B in bfloat16 on the meta device: `torch.utils.flop_counter` counts the matrix products of a forward and
backward, hooks of autograd the bytes kept for the backward. Each layer costs the same, so models of one and two layers
are counted and the other layers added. Three ways:

    rows        each row on its own: the prompt is repeated
    published   the paper's algorithm, as in its package: one pass, keys and values of the prompt copied for each response
    ours        the packed row

Attention counts the visible pairs of query and key in all three, as flash kernels compute them. The language-model head
runs on the responses. The script fails where a count of ours is further than 2 % from the formula of cost.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, number, write_csv
from meta_flash import flash
from models import MODELS, build, published_inputs, shape_of, use_published_attention
from prefix_grouper import PrefixGrouper
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.cost import ModelShape, compare
from prefix_grouper_plugins.modeling import packed_inputs

PREFIXES, RATIOS, GROUPS = (4096, 8192, 16384), (0.5, 1, 2, 4, 8, 16, 32), (2, 4, 8, 16)
TOLERANCE = 0.02
WAYS = ("rows", "published", "ours")


class MetaGrouper(PrefixGrouper):  # type: ignore[misc]
    """The published class where tensors have no values: the number of responses is known, so it need not be read."""

    def __init__(self, prompt: int, response: int, group: int) -> None:
        super().__init__([[prompt] + [response] * group])
        self.repeats = group

    def batch_repeat_cat(self, prefix: Tensor, suffix: Tensor, cat_dim: int) -> Tensor:
        return torch.cat([prefix.repeat_interleave(self.repeats, dim=0), suffix], dim=cat_dim)


def published_forward(model: PreTrainedModel, prompt: int, response: int, group: int) -> Tensor:
    """Hidden states of the published package's pass, its attention replaced by one that is counted like ours."""
    grouper = MetaGrouper(prompt, response, group)
    inputs = published_inputs(grouper, 1, 1, 1, "meta")  # masks as large as the real ones are not wanted
    total = prompt + response * group

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        rows, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        pairs = rows * (queries * (queries + 1) // 2 + queries * (keys - queries))
        return flash(q, k, v, pairs).transpose(1, 2)

    inputs["grouped_attention"] = lambda q, k, v: grouper.forward(attention, q, k, v)
    inputs["position_ids"] = torch.zeros(1, total, dtype=torch.long, device="meta")
    return model.model(torch.zeros(1, total, dtype=torch.long, device="meta"), **inputs).last_hidden_state


def packed_forward(model: PreTrainedModel, layout: PrefixLayout) -> Tensor:
    """Hidden states of a packed row."""
    ids = torch.zeros(layout.num_tokens, dtype=torch.long, device="meta")
    return model.model(**packed_inputs(layout, ids)).last_hidden_state


def forwards(prompt: int, response: int, group: int) -> dict[str, Callable[[PreTrainedModel], Tensor]]:
    """For each way its forward to the last hidden states."""
    shared = PrefixLayout.from_groups([prompt], [[response] * group]).to("meta")
    # Groups of one response are segments of P - 1 + R tokens: whole rows.
    alone = PrefixLayout.from_groups([prompt + 1] * group, [[response]] * group).to("meta")
    return {
        "rows": lambda model: packed_forward(enable_prefix_grouper(model, self_check=False), alone),
        "published": lambda model: published_forward(model, prompt, response, group),
        "ours": lambda model: packed_forward(enable_prefix_grouper(model, self_check=False), shared),
    }


def count(
    forward: Callable[[PreTrainedModel], Tensor], shape: ModelShape, scored: int, published: bool
) -> tuple[int, int]:
    """FLOPs of a training step, and bytes that autograd keeps for the backward of the layers; head's logits apart."""
    (flops_1, kept_1), (flops_2, kept_2) = (_count(forward, shape, layers, scored, published) for layers in (1, 2))
    more = shape.num_layers - 1
    return flops_1 + more * (flops_2 - flops_1), shape.num_layers * (kept_2 - kept_1)


def _count(
    forward: Callable[[PreTrainedModel], Tensor], shape: ModelShape, layers: int, scored: int, published: bool
) -> tuple[int, int]:
    model = build(dataclasses.replace(shape, num_layers=layers), "meta", torch.bfloat16)
    if published:
        use_published_attention(model)
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no number is used twice
        return x

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = forward(model)
        model.lm_head(hidden[:, :1].expand(-1, scored, -1)).sum().backward()
    kept = sum(storage.nbytes() for number, storage in storages.items() if number not in weights)
    return counter.get_total_flops(), kept


def cell(shape: ModelShape, prompt: int, ratio: float, group: int) -> dict[str, Any]:
    """One row of the CSV."""
    response = round(prompt / ratio)
    scored = group * response
    cost = compare(shape, PrefixLayout.from_groups([prompt], [[response] * group]), scored=scored)
    counts = {
        way: count(forward, shape, scored, way == "published")
        for way, forward in forwards(prompt, response, group).items()
    }
    error = counts["ours"][0] / cost.shared.training_flops - 1
    print(f"{prompt:>6} {ratio:>5} {group:>3}  ours {error:+.4%} from the formula, rows/ours "
          f"{counts['rows'][0] / counts['ours'][0]:.2f} in FLOPs", flush=True)  # fmt: skip
    return {
        "prefix": prompt,
        "ratio": ratio,
        "response": response,
        "group": group,
        **{f"{way}_tflops": number(counts[way][0] / 1e12, 7) for way in WAYS},
        "formula_rows_tflops": number(cost.ordinary.training_flops / 1e12, 7),
        "formula_ours_tflops": number(cost.shared.training_flops / 1e12, 7),
        "error": f"{error:.6f}",
        **{f"{way}_kept_gib": number(counts[way][1] / 2**30, 6) for way in WAYS},
        "formula_ours_kept_gib": number(cost.shared.activation_bytes / 2**30, 6),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", choices=list(MODELS))
    parser.add_argument("--prefixes", type=int, nargs="+", default=PREFIXES)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="prefix length / response length")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--output", type=Path, default=RESULTS / "flops.csv")
    args = parser.parse_args(arguments)
    grid = [(p, r, g) for p in args.prefixes for r in args.ratios for g in args.groups]
    rows = [cell(shape_of(args.model), *place) for place in grid]
    note = f"{args.model}, bfloat16, forward and backward, counted on the meta device"
    write_csv(args.output, rows, "cpu", note)
    wrong = [row for row in rows if abs(float(row["error"])) > TOLERANCE]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} counts are further than {TOLERANCE:.0%} from the formula")


if __name__ == "__main__":
    main(sys.argv[1:])
