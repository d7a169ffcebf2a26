"""Train a tiny model by GRPO twice, with the prompt of a group shared and without, and compare.

Both runs use the same unmodified TRL script, seed and data: LoRA, prompts of about 1,000 tokens, 8 completions each.

    prefix-grouper trl examples/trl/grpo_passages.py ... --use_prefix_grouper
    python examples/trl/grpo_passages.py ...

They take turns, one optimizer step of each at a time, so that a machine that is busy for a while slows both. It takes two to
five minutes on two CPU cores and needs no download. The table is printed; demo.png, demo.csv and the
logs of both runs are in the output folder. The exit code is 0 if all went as it should: the reward rose, prompts were
shared, and both runs ended with the same weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from safetensors.torch import load_file
from tqdm import tqdm

from prefix_grouper_plugins.bench import describe_machine

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "report"))
import comparison  # noqa: E402

SCRIPT = HERE / "grpo_passages.py"
LAUNCHER = "prefix_grouper_plugins.integrations.trl.launch"
RUNS = comparison.RUNS
GROUP_SIZE = 8
TOLERANCE = 1e-3  # of a weight, after all steps, in float32
SMALLEST_RISE = 0.1  # of the reward, judged in runs of at least LEAST_STEPS steps
LEAST_STEPS = 16
CSV_COLUMNS = ("reward", "update_seconds", "step_seconds", "generate_seconds", "tokens", "grad_norm", "kl")


class DemoError(Exception):
    """What went wrong, in words for the person at the terminal."""


@dataclass
class Run:
    """What `measure.py` wrote down about one run."""

    steps: list[dict] = field(default_factory=list)
    setup_seconds: float = 0.0
    peak_mib: float = 0.0

    def per_step(self, name: str) -> float:
        """Mean of a figure over the steps."""
        return mean(step[name] for step in self.steps)

    def typical(self, name: str) -> float:
        """Median of a figure over the steps."""
        return median(step[name] for step in self.steps)

    def rewards(self) -> dict[int, float]:
        """Reward by step, for the steps that sampled; every batch of completions is used for two steps."""
        return {step["step"]: step["reward"] for step in self.steps if "reward" in step}

    def logged(self, name: str) -> float | None:
        """Mean of a number of prefix grouper's, None where it was not logged."""
        values = [step[f"prefix_grouper/{name}"] for step in self.steps if f"prefix_grouper/{name}" in step]
        return mean(values) if values else None


def parse_arguments() -> argparse.Namespace:
    """The command line, with the folders filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the model, the logs and the results (default: demo)")
    parser.add_argument(
        "--quick", action="store_true", help="short prompts, 4 steps, to see that it works: half a minute"
    )
    args = parser.parse_args()
    args.steps = args.steps or (4 if args.quick else 24)
    args.output = args.output or Path("demo/quick" if args.quick else "demo")
    args.model = args.output / ("model-quick" if args.quick else "model")
    return args


def training_arguments(args: argparse.Namespace, name: str) -> list[str]:
    """Arguments of the TRL script, the same for both runs but for the folder."""
    settings = {
        "model_name_or_path": args.model,
        "output_dir": args.output / name,
        "seed": args.seed,
        "passage_tokens": 250 if args.quick else 1000,
        "max_completion_length": 32 if args.quick else 64,
        "num_generations": GROUP_SIZE,
        "per_device_train_batch_size": GROUP_SIZE,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,  # every batch of completions is used twice, so old-policy log-probs are needed
        "beta": 0.001,  # and reference log-probs, with the adapter switched off
        "max_steps": args.steps,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-6,  # at 1e-8 rounding alone can move a weight whose gradient is nearly zero by 1e-3
        "use_peft": True,
        "lora_r": 16,
        "lora_dropout": 0,
        "lora_target_modules": "all-linear",
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def environment() -> dict[str, str]:
    """The environment of the child processes: all cores, no network, no switches left over from the shell."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kept = {key: value for key, value in os.environ.items() if "PREFIX_GROUPER" not in key}
    ours = {"OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {"OMP_WAIT_POLICY": "PASSIVE"} | kept | ours  # passive: half the time where other programs are busy


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a Python process whose output goes to a file."""
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(),
        )


def check_exit(process: subprocess.Popen, log: Path) -> None:
    """Raise with the end of the log when the process failed."""
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise DemoError(f"{tail}\n\nThe process stopped with exit code {process.returncode}; all of its output: {log}")


def make_model(args: argparse.Namespace) -> None:
    """Make the model in the output folder unless an up-to-date one is there."""
    maker, folder = HERE / "make_tiny_model.py", args.model
    weights = folder / "model.safetensors"
    if weights.exists() and weights.stat().st_mtime > maker.stat().st_mtime:
        return
    print(f"Making a tiny model in {folder}, once, about {10 if args.quick else 25} seconds")
    unfinished, log = args.output / "model.unfinished", args.output / "model.log"
    process = start([str(maker), str(unfinished), "--warm-up-steps", "20" if args.quick else "120"], log)
    wait_for(process)
    check_exit(process, log)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def wait_for(*processes: subprocess.Popen, look: Callable[[], None] = lambda: None) -> None:
    """Wait for the processes and call `look` a few times a second; when one fails, or on Ctrl-C, stop the others too."""
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            look()
            time.sleep(0.2)
        look()
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()


class Training:
    """One of the two trainings: its process, and what `measure.py` has written so far.

    Args:
        args: the command line.
        name: one of `RUNS`.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.run, self.position = Run(), 0
        self.file, self.log = args.output / f"{name}.jsonl", args.output / f"{name}.log"
        shutil.rmtree(args.output / name, ignore_errors=True)
        self.file.write_text("")
        script = [str(SCRIPT), *training_arguments(args, name)]
        target = ["-m", LAUNCHER, *script, "--use_prefix_grouper"] if name == RUNS[0] else script
        turns = ["--before" if name == RUNS[0] else "--after", str(args.output / f"{RUNS[name == RUNS[0]]}.jsonl")]
        self.command = [str(HERE / "measure.py"), str(self.file), *turns, "--", *target]

    def start(self) -> subprocess.Popen:
        self.process = start(self.command, self.log)
        return self.process

    def look(self, bar: tqdm) -> None:
        """Read the lines that are new, and move the bar along."""
        text = self.file.read_text(encoding="utf-8")
        complete = text.rfind("\n") + 1
        for record in map(json.loads, text[self.position : complete].splitlines()):
            if "step" in record:
                self.run.steps.append(record)
                bar.update()
                bar.set_postfix_str(f"reward {list(self.run.rewards().values())[-1]:.2f}")
            elif "ready" in record:
                self.run.setup_seconds = record["setup_seconds"]
            else:
                self.run.peak_mib = record["peak_mib"]
        self.position = complete


def train(args: argparse.Namespace, bar: tqdm) -> dict[str, Run]:
    """Run the TRL script with the flag (`shared`) and without (`stock`), in turns."""
    trainings = {name: Training(args, name) for name in RUNS}

    def look() -> None:
        for training in trainings.values():
            training.look(bar)

    wait_for(*[training.start() for training in trainings.values()], look=look)
    # The one that failed by itself first: the other was stopped for its sake.
    for training in sorted(trainings.values(), key=lambda training: training.process.returncode < 0):
        check_exit(training.process, training.log)
    return {name: training.run for name, training in trainings.items()}


def largest_difference(args: argparse.Namespace) -> float:
    """Largest absolute difference between the adapters that the two runs saved."""
    shared, stock = (load_file(args.output / name / "adapter_model.safetensors") for name in RUNS)
    return max((shared[key] - stock[key]).abs().max().item() for key in stock)


def spread(shared: Run, stock: Run, name: str) -> tuple[float, float]:
    """Smallest and largest ratio of two steps that ran one after the other."""
    ratios = [theirs[name] / ours[name] for ours, theirs in zip(shared.steps, stock.steps, strict=True)]
    return min(ratios), max(ratios)


def print_table(shared: Run, stock: Run, difference: float) -> None:
    """Print the comparison."""

    def row(label: str, a: float | None, b: float | None, form: str, ratio: bool = True) -> None:
        cells = [format(value, form) if value is not None else "-" for value in (a, b)]
        last = f"{b / a:.2f}" if ratio and a and b else ""
        print(f"{label:46}{cells[0]:>11}{cells[1]:>11}{last:>16}".rstrip())

    (first, last), (stock_first, stock_last) = (
        comparison.first_and_last(list(run.rewards().values())) for run in (shared, stock)
    )
    print(f"\n{'':46}{'shared':>11}{'stock':>11}{'stock / shared':>16}")
    row("Reward, first batches", first, stock_first, ".3f", ratio=False)
    row("Reward, last batches", last, stock_last, ".3f", ratio=False)
    row("Tokens forwarded for an update, with padding", shared.per_step("tokens"), stock.per_step("tokens"), ",.0f")
    for label, name, figure in (
        ("Seconds for an update (forward and backward)", "update_seconds", Run.typical),
        ("Seconds for a whole step, sampling included", "step_seconds", Run.per_step),
    ):
        row(label, figure(shared, name), figure(stock, name), ".2f")
        low, high = spread(shared, stock, name)
        print(f"{'  from step to step':46}{'':>22}{f'{low:.2f} to {high:.2f}':>16}")
    row("Seconds for sampling", shared.per_step("generate_seconds"), stock.per_step("generate_seconds"), ".2f")
    row("Seconds of set-up (model, data, trainer)", shared.setup_seconds, stock.setup_seconds, ".0f", ratio=False)
    row("Peak memory of the process, MiB", shared.peak_mib, stock.peak_mib, ",.0f")
    row("Logged: token_ratio", shared.logged("token_ratio"), None, ".3f")
    row("Logged: rows_per_group", shared.logged("rows_per_group"), None, ".2f")
    row("Logged: fallbacks", shared.logged("fallbacks"), None, ".2f")
    print(f"{'Largest difference of a trained weight':46}{difference:>11.1e}")


def write_results(args: argparse.Namespace, runs: dict[str, Run], difference: float) -> None:
    """Write the figures of every step, both runs side by side, and draw them; the reward is that of the steps that sampled."""
    whole = {
        f"{name}_{key}": f"{getattr(run, key):.0f}"
        for name, run in runs.items()
        for key in ("peak_mib", "setup_seconds")
    }
    facts = {
        "command": " ".join(["python", *sys.argv]),
        **describe_machine(),
        **whole,
        "difference": f"{difference:.1e}",
        "note": "the two trainings take turns, update by update; seconds are wall time",
    }
    steps = {name: run.steps for name, run in runs.items()}
    rows = comparison.side_by_side(steps, {name: name for name in CSV_COLUMNS})
    comparison.write(args.output / "demo.csv", facts, rows)
    found = comparison.read(args.output / "demo.csv")
    comparison.draw(args.output / "demo.png", found, ["update_seconds"], "update", "an update")


def problems(runs: dict[str, Run], difference: float) -> list[str]:
    """What did not go as it should, in plain words."""
    found = []
    shared, stock = runs["shared"], runs["stock"]
    if len(shared.steps) >= LEAST_STEPS:
        for name, run in runs.items():
            first, last = comparison.first_and_last(list(run.rewards().values()))
            if last - first < SMALLEST_RISE:
                found.append(
                    f"the reward of the {name} run did not rise: {first:.3f} at the start, {last:.3f} at the end"
                )
    if (shared.logged("rows_per_group") or 1) <= 1 or shared.logged("fallbacks") or shared.logged("fallbacks") is None:
        found.append("the shared run did not share every prompt; its log says why")
    if difference > TOLERANCE:
        rewards = stock.rewards()
        apart = [step for step, reward in shared.rewards().items() if reward != rewards.get(step)]
        hint = f"; from update {apart[0]} on they sampled different completions" if apart else ""
        found.append(f"the weights of the two runs differ by up to {difference:.1e}, more than {TOLERANCE:.0e}{hint}")
    return found


def main() -> None:
    """Make the model, train twice, compare."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        make_model(args)
        with tqdm(total=2 * args.steps, unit="update", mininterval=0.5) as bar:
            runs = train(args, bar)
    except DemoError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped.") from None
    difference = largest_difference(args)
    print_table(runs["shared"], runs["stock"], difference)
    write_results(args, runs, difference)
    print(f"\nPicture: {args.output / 'demo.png'}   figures of every update: {args.output / 'demo.csv'}")
    if args.steps < LEAST_STEPS:
        print(f"With fewer than {LEAST_STEPS} steps the reward is not judged.")
    found = problems(runs, difference)
    if found:
        raise SystemExit("".join(f"\nNot as it should be: {problem}" for problem in found))


if __name__ == "__main__":
    main()
