"""Many optimizer steps over batches of changing shapes: memory, objects, caches and step time stay flat.

    python -m tests.trust.long_run --steps 2000

A layout is made for every batch, hooks run in every forward and plans are cached by layout, so whatever is kept for too
long shows here. The first tenth of the steps is a warm-up; what is compared is the second tenth with the last.
"""

from __future__ import annotations

import argparse
import functools
import gc
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from prefix_grouper_plugins import enable_prefix_grouper, prefix_grouped_logps
from tests import tiny

MOST_MEMORY = 1.10  # of the last tenth over the second tenth
MOST_OBJECTS = 1.02
MOST_TIME = 1.25  # medians of CPU time, which other work on the machine leaves alone


@dataclass
class Watch:
    """What was seen: seconds for each real completion token of a step; every ten steps memory, Python objects, cache entries."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    objects: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)

    def growth(self) -> dict[str, float]:
        """The last tenth of the run over its second tenth, by median."""
        return {name: _last_over_early(values) for name, values in vars(self).items()}


def _last_over_early(values: list[float]) -> float:
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[-tenth:]) / statistics.median(values[tenth : 2 * tenth])


def random_batch(source: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One to three prompts of 4 to 40 tokens, two to six completions of 1 to 20 tokens each; no two batches alike."""
    prompts, completions = [], []
    for _ in range(source.randint(1, 3)):
        prompt = [source.randrange(3, len(tiny.WORDS)) for _ in range(source.randint(4, 40))]
        for _ in range(source.randint(2, 6)):
            prompts.append(torch.tensor(prompt))
            completions.append(torch.randint(3, len(tiny.WORDS), (source.randint(1, 20),)))
    blocks = []
    for texts, side in ((prompts, "left"), (completions, "right")):
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
        blocks += [pad(texts), pad([torch.ones_like(text) for text in texts])]
    return blocks[0], blocks[1], blocks[2], blocks[3]


def cache_entries() -> int:
    """Entries of all ``lru_cache`` of the package: plans, tables, forests."""
    found = [
        value
        for name, module in list(sys.modules.items())
        if name.startswith("prefix_grouper_plugins")
        for value in vars(module).values()
        if callable(getattr(value, "cache_info", None))
    ]
    return sum(function.cache_info().currsize for function in {id(f): f for f in found}.values())


def run(model_type: str, steps: int, *, checkpointing: bool = False) -> Watch:
    """Train a tiny model for ``steps`` steps on random batches with random advantages."""
    source = random.Random(0)
    torch.manual_seed(0)
    model = enable_prefix_grouper(tiny.model(model_type)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    process, watch = psutil.Process(), Watch()
    for step in range(steps):
        batch = random_batch(source)
        start = time.process_time()
        logps, _ = prefix_grouped_logps(model, *batch)
        (logps.sum(1) * torch.randn(len(logps))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.seconds.append((time.process_time() - start) / float(batch[3].sum()))
        if step % 10 == 0:
            gc.collect()
            watch.objects.append(len(gc.get_objects()))
            watch.megabytes.append(process.memory_info().rss / 2**20)
            watch.cached.append(cache_entries())
    return watch


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory, objects, caches and step time over many steps.")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    failed = False
    print(f"{'':24}{'memory':>10}{'objects':>10}{'caches':>10}{'time':>10}   (last tenth / second tenth)")
    for model_type, checkpointing in (("qwen3", False), ("mistral", True), ("lfm2", False)):
        growth = run(model_type, options.steps, checkpointing=checkpointing).growth()
        name = f"{model_type}{' checkpointed' if checkpointing else ''}"
        figures = [growth[key] for key in ("megabytes", "objects", "cached", "seconds")]
        print(f"{name:24}" + "".join(f"{figure:>10.3f}" for figure in figures))
        failed |= growth["megabytes"] > MOST_MEMORY or growth["objects"] > MOST_OBJECTS or growth["seconds"] > MOST_TIME
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
