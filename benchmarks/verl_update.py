"""What do an update and a log-prob pass of verl cost, by its own engine and by ours?

    python benchmarks/verl_update.py       CPU, one thread, one process, in verl's environment; some minutes

verl's FSDP2 engine and ours run `forward_backward_batch` on the same rows, a small Qwen3 model, in turns: an update with
verl's PPO loss, without the step of the optimizer, and a pass that scores the responses. `rows` are those of a micro-batch. With
`padding` a micro-batch is a padded block of rows (`use_remove_padding=False`), without it one row, laid out by verl as it is.

Half of the cases have nothing to share, each row its own prompt: there ours should take no longer than verl's own.
Seconds are of the process; `token_ratio` is what our engine logs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "verl")]
# verl decides at import which platform it runs on.
os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="verl_on_cpu.platform")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from harness import RESULTS, number, use, write_csv  # noqa: E402
from verl_on_cpu.tiny import make_model, make_tokenizer  # noqa: E402

from prefix_grouper_plugins.bench import take_turns, times_as_fast  # noqa: E402
from tests.integrations.verl.cases import Case, make_batch  # noqa: E402
from tests.integrations.verl.engines import build, loss_function, model_classes_restored  # noqa: E402

LAYERS, WIDTH = 4, 512


class Sizes(NamedTuple):
    """Of a batch: lengths, how many prompts and how many rows for each, and the rows of a micro-batch."""

    prompt: int
    response: int
    prompts: int
    group: int
    rows: int
    padding: bool


SHARED = [Sizes(1024, 64, 1, 8, rows, padding) for rows, padding in ((8, True), (2, True), (1, True), (1, False))]
NOT_SHARED = [
    Sizes(*lengths, 8, 1, rows, padding)
    for lengths in ((1024, 64), (64, 64))
    for rows, padding in ((8, True), (1, True), (1, False))
]


def rows_of(sizes: Sizes) -> list[dict[str, Any]]:
    """As tests.integrations.verl.cases.make_rows makes them, all of one length."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(4, 250, (count,), generator=generator)

    rows = []
    for group in range(sizes.prompts):
        prompt = ids(sizes.prompt)
        for _ in range(sizes.group):
            old = torch.randn(sizes.response, generator=generator) - 5.5
            row = {
                "prompt": prompt,
                "response": ids(sizes.response),
                "mask": torch.ones(sizes.response, dtype=torch.long),
            }
            row |= {
                "old": old,
                "ref": old + 0.1,
                "advantage": old + 5.5,
                "positions": torch.arange(sizes.prompt + sizes.response),
            }
            rows.append({"uid": f"g{group}", **row})
    return rows


def case_of(sizes: Sizes) -> Case:
    return Case(
        dynamic=False,
        micro_batch_size=sizes.rows,
        remove_padding=sizes.padding is False,
        rows_per_group=sizes.group,
        groups=sizes.prompts,
    )


def update(engine: Any, case: Case, rows: list[dict[str, Any]]) -> float:
    """Our token ratio; 1 of verl's own engine, which logs none."""
    with engine.train_mode():
        output = engine.forward_backward_batch(
            make_batch(case, rows, len(rows)), loss_function(case), forward_only=False
        )
        engine.optimizer_zero_grad()
    return float(output["metrics"].get("prefix_grouper/token_ratio", [1.0])[0])


def score(engine: Any, case: Case, rows: list[dict[str, Any]]) -> None:
    from verl.utils import tensordict_utils as tu

    batch = make_batch(case, rows, len(rows))
    tu.assign_non_tensor(batch, distillation_use_topk=False, distillation_only=False)
    with engine.eval_mode():
        engine.forward_backward_batch(batch, None, forward_only=True)


def measure(sizes: Sizes, model: str, repeats: int) -> list[dict[str, Any]]:
    """A row of the table for the update and for the log-prob pass."""
    case, rows = case_of(sizes), rows_of(sizes)
    with model_classes_restored():
        engines = {"stock": build(case, model, shared=False), "ours": build(case, model, shared=True)}
        ratio, found = update(engines["ours"], case, rows), []
        passes: dict[str, Callable[..., Any]] = {"update": update, "log-probs": score}
        for name, run in passes.items():
            steps = {way: functools.partial(run, engine, case, rows) for way, engine in engines.items()}
            timings = take_turns(steps, repeats=repeats)
            seconds = {f"{way}_seconds": number(median(t.cpu for t in times)) for way, times in timings.items()}
            faster = number(times_as_fast(timings["ours"], timings["stock"]), 3)
            row = sizes._asdict() | {"pass": name, "token_ratio": number(ratio, 3), **seconds, "times_as_fast": faster}
            print(row, flush=True)
            found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: 7)")
    parser.add_argument("--output", type=Path, default=RESULTS / "verl-update-cpu.csv")
    args = parser.parse_args(arguments)
    use("cpu")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        make_model("qwen3", tokenizer, False, LAYERS, WIDTH, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        table = [row for sizes in SHARED + NOT_SHARED for row in measure(sizes, folder, args.repeats)]
        dist.destroy_process_group()
    write_csv(
        args.output,
        table,
        "cpu",
        "seconds of the process, median of the turns; times_as_fast: against verl's own engine",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
