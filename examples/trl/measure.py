"""Run a TRL script and write down what every optimizer step cost, without a change to the script.

    python examples/trl/measure.py steps.jsonl -- my_script.py --its arguments
    python examples/trl/measure.py steps.jsonl -- -m prefix_grouper_plugins.integrations.trl.launch my_script.py ...
    python examples/trl/measure.py steps.jsonl --after other.jsonl -- my_script.py ...    (or --before other.jsonl)

Timers are put around methods of TRL's `GRPOTrainer` before the script starts, and the model's input embedding counts the
tokens that pass through it. `steps.jsonl` gets one line for each optimizer step, as soon as it is logged:

    step_seconds       the whole optimizer step
    update_seconds     forward passes for old-policy and reference log-probs, forward and backward of the loss
    generate_seconds   sampling, `reward_seconds` scoring
    tokens             tokens that the model read outside of sampling, padding included

along with the numbers that the trainer logs itself. Set `--logging_steps 1`. The first line says how long it took until the
training began, the last line holds the totals.

With `--before` or `--after` two trainings run in turns, one optimizer step of each at a time, so that a machine that is busy
for a while slows both. They wait for each other by their files; the time of waiting is not counted.
"""

import json
import resource
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Trainer
from trl import GRPOTrainer

POLL_SECONDS = 0.02


class Turns:
    """Whose turn it is among two trainings, by the lines of the other one's file.

    Args:
        other: its file, None where there is no other training.
        is_first: whether this training makes the first step of each pair.
    """

    def __init__(self, other: Path | None, is_first: bool) -> None:
        self.other, self.is_first = other, is_first

    def wait(self, steps: int) -> None:
        """Return when this training, which has made so many steps, may make another one."""
        while self.other is not None and not self.has_come(steps):
            time.sleep(POLL_SECONDS)

    def has_come(self, steps: int) -> bool:
        lines = self.other.read_text(encoding="utf-8").splitlines() if self.other.exists() else []
        if any(line.startswith('{"done"') for line in lines):
            return True
        made = sum(line.startswith('{"step"') for line in lines)
        return bool(lines) and made >= steps + (0 if self.is_first else 1)


class Meter:
    """Seconds and tokens since the last line, and the file that the lines go to."""

    def __init__(self, path: Path, turns: Turns) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.turns = turns
        self.counts: Counter[str] = Counter()
        self.generating = False
        self.steps = 0
        self.step_started: float | None = None
        self.started = time.perf_counter()

    def start_step(self) -> None:
        """The first micro-batch of an optimizer step is about to run; wait for the turn."""
        if self.step_started is not None:
            return
        if not self.steps:
            self.write(ready=True, setup_seconds=time.perf_counter() - self.started)
        self.turns.wait(self.steps)
        self.step_started = time.perf_counter()

    def write(self, **record: Any) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def timed(self, method: Callable, name: str) -> Callable:
        """`method`, with the time that it takes added to `name`."""

        @wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.counts[name] += time.perf_counter() - started

        return wrapper

    def count_tokens(self, module: Any, inputs: tuple) -> None:
        """Forward hook of the input embedding; what passes during sampling does not count."""
        if not self.generating:
            self.counts["tokens"] += inputs[0].numel()

    def end_of_step(self, step: int, logs: dict[str, float]) -> None:
        """Write the line of an optimizer step and start the next."""
        c = self.counts
        assert self.step_started is not None
        self.write(
            step=step,
            step_seconds=time.perf_counter() - self.step_started,
            update_seconds=c["step"] - c["generate"] - c["reward"],
            generate_seconds=c["generate"],
            reward_seconds=c["reward"],
            tokens=c["tokens"],
            **logs,
        )
        self.counts.clear()
        self.steps += 1
        self.step_started = None

    def close(self) -> None:
        """Write the totals of the process."""
        unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.write(done=True, seconds=time.perf_counter() - self.started, peak_mib=peak)
        self.file.close()


def watch(trainer: type, meter: Meter) -> None:
    """Put the meter into a trainer class; subclasses inherit it."""
    init, generate, log = trainer.__init__, trainer._generate, trainer.log

    @wraps(init)
    def init_and_hook(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for model in filter(None, (self.model, self.ref_model)):
            model.get_input_embeddings().register_forward_pre_hook(meter.count_tokens)

    @wraps(generate)
    def generate_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        meter.generating = True
        try:
            return generate(self, *args, **kwargs)
        finally:
            meter.generating = False

    @wraps(log)
    def log_and_write(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        log(self, logs, *args, **kwargs)
        if "loss" in logs:  # one of the steps, not the summary at the end
            meter.end_of_step(self.state.global_step, logs)

    trainer.__init__, trainer.log = init_and_hook, log_and_write
    trainer._generate = meter.timed(generate_and_tell, "generate")
    trainer._calculate_rewards = meter.timed(trainer._calculate_rewards, "reward")
    # That of transformers, which TRL's own calls: the trainer's methods stay the ones that it came with.
    timed = meter.timed(Trainer.training_step, "step")

    @wraps(Trainer.training_step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        meter.start_step()
        return timed(*args, **kwargs)

    Trainer.training_step = training_step


def main() -> None:
    """Run what follows `--`, a script or `-m` and a module, with its arguments."""
    own, target = sys.argv[1:], []
    if "--" in own:
        own, target = own[: own.index("--")], own[own.index("--") + 1 :]
    if len(own) not in (1, 3) or own[1:2] not in ([], ["--before"], ["--after"]) or target in ([], ["-m"]):
        raise SystemExit(__doc__)
    meter = Meter(Path(own[0]), Turns(Path(own[2]) if own[1:] else None, own[1:2] == ["--before"]))
    watch(GRPOTrainer, meter)
    target, *arguments = target
    try:
        if target == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [target, *arguments]
            sys.path[0] = str(Path(target).resolve().parent)
            runpy.run_path(target, run_name="__main__")
    finally:
        meter.close()


if __name__ == "__main__":
    main()
