"""Does a training with sharing learn what the stock one learns? Reward and KL curves of whole GRPO trainings with TRL.

    python benchmarks/learning.py             two tasks, three seeds, 200 steps, float32 and bfloat16: 36 trainings

Rounding differs between the two paths. Sooner or later it changes a sampled token, and from there on two trainings see other
completions; so single weights cannot be compared over hundreds of steps, and curves are. The yardstick is the distance
between two stock trainings that differ in the order of their prompts alone. Rewards are rules, models are tiny and begin
with random weights. The tasks are `copy` (words of the prompt are worth a point) and `count` (each word is to be the one
that follows the word before it).

The file is written after each training, and trainings that it holds already are not repeated. Exits with 1 if the rewards with
sharing are farther from those of stock than the yardstick and a quarter, in any task and dtype.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from harness import IMAGES, RESULTS, number, read_csv, use, write_csv
from plot import finish, new_figure
from training import tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperGRPOTrainer

FIRST, COUNT = 3, 12  # ids of the words: three special tokens stand before them
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(COUNT))]
RESPONSE, GROUP, EVERY = 8, 8, 5  # tokens, rows, steps that one point of a curve is the mean of
RUNS = ("stock", "shared", "stock, other order")
COLOURS = {"stock": "#f4b183", "shared": "#17375e", "stock, other order": "#8aa1bf"}
LAST = 50  # steps whose mean is the final reward
MARGIN = 1.25  # a few seeds leave something to chance
Row = dict[str, Any]

# --------------------------------------------------------------------------------------------------------------- tasks


def copy(prompt: list[int], ids: list[int]) -> float:
    """The share of the places of a completion that hold a word of the prompt."""
    return sum(i in prompt for i in ids if i >= FIRST) / RESPONSE


def count(prompt: list[int], ids: list[int]) -> float:
    """The share of the places of a completion that hold the word which follows the one before."""
    pairs = itertools.pairwise([prompt[-1], *ids])
    return sum(b >= FIRST and b - FIRST == (a - FIRST + 1) % COUNT for a, b in pairs) / RESPONSE


TASKS: dict[str, Callable[[list[int], list[int]], float]] = {"copy": copy, "count": count}


def prompts(seed: int) -> list[dict[str, str]]:
    """Prompts of 12 words, of which three are different."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(512):
        words = torch.randperm(COUNT, generator=generator)[:3]
        chosen = words[torch.randint(0, 3, (12,), generator=generator)].tolist()
        rows.append({"prompt": " ".join(f"w{i}" for i in chosen)})
    return rows


def reward_of(task: str) -> Callable[..., list[float]]:
    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        ids = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
        return [TASKS[task](prompt, completion) for prompt, completion in zip(ids, completion_ids, strict=True)]

    return reward


# ----------------------------------------------------------------------------------------------------------- trainings


def save_model(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def train(task: str, dtype: str, seed: int, run: str, steps: int) -> list[Row]:
    """One training; a row for each point of its curves."""
    shared = run == "shared"
    config: Any = PrefixGrouperGRPOConfig if shared else GRPOConfig
    trainer: Any = PrefixGrouperGRPOTrainer if shared else GRPOTrainer
    data = Dataset.from_list(prompts(seed))
    if run == "stock, other order":
        data = data.shuffle(seed=seed + 100)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, seed)
        built = trainer(
            model=folder,  # from which TRL loads the reference as well
            reward_funcs=reward_of(task),
            args=config(
                output_dir=f"{folder}/run",
                max_completion_length=RESPONSE,
                max_steps=steps,
                num_generations=GROUP,
                per_device_train_batch_size=2 * GROUP,
                beta=0.02,
                learning_rate=3e-3,
                lr_scheduler_type="constant",
                bf16=dtype == "bfloat16",
                use_cpu=True,
                logging_steps=EVERY,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=data,
            processing_class=tokenizer(WORDS),
        )
        torch.manual_seed(seed)
        built.train()
    head = {"task": task, "dtype": dtype, "seed": seed, "run": run}
    return [
        {**head, "step": log["step"], "reward": number(log["reward"]), "kl": number(log["kl"])}
        for log in built.state.log_history
        if "reward" in log
    ]


# ------------------------------------------------------------------------------------------------- curves and distances


def curve(rows: Sequence[Row], what: str, **which: Any) -> list[float]:
    """``reward`` or ``kl`` by step, of one training."""
    return [float(row[what]) for row in rows if all(str(row[name]) == str(value) for name, value in which.items())]


def cases(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The pairs of a task and a dtype that were trained."""
    return list(dict.fromkeys((row["task"], row["dtype"]) for row in rows))


def seeds(rows: Sequence[Row], task: str, dtype: str) -> list[Any]:
    """Those that all runs of a task and dtype are there for."""
    own = [row for row in rows if (row["task"], row["dtype"]) == (task, dtype)]
    found = {run: {row["seed"]: None for row in own if row["run"] == run} for run in RUNS}
    return [seed for seed in found[RUNS[0]] if all(seed in others for others in found.values())]


def distance(rows: Sequence[Row], what: str, run: str, task: str, dtype: str) -> float:
    """Mean over steps and seeds of the absolute difference between ``run`` and the stock training of the same seed."""
    apart = []
    for seed in seeds(rows, task, dtype):
        mine, stock = (curve(rows, what, task=task, dtype=dtype, seed=seed, run=name) for name in (run, "stock"))
        apart += [abs(a - b) for a, b in zip(mine, stock, strict=True)]
    return mean(apart)


def final(rows: Sequence[Row], run: str, task: str, dtype: str) -> float:
    """Mean reward of the last steps, over all seeds."""
    points = LAST // EVERY
    return mean(
        value
        for seed in seeds(rows, task, dtype)
        for value in curve(rows, "reward", task=task, dtype=dtype, seed=seed, run=run)[-points:]
    )


def table(rows: Sequence[Row]) -> str:
    """One line for each task and dtype."""
    lines = [
        "| Task | dtype | Seeds | First reward | Final reward: stock / shared / other order | Reward apart: shared / other order | "
        "KL apart: shared / other order |",
        "|---" * 7 + "|",
    ]
    for task, dtype in cases(rows):
        first = mean(
            curve(rows, "reward", task=task, dtype=dtype, seed=s, run="stock")[0] for s in seeds(rows, task, dtype)
        )
        finals = " / ".join(f"{final(rows, run, task, dtype):.3f}" for run in RUNS)
        apart = [
            " / ".join(f"{distance(rows, what, run, task, dtype):.4f}" for run in RUNS[1:]) for what in ("reward", "kl")
        ]
        lines.append(
            f"| {task} | {dtype} | {len(seeds(rows, task, dtype))} | {first:.3f} | {finals} | {apart[0]} | {apart[1]} |"
        )
    return "\n".join(lines)


def as_near(rows: Sequence[Row], task: str, dtype: str) -> bool:
    """Whether rewards with sharing are about as near to those of stock as another order of the prompts leaves them."""
    return distance(rows, "reward", "shared", task, dtype) <= MARGIN * distance(rows, "reward", RUNS[2], task, dtype)


def draw(rows: Sequence[Row], path: Path) -> None:
    """For each task and dtype: reward, KL, and how far the reward is from that of the stock training of the same seed."""
    places = cases(rows)
    figure, axes = new_figure(len(places), 3, 3.6, 2.4)
    for column, (task, dtype) in zip(axes.T, places, strict=True):
        for run, what in itertools.product(RUNS, ("reward", "kl")):
            own = [curve(rows, what, task=task, dtype=dtype, seed=seed, run=run) for seed in seeds(rows, task, dtype)]
            steps = [EVERY * (i + 1) for i in range(len(own[0]))]
            ax = column[0 if what == "reward" else 1]
            for values in own:
                ax.plot(steps, values, color=COLOURS[run], linewidth=0.6, alpha=0.5)
            ax.plot(steps, [mean(v) for v in zip(*own, strict=True)], color=COLOURS[run], linewidth=2, label=run)
            if what == "reward" and run != "stock":
                stock = [
                    curve(rows, what, task=task, dtype=dtype, seed=seed, run="stock")
                    for seed in seeds(rows, task, dtype)
                ]
                for mine, other in zip(own, stock, strict=True):
                    apart = [a - b for a, b in zip(mine, other, strict=True)]
                    column[2].plot(steps, apart, color=COLOURS[run], linewidth=1)
        finish(column[0], title=f"{task}, {dtype}", ylim=(0, 1))
        finish(column[1])
        finish(column[2], xlabel="optimizer step")
    for ax, label in zip(axes[:, 0], ("reward", "KL", "reward - stock's"), strict=True):
        ax.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=RESULTS / "learning-cpu.csv")
    parser.add_argument("--picture", type=Path, default=IMAGES / "learning-cpu.png")
    given = parser.parse_args(arguments)
    use("cpu")
    rows: list[Row] = list(read_csv(given.output)) if given.output.exists() else []
    done = {(row["task"], row["dtype"], str(row["seed"]), row["run"]) for row in rows}
    for seed, task, dtype, run in itertools.product(range(given.seeds), given.tasks, given.dtypes, RUNS):
        if (task, dtype, str(seed), run) in done:
            continue
        rows += train(task, dtype, seed, run, given.steps)
        print(f"{task}, {dtype}, seed {seed}, {run}: reward {rows[-1]['reward']}, KL {rows[-1]['kl']}", flush=True)
        write_csv(given.output, rows, "cpu", f"means over {EVERY} steps", quiet=True)
    print(table(rows))
    draw(rows, given.picture)
    print(f"wrote {given.output} and {given.picture}")
    near = [as_near(rows, task, dtype) for task, dtype in cases(rows)]
    print(f"as near to stock as another order of prompts: {sum(near)} of {len(near)}")
    return int(not all(near))


if __name__ == "__main__":
    sys.exit(main())
