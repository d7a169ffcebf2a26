"""Train a tiny model with verl twice, with the prompt of a group shared and without, and compare.

Both runs are `python -m verl.trainer.main_ppo` with the same options, seed and data: GRPO with a KL loss on two workers
(FSDP2), prompts of 400 to 600 tokens, 8 responses each, dynamic batch sizes. They differ in one option:

    shared    model_engine=prefix_grouper
    stock     verl's own engine

They take turns, one step of each at a time, so that a machine that is busy for a while slows both. It takes two to
five minutes on two CPU cores, the start of Ray and verl included, and needs no download. The table is printed; demo.png,
demo.csv and a folder for each run with its log are in the output folder. The exit code is 0 if all went as it should: the
reward rose, prompts were shared, and both runs ended with the same weights.
"""

import argparse
import importlib.util
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm
from verl_on_cpu.run import Step, TrainingError, final_weights, run_training
from verl_on_cpu.tiny import make_inputs
from verl_on_cpu.turns import Turns

from prefix_grouper_plugins.bench import describe_machine

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
import comparison

RUNS = {"shared": ["model_engine=prefix_grouper"], "stock": []}
GROUP_SIZE = 8
PROMPTS, QUICK_PROMPTS = 8, 4  # in a step
TOLERANCE = 1e-3  # of a weight, after all steps, in float32
SMALLEST_RISE = 0.3  # of the reward, judged in runs of at least LEAST_STEPS steps
LEAST_STEPS = 8
BAR = "{bar:30} {n_fmt} of {total_fmt} steps, {elapsed}{postfix}"
PASSES = {  # verl's name of a pass: what the reader calls it
    "update_actor": "Seconds for the update (forward and backward)",
    "old_log_prob": "Seconds for the old policy's log-probs",
    "ref": "Seconds for the reference's log-probs",
}
# Not counted to a step: in the first a training waits for the other one.
OUTSIDE = ("update_weights", "save_checkpoint")
SHARING = ("token_ratio", "rows_per_group", "fallbacks")
CSV_COLUMNS = {
    "reward": "critic/rewards/mean",
    **{f"{name}_seconds": f"timing_s/{name}" for name in PASSES},
    "step_seconds": "step_seconds",
    "tokens": "perf/total_num_tokens",
    "token_ratio": "prefix_grouper/token_ratio",
    "grad_norm": "actor/grad_norm",
    "kl": "actor/kl_loss",
}


@dataclass
class Run:
    """What verl logged in one run, and how long it took until the training began."""

    steps: list[Step] = field(default_factory=list)
    setup_seconds: float = 0.0

    def values(self, name: str) -> list[float]:
        """A figure of each step that has it."""
        return [step[name] for step in self.steps if name in step]

    def rewards(self) -> list[float]:
        return self.values("critic/rewards/mean")

    def add(self, step: Step) -> None:
        """Take in a step, with the seconds of the passes that can share prompts, and of all but waiting and saving."""
        step["pass_seconds"] = sum(step[f"timing_s/{name}"] for name in PASSES)
        step["step_seconds"] = step["timing_s/step"] - sum(step.get(f"timing_s/{name}", 0.0) for name in OUTSIDE)
        self.steps.append(step)

    def sharing(self, name: str) -> float | None:
        """Mean of a number of prefix grouper's, None where it was not logged."""
        values = self.values(f"prefix_grouper/{name}")
        return mean(values) if values else None


def parse_arguments() -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps of each run (default: 10)")
    parser.add_argument("--output", type=Path, help="folder for inputs, logs and results (default: demo/verl)")
    parser.add_argument("--quick", action="store_true", help="2 steps of half as many rows, to see that it works")
    parser.add_argument("--recipe", action="store_true", help="4 steps with the options of verl's run_qwen3_4b_fsdp.sh")
    args = parser.parse_args()
    args.steps = args.steps or (2 if args.quick else 4 if args.recipe else 10)
    args.prompts = QUICK_PROMPTS if args.quick else PROMPTS
    folder = "verl-quick" if args.quick else "verl-recipe" if args.recipe else "verl"
    args.output = args.output or Path("demo") / folder
    return args


def demo_options(prompts: int) -> list[str]:
    """Options of verl that both runs have, besides those that a CPU needs."""
    return [
        f"data.train_batch_size={prompts}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"actor_rollout_ref.rollout.n={GROUP_SIZE}",
        "data.max_prompt_length=600",
        "data.max_response_length=32",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        # Two rows of the stock run fit into a micro-batch; with more it is slower, as torch's attention on a CPU spends
        # time on the pairs of tokens from different rows.
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1280",
    ]


def recipe_options(prompts: int) -> list[str]:
    """What verl's examples/grpo_trainer/run_qwen3_4b_fsdp.sh sets, without its vLLM, and with smaller batches and lengths."""
    return [
        f"data.train_batch_size={prompts}",
        # Half of the batch there. With more than one optimizer step verl's trainer deals rows to the steps in the order in
        # which responses arrive, so that no two runs learn the same.
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        "actor_rollout_ref.rollout.n=5",
        "data.max_prompt_length=600",
        "data.max_response_length=32",
        "data.filter_overlong_prompts=True",
        "data.truncation=error",
        "algorithm.use_kl_in_reward=False",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.actor.optim.lr=1e-3",  # of which a few steps make weights that can be compared; 1e-6 there
        "actor_rollout_ref.actor.kl_loss_coef=0.001",
        "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
        "actor_rollout_ref.actor.entropy_coeff=0",
        "actor_rollout_ref.actor.fsdp_config.param_offload=False",
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=3000",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=4096",
        "actor_rollout_ref.ref.fsdp_config.param_offload=True",
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8192",
        "trainer.critic_warmup=0",
    ]


def train(args: argparse.Namespace, bar: tqdm) -> dict[str, Run]:
    """Run both trainings, in turns. Where one of them fails, the other ends too."""
    turns = args.output / "turns"
    shutil.rmtree(turns, ignore_errors=True)
    turns.mkdir(parents=True)
    stop = threading.Event()
    bar.set_postfix_str("Ray and verl start, most of a minute")
    with ThreadPoolExecutor(len(RUNS)) as pool:
        trainings = {name: pool.submit(train_one, args, name, turns, bar, stop) for name in RUNS}
        try:
            for training in as_completed(trainings.values()):
                training.result()
        finally:
            stop.set()
    return {name: training.result() for name, training in trainings.items()}


def train_one(args: argparse.Namespace, name: str, folder: Path, bar: tqdm, stop: threading.Event) -> Run:
    """Run one of the trainings, a step whenever it is its turn, and move the bar along."""
    run, started = Run(), time.time()
    (other,) = RUNS.keys() - {name}
    turns = Turns(str(folder.resolve()), name, other, is_first=name == next(iter(RUNS)), steps=args.steps)

    def on_step(step: Step) -> None:
        run.add(step)
        bar.update()
        bar.set_postfix_str(f"reward {step['critic/rewards/mean']:.2f}")

    run_training(
        args.output / name,
        (recipe_options if args.recipe else demo_options)(args.prompts) + RUNS[name],
        turns.environment,
        inputs=args.output / "inputs",
        workers=2,
        steps=args.steps,
        on_step=on_step,
        stop=stop,
    )
    run.setup_seconds = turns.mark(name, 0).stat().st_mtime - started
    return run


def largest_difference(args: argparse.Namespace) -> float:
    """Largest absolute difference between the weights that the two runs ended with."""
    shared, stock = (final_weights(args.output / name) for name in RUNS)
    return max((shared[key] - stock[key]).abs().max().item() for key in stock)


def print_table(shared: Run, stock: Run, difference: float) -> None:
    """Print the comparison."""

    def row(label: str, a: float | None, b: float | None, form: str, ratio: bool = True) -> None:
        cells = [format(value, form) if value is not None else "-" for value in (a, b)]
        last = f"{b / a:.2f}" if ratio and a and b else ""
        print(f"{label:52}{cells[0]:>11}{cells[1]:>11}{last:>16}".rstrip())

    print(f"\n{'':52}{'shared':>11}{'stock':>11}{'stock / shared':>16}")
    row("Reward, first step", shared.rewards()[0], stock.rewards()[0], ".3f", ratio=False)
    row("Reward, last step", shared.rewards()[-1], stock.rewards()[-1], ".3f", ratio=False)
    for name, label in PASSES.items():
        row(label, *(median(run.values(f"timing_s/{name}")) for run in (shared, stock)), ".2f")
    for label, name in (
        ("Seconds for the three passes", "pass_seconds"),
        ("Seconds for a whole step, sampling included", "step_seconds"),
    ):
        row(label, *(median(run.values(name)) for run in (shared, stock)), ".2f")
        ratios = [b / a for a, b in zip(shared.values(name), stock.values(name), strict=True)]
        print(f"{'  from step to step':52}{'':>22}{f'{min(ratios):.2f} to {max(ratios):.2f}':>16}")
    row(
        "Seconds of set-up (Ray, verl, model), side by side",
        shared.setup_seconds,
        stock.setup_seconds,
        ".0f",
        ratio=False,
    )
    for name in SHARING:
        row(f"Logged: prefix_grouper/{name}", shared.sharing(name), stock.sharing(name), ".3f", ratio=False)
    name = "training/rollout_probs_diff_max"
    row(f"Logged: {name}, largest", *(max(run.values(name)) for run in (shared, stock)), ".0e", ratio=False)
    print(f"{'Largest difference of a trained weight':52}{difference:>11.1e}")
    print("Seconds are those of the median step.")


def write_results(args: argparse.Namespace, runs: dict[str, Run], difference: float) -> None:
    """Write the figures of every step, both runs side by side, and draw them."""
    whole = {f"{name}_setup_seconds": f"{run.setup_seconds:.0f}" for name, run in runs.items()}
    facts = {
        "command": " ".join(["python", *sys.argv]),
        **describe_machine(),
        **whole,
        "difference": f"{difference:.1e}",
        "note": "the two trainings take turns, step by step; seconds are wall time",
    }
    rows = comparison.side_by_side({name: run.steps for name, run in runs.items()}, CSV_COLUMNS)
    comparison.write(args.output / "demo.csv", facts, rows)
    found = comparison.read(args.output / "demo.csv")
    columns = [f"{name}_seconds" for name in PASSES]
    comparison.draw(args.output / "demo.png", found, columns, "step", "old, reference and policy passes")


def problems(runs: dict[str, Run], difference: float) -> list[str]:
    """What did not go as it should, in plain words."""
    found = []
    shared, stock = runs["shared"], runs["stock"]
    for name, run in runs.items():
        first, last = run.rewards()[0], run.rewards()[-1]
        if len(run.steps) >= LEAST_STEPS and last - first < SMALLEST_RISE:
            found.append(f"the reward of the {name} run did not rise: {first:.3f} at the start, {last:.3f} at the end")
    if (shared.sharing("rows_per_group") or 1) <= 1 or shared.sharing("fallbacks") != 0:
        found.append("the shared run did not share every prompt; its log says why")
    if difference > TOLERANCE:
        pairs = zip(shared.rewards(), stock.rewards(), strict=True)
        apart = [step for step, (a, b) in enumerate(pairs, start=1) if abs(a - b) > 1e-6]
        hint = f"; from step {apart[0]} on they sampled different responses" if apart else ""
        found.append(f"the weights of the two runs differ by up to {difference:.1e}, more than {TOLERANCE:.0e}{hint}")
    return found


def main() -> None:
    """Make model and data, run both trainings, compare."""
    args = parse_arguments()
    if importlib.util.find_spec("verl") is None:
        raise SystemExit("verl is not installed in this Python environment: `make demo-verl` sets one up.")
    make_inputs(args.output / "inputs", prompts=args.prompts * args.steps)
    try:
        with tqdm(total=len(RUNS) * args.steps, bar_format=BAR) as bar:
            runs = train(args, bar)
    except TrainingError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped.") from None
    difference = largest_difference(args)
    print_table(runs["shared"], runs["stock"], difference)
    write_results(args, runs, difference)
    print(f"\nPicture: {args.output / 'demo.png'}   figures of every step: {args.output / 'demo.csv'}")
    if args.steps < LEAST_STEPS:
        print(f"With fewer than {LEAST_STEPS} steps the reward is not judged.")
    found = problems(runs, difference)
    if found:
        raise SystemExit("".join(f"\nNot as it should be: {problem}" for problem in found))


if __name__ == "__main__":
    main()
