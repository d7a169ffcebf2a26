"""Run a TRL script and write down what every optimizer step cost, without a change to the script.

    python examples/trl/measure.py steps.jsonl -- my_script.py --its arguments
    python examples/trl/measure.py steps.jsonl -- -m prefix_grouper_plugins.integrations.trl.launch my_script.py ...

Timers are put around methods of TRL's `GRPOTrainer` before the script starts, and the model's input embedding counts the
tokens that pass through it. `steps.jsonl` gets one line for each optimizer step, as soon as it is logged:

    update_seconds     forward passes for old-policy and reference log-probs, forward and backward of the loss
    generate_seconds   sampling, `reward_seconds` scoring
    tokens             tokens that the model read outside of sampling, padding included

along with the numbers that the trainer logs itself. Set `--logging_steps 1`. The last line holds the totals.
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


class Meter:
    """Seconds and tokens since the last line, and the file that the lines go to."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.generating = False
        self.started = time.perf_counter()

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
        self.write(
            step=step,
            update_seconds=c["step"] - c["generate"] - c["reward"],
            generate_seconds=c["generate"],
            reward_seconds=c["reward"],
            tokens=c["tokens"],
            **logs,
        )
        self.counts.clear()

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
    Trainer.training_step = meter.timed(Trainer.training_step, "step")


def main() -> None:
    """Run what stands after `--`, a script or `-m` and a module, with its arguments."""
    if len(sys.argv) < 4 or sys.argv[2] != "--" or sys.argv[3:] == ["-m"]:
        raise SystemExit(__doc__)
    meter = Meter(Path(sys.argv[1]))
    watch(GRPOTrainer, meter)
    target, *arguments = sys.argv[3:]
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
