"""What does sharing sampled tokens gain, and how long must a level of the tree be to pay?

    python benchmarks/trees.py levels      groups whose responses share a few tokens, by the length of what they share
    python benchmarks/trees.py rollouts    one prompt with 64 rollouts, and tool use of depth 4 that branches
    python benchmarks/trees.py packing     the time to lay these rows out, ours and that of TRL's asynchronous trainer

One forward and backward of the decoder of a small Qwen2 model, in turns. `levels` compares the prompt shared alone with the
whole tree, for each backend that runs on the device. The least length that pays is the shortest from which on all ratios
are at least 1.05; `prefix_grouper_plugins/attention/levels.py` quotes it. `rollouts` compares both, and rows on their own
(`stock`, padded, as many at a time as memory takes easily), with the ratio of forwarded tokens beside the time; and the tree of
TRL's asynchronous trainer by its own attention where that runs, on Hopper GPUs with FlashAttention 3 from the hub.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness import RESULTS, number, use, write_csv
from models import SMALL, build
from torch import Tensor, nn

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.bench import Step, take_turns, times_as_fast
from prefix_grouper_plugins.modeling import packed_inputs

SHAPE = dataclasses.replace(SMALL, num_layers=2)
LENGTHS = (1, 2, 4, 8, 16, 32)  # tokens of each level
PROMPT, RESPONSE, GROUP, DEPTH = (
    256,
    128,
    16,
    3,
)  # of `levels`: three levels, at each of which every branch forks in two
STOCK_ROWS = 8  # rows of a padded forward
MARGIN = 1.05
BACKENDS = ("merged_lse", "triton", "flex", "blockwise")


def tokens(count: int, seed: str) -> list[int]:
    generator = random.Random(seed)
    return [generator.randint(1, SHAPE.vocab_size - 1) for _ in range(count)]


def forks(level: int) -> tuple[list[Tensor], int]:
    """A group whose responses fork in two after each of `DEPTH` levels of ``level`` tokens, and the prompt's length."""
    prompt, rows = tokens(PROMPT, "prompt"), []
    for row in range(GROUP):
        shared = [t for d in range(DEPTH) for t in tokens(level, f"{d} {row * 2**d // GROUP}")]
        rows.append(torch.tensor([*prompt, *shared, *tokens(RESPONSE - len(shared), f"own {row}")]))
    return rows, PROMPT


def rollouts(group: int, prompt: int, response: int, calls: int, result: int) -> tuple[list[Tensor], int]:
    """``group`` rollouts of one prompt that begin with one of ``calls`` tool calls of 30 tokens and its result."""
    rows, asked = [], tokens(prompt, "prompt")
    for row in range(group):
        call = tokens(30, f"call {row % calls}") + tokens(result, f"result {row % calls}")
        rows.append(torch.tensor([*asked, *call, *tokens(response, f"own {row}")]))
    return rows, prompt


def tool_use(depth: int, branching: int, prompt: int, turn: int, result: int) -> tuple[list[Tensor], int]:
    """Every path of a tree of ``depth`` turns, each of which forks into ``branching``, with a tool result between turns."""
    asked, paths = tokens(prompt, "prompt"), [("", [])]
    for level in range(depth):
        after = result if level < depth - 1 else 0
        paths = [
            (f"{name}{fork}", row + tokens(turn, f"turn {name}{fork}") + tokens(after, f"result {name}{fork}"))
            for name, row in paths
            for fork in range(branching)
        ]
    return [torch.tensor(asked + row) for _, row in paths], prompt


def model_on(device: str) -> nn.Module:
    torch.manual_seed(0)
    return build(SHAPE, device, torch.float32 if device == "cpu" else torch.bfloat16)


def packed_step(model: nn.Module, rows: Sequence[Tensor], prompt: int, min_level: int | None, device: str) -> Step:
    """Forward and backward of the packed rows, shared as `PrefixLayout.from_rows` does with ``min_level``."""
    layout = PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=min_level)
    ids, on_device = layout.pack(rows).to(device), layout.to(device)

    def step() -> None:
        model.zero_grad()
        hidden = model.model(**packed_inputs(on_device, ids)).last_hidden_state  # type: ignore[operator, union-attr]
        (hidden * hidden).sum().backward()

    return step


def stock_step(model: nn.Module, rows: Sequence[Tensor], device: str) -> Step:
    """The same of padded rows."""
    batches = [
        (nn.utils.rnn.pad_sequence(part, batch_first=True).to(device), [len(row) for row in part])
        for part in (list(rows[i : i + STOCK_ROWS]) for i in range(0, len(rows), STOCK_ROWS))
    ]

    def step() -> None:
        model.zero_grad()
        for ids, lengths in batches:
            mask = torch.arange(ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
            hidden = model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # type: ignore[operator, union-attr]
            (hidden * hidden * mask[..., None]).sum().backward()

    return step


def trl_row(rows: Sequence[Tensor]) -> Any:
    """The rows as TRL's asynchronous trainer folds them into its tree, a `TreeRow`."""
    from trl.experimental.async_grpo.packing import TreeRow

    row = TreeRow()
    for ids in rows:
        zeros = torch.zeros_like(ids)
        row.add({"input_ids": ids, "completion_mask": zeros, "old_log_probs": zeros, "advantage": 0, "group_id": 0})
    return row


def trl_step(rows: Sequence[Tensor], device: str) -> Step | None:
    """Forward and backward of TRL's tree by its own attention; None where its kernel does not run."""
    from trl.experimental.async_grpo import packing

    try:
        packing._flash_attn()
    except Exception as error:  # no Hopper GPU, no `kernels`, no network: whatever it is, it does not run here
        print(f"TRL's tree attention does not run here: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return None
    packing.register_tree_attention()
    model: Any = model_on(device)
    model.config._attn_implementation = packing.TREE_ATTENTION
    packed = {name: tensor.to(device) for name, tensor in trl_row(rows).pack().items()}
    inputs: dict[str, Any] = {name: packed[name][None] for name in ("input_ids", "position_ids")}
    inputs |= {f"tree_{name}": packed[f"tree_{name}"] for name in ("kv_index", "cu_seqlens_q", "cu_seqlens_k")}
    inputs["tree_max_seqlen_q"], inputs["tree_max_seqlen_k"] = packed["tree_max_seqlens"].tolist()

    def step() -> None:
        model.zero_grad()
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        (hidden * hidden).sum().backward()

    return step


def packing_seconds(rows: Sequence[Tensor], prompt: int, repeats: int) -> tuple[float, float]:
    """CPU seconds in which we and TRL lay the rows out as trees, the least of ``repeats`` turns."""

    def ours() -> None:
        PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=1).pack(rows)

    least = [float("inf")] * 2
    for _ in range(repeats):
        for i, lay_out in enumerate((ours, lambda: trl_row(rows).pack())):
            start = time.process_time()
            lay_out()
            least[i] = min(least[i], time.process_time() - start)
    return least[0], least[1]


def measure_levels(device: str, repeats: int, backends: Sequence[str]) -> list[dict[str, Any]]:
    """A row of the table for each backend and length."""
    table = []
    for backend in backends:
        model = enable_prefix_grouper(model_on(device), backend=backend, self_check=False)
        for level in LENGTHS:
            rows, prompt = forks(level)
            steps = {
                "prompt": packed_step(model, rows, prompt, None, device),
                "tree": packed_step(model, rows, prompt, 1, device),
            }
            timings = take_turns(steps, repeats=repeats, device=device)
            counted = [PrefixLayout.from_rows(rows, shareable=[prompt] * GROUP, min_level=least) for least in (None, 1)]
            row = {
                "backend": backend,
                "level_tokens": level,
                "tokens_prompt": counted[0].num_tokens,
                "tokens_tree": counted[1].num_tokens,
                "tree_times_as_fast": number(times_as_fast(timings["tree"], timings["prompt"]), 3),
            }
            print(row, flush=True)
            table.append(row)
    return table


def least_that_pays(table: Sequence[dict[str, Any]], backend: str) -> int | None:
    """The shortest level from which on sharing it was at least `MARGIN` times as fast; None if none was."""
    ratios = {int(row["level_tokens"]): float(row["tree_times_as_fast"]) for row in table if row["backend"] == backend}
    paying = [level for level in ratios if all(ratios[longer] >= MARGIN for longer in ratios if longer >= level)]
    return min(paying, default=None)


CASES = {
    "64 rollouts that differ from the first token": lambda: rollouts(64, 512, 34, 64, 0),
    "64 rollouts, one of 4 tool calls first": lambda: rollouts(64, 256, 34, 4, 128),
    "tool use, depth 4, branching 2": lambda: tool_use(4, 2, 512, 48, 96),
    "tool use, depth 4, branching 3": lambda: tool_use(4, 3, 256, 24, 48),
    "tool use, depth 4, branching 4": lambda: tool_use(4, 4, 256, 24, 48),
}


PACKING = CASES | {"64 rollouts of 4096 tokens, a prompt of 2048": lambda: rollouts(64, 2048, 2018, 64, 0)}


def measure_rollouts(device: str, repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each case."""
    table = []
    shared, ordinary = enable_prefix_grouper(model_on(device), self_check=False), model_on(device)
    for name, make in CASES.items():
        rows, prompt = make()
        steps = {
            "stock": stock_step(ordinary, rows, device),
            "prompt": packed_step(shared, rows, prompt, None, device),
            "tree": packed_step(shared, rows, prompt, 1, device),
        }
        if (trl := trl_step(rows, device)) is not None:
            steps["trl"] = trl
        timings = take_turns(steps, repeats=repeats, device=device)
        layouts = [PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=least) for least in (None, 1)]
        total = layouts[0].num_row_tokens
        row = {
            "case": name,
            "rows": len(rows),
            "row_tokens": total,
            "token_ratio_prompt": number(layouts[0].num_tokens / total, 3),
            "token_ratio_tree": number(layouts[1].num_tokens / total, 3),
            "prompt_times_as_fast": number(times_as_fast(timings["prompt"], timings["stock"]), 3),
            "tree_times_as_fast": number(times_as_fast(timings["tree"], timings["stock"]), 3),
        }
        if trl is not None:
            row["trl_times_as_fast"] = number(times_as_fast(timings["trl"], timings["stock"]), 3)
        print(row, flush=True)
        table.append(row)
    return table


def measure_packing(repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each case. Both lay out the same tokens."""
    table = []
    for name, make in PACKING.items():
        rows, prompt = make()
        ours, trls = packing_seconds(rows, prompt, repeats)
        tokens = PrefixLayout.from_rows(rows, shareable=[prompt] * len(rows), min_level=1).num_tokens
        row = {
            "case": name,
            "rows": len(rows),
            "row_tokens": sum(map(len, rows)),
            "tokens": tokens,
            "trl_tokens": len(trl_row(rows).tokens),
            "seconds": number(ours, 3),
            "trl_seconds": number(trls, 3),
        }
        print(row, flush=True)
        table.append(row)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("levels", "rollouts", "packing"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each method")
    parser.add_argument("--backends", nargs="+", default=["merged_lse", "blockwise"], choices=BACKENDS)
    args = parser.parse_args(arguments)
    use(args.device)
    if args.what == "levels":
        table = measure_levels(args.device, args.repeats, args.backends)
        note = "; ".join(f"{name}: least level that pays {least_that_pays(table, name)}" for name in args.backends)
    elif args.what == "packing":
        table = measure_packing(args.repeats)
        note = (
            "CPU seconds, the least of several turns; TRL's tree has each row's last token, which ours does not forward"
        )
    else:
        table = measure_rollouts(args.device, args.repeats)
        note = "times as fast as padded rows of the stock model, forward and backward of the decoder"
    write_csv(RESULTS / f"trees-{args.what}-{args.device}.csv", table, args.device, note)


if __name__ == "__main__":
    main()
