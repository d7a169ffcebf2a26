"""What does sharing change for each recipe of examples/recipes? Seconds of a whole training, tokens, and the weights learned.

    python benchmarks/recipes.py                 # about five minutes on one core

Each recipe is run as it is, by the launcher with the flag and by Python without it, in a process of its own, on tiny models and
data (`examples/recipes/tiny.py`). The two ways take turns. Seconds are process CPU time of `trainer.train()`: sampling, rewards
and the optimizer are part of it, so they fall by less than the tokens.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from harness import RESULTS, in_a_fresh_process, number, read_csv, use, write_csv

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
GRPO = ["--num_generations", "8", "--per_device_train_batch_size", "8", "--max_completion_length", "32"]
LORA = ["--use_peft", "--lora_r", "8", "--lora_dropout", "0", "--lora_target_modules", "q_proj", "v_proj"]
# Its model, its data, and its arguments.
ARGUMENTS = {
    "rerank": ["model", "rerank.jsonl", *GRPO],
    "rag": ["model", "rag.jsonl", *GRPO, "--max_completion_length", "96"],
    "one_example": ["model", "one.jsonl", *GRPO, "--per_device_train_batch_size", "32", "--copies", "64"],
    "tools": ["tools-model", "tools.jsonl", *GRPO],
    "vision_lora": ["vision-model", "vision.jsonl", *GRPO, *LORA],
    "dpo_long": ["model", "pairs.jsonl", "--per_device_train_batch_size", "4", "--max_length", "2048"],
}
COMMON = (
    "--learning_rate 1e-3 --adam_epsilon 1e-6 --dtype float32 --bf16 false --use_cpu --report_to none --save_strategy no "
    "--disable_tqdm true --logging_strategy no --gradient_checkpointing false"
)


def run(name: str, way: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run one recipe in this process; seconds and token ratio. The weights are in ``folder / name-way``."""
    use("cpu")
    from transformers import Trainer

    from prefix_grouper_plugins.integrations.trl import launch

    found: dict[str, Any] = {}
    train = Trainer.train

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = train(self, *args, **kwargs)
        found["seconds"] = time.process_time() - start
        found["token_ratio"] = self.sharing.update.token_ratio if way == "shared" else 1.0
        found["fallbacks"] = sum(self.sharing.fallbacks.values()) if way == "shared" else 0
        return result

    Trainer.train = timed
    model, data, *arguments = ARGUMENTS[name]
    command = [
        str(RECIPES / f"{name}.py"),
        "--model_name_or_path",
        str(folder / model),
        "--data_file",
        str(folder / data),
    ]
    command += ["--output_dir", str(folder / f"{name}-{way}"), "--max_steps", str(steps), *COMMON.split(), *arguments]
    launch.main([*command, *(["--use_prefix_grouper"] if way == "shared" else [])])
    return found


def largest_difference(folder: Path, name: str) -> float:
    """Of a trained weight, shared and stock."""
    from safetensors.torch import load_file

    shared, stock = (load_file(next((folder / f"{name}-{way}").glob("*.safetensors"))) for way in ("shared", "stock"))
    return max(float((shared[key] - stock[key]).abs().max()) for key in stock)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a training")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each recipe and way")
    parser.add_argument("--length", type=int, default=30, help="words of a document, see examples/recipes/tiny.py")
    parser.add_argument("--output", type=Path, default=RESULTS / "recipes-cpu.csv")
    parser.add_argument(
        "--only", nargs="+", choices=ARGUMENTS, help="recipes to run; others keep their lines in the file"
    )
    parser.add_argument("--note", default="", help="is added to the heading of the file")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, way, folder = options.one
        print(json.dumps(run(name, way, Path(folder), options.steps)))
        return
    old = read_csv(options.output) if options.only and options.output.exists() else []
    rows: dict[str, dict[str, Any]] = {row["recipe"]: dict(row) for row in old}
    note = f"{options.steps} steps, float32, models of 3 layers, 128 wide"
    note = "; ".join(filter(None, [note, options.note]))
    command = f"python benchmarks/recipes.py --repeats {options.repeats}"
    with tempfile.TemporaryDirectory() as made:
        runpy.run_path(str(RECIPES / "tiny.py"))["make"](Path(made), size=128, layers=3, length=options.length)
        for name in options.only or ARGUMENTS:
            turns: dict[str, list[dict[str, Any]]] = {"stock": [], "shared": []}
            for _ in range(options.repeats):
                for way, found in turns.items():
                    one = ["recipes.py", "--one", name, way, made, "--steps", str(options.steps)]
                    found.append(in_a_fresh_process(one, {"HF_HUB_OFFLINE": "1"}))
            seconds = {way: median(turn["seconds"] for turn in found) for way, found in turns.items()}
            rows[name] = {
                "recipe": name,
                "token_ratio": number(turns["shared"][0]["token_ratio"], 3),
                "stock_seconds": number(seconds["stock"], 3),
                "shared_seconds": number(seconds["shared"], 3),
                "times_as_fast": number(seconds["stock"] / seconds["shared"], 3),
                "fallbacks": turns["shared"][0]["fallbacks"],
                "largest_difference": f"{largest_difference(Path(made), name):.0e}",
            }
            print(rows[name], flush=True)
            write_csv(options.output, [rows[n] for n in ARGUMENTS if n in rows], "cpu", note, command, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1:])
