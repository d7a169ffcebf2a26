"""What do DPO, KTO and reward models cost, TRL's trainers and ours?

    python benchmarks/pairs.py                CPU, one thread: 4 layers, 512 prompt tokens, 64 tokens of each completion

Preference data with two completions of each prompt (DPO), and with four: rated ones (KTO, which forwards each of them and
four more for its KL term), and all six pairs of them (reward model), in the order of the data set and shuffled, as TRL does by
default. Both trainers take turns, and the ratio of times is the median over the turns. The model has random weights in
float32; `difference` is the largest one between the trained weights.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from datasets import Dataset
from harness import RESULTS, number, use, write_csv
from training import WORDS, model, tokenizer
from transformers import AutoModelForSequenceClassification

from prefix_grouper_plugins.integrations import trl as ours


@dataclass(frozen=True)
class Case:
    """One trainer on one kind of data.

    Attributes:
        algorithm: as TRL calls it.
        data: what the data hold, in words.
        completions: of each prompt.
        batch: examples in a micro-batch.
        settings: of the config.
    """

    algorithm: str
    data: str
    completions: int
    batch: int
    settings: dict[str, Any] = field(default_factory=dict)


IN_ORDER = {"train_sampling_strategy": "sequential"}
CASES = (
    Case("DPO", "one pair of each prompt", 2, 4),
    Case("KTO", "four completions of each prompt", 4, 8),
    Case("Reward", "six pairs of each prompt, in order", 4, 6, IN_ORDER),
    Case("Reward", "six pairs of each prompt, shuffled", 4, 6),
)


def examples(case: Case, prompt: int, response: int, steps: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(3, len(WORDS), (tokens,), generator=generator).tolist())

    rows: list[dict[str, Any]] = []
    while len(rows) < 4 * steps * case.batch:  # so that shuffling takes the pairs of a prompt apart
        shared, completions = text(prompt) + " ", [text(response) for _ in range(case.completions)]
        if case.algorithm == "KTO":
            rows += [{"prompt": shared, "completion": c, "label": i % 2 == 0} for i, c in enumerate(completions)]
        else:
            pairs = itertools.combinations(completions, 2)
            rows += [{"prompt": shared, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    return Dataset.from_list(rows)


def run(case: Case, shared: bool, data: Dataset, steps: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Seconds of ``train()``, tokens forwarded over tokens of the rows, and the weights."""
    home, prefix = (ours, "PrefixGrouper") if shared else (trl, "")
    kind, config = (getattr(home, f"{prefix}{case.algorithm}{part}") for part in ("Trainer", "Config"))
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=case.batch,
            max_length=None,
            learning_rate=1e-4,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
            seed=1,
            **case.settings,
        )
        path = Path(folder) / "model"
        model().save_pretrained(path)
        policy: Any = str(path)
        if case.algorithm == "Reward":
            torch.manual_seed(0)
            policy = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        else:
            args.model_init_kwargs = {"dtype": "float32"}
        trainer = kind(model=policy, args=args, train_dataset=data, processing_class=tokenizer())
        torch.manual_seed(5)
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return seconds, trainer.sharing.token_ratio if shared else 1.0, weights


def measure(case: Case, prompt: int, response: int, steps: int, repeats: int) -> dict[str, Any]:
    data = examples(case, prompt, response, steps)
    stock, shared, ratio, difference = [], [], 1.0, 0.0
    for _ in range(repeats):
        seconds, _, expected = run(case, False, data, steps)
        stock.append(seconds)
        seconds, ratio, found = run(case, True, data, steps)
        shared.append(seconds)
        difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    return {
        "trainer": case.algorithm,
        "data": case.data,
        "prompt": prompt,
        "response": response,
        "examples": case.batch,
        "token_ratio": f"{ratio:.3f}",
        "stock_seconds": number(median(stock)),
        "shared_seconds": number(median(shared)),
        "times_as_fast": f"{median(a / b for a, b in zip(stock, shared, strict=True)):.2f}",
        "difference": f"{difference:.1e}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs=2, default=(512, 64), metavar=("PROMPT", "RESPONSE"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "pairs-cpu.csv")
    parser.add_argument("--note", default="", help="what else ran on the machine, say")
    given = parser.parse_args(arguments)
    use("cpu")
    rows = []
    for case in CASES:
        rows.append(measure(case, *given.sizes, given.steps, given.repeats))
        print(rows[-1], flush=True)
    note = f"medians of {given.repeats} runs of {given.steps} steps in turns; seconds are of the process, on one thread"
    write_csv(given.output, rows, "cpu", "; ".join(filter(None, (note, given.note))))


if __name__ == "__main__":
    main()
