"""Random inputs against independent answers: how many came out equal, as a clear error, or WRONG.

    python -m tests.trust.fuzz --batches 20000 --forests 2000 --plans 20000 --arguments 20000

Every case is made from its number alone, so a case that is WRONG can be run again by itself (``--only batches:123``).
Malformed inputs belong to the mix: for them a `ValueError` that names the argument is the right answer, and a number is
not.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper, prefix_grouped_logps, shared_prefix_attention
from prefix_grouper_plugins.integrations.trl.launch import split_arguments
from prefix_grouper_plugins.micro_batches import RowSize, packed_tokens, plan_micro_batches, spread_micro_batches
from prefix_grouper_plugins.settings import TRL_OPTIONS
from tests import tiny

EQUAL, ERROR, WRONG = "equal", "clear error", "WRONG"
VOCABULARY = len(tiny.WORDS)
Verdict = tuple[str, str]  # one of the three, and details of what was WRONG

# ------------------------------------------------------------------------------------------------------------- batches

LOOP_OVER_EXPERTS = {"experts_implementation": "eager"}  # the default multiplies no float64
# Dense, biased, tied, windowed, sinks, learned positions, mixture of experts, scan and short convolution.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {"attn_implementation": "eager", "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt_oss": {"attn_implementation": "eager", "num_local_experts": 4, "sliding_window": 4, **LOOP_OVER_EXPERTS},
    "gpt_neox": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **LOOP_OVER_EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
}
# Norms, routers and rotary angles of transformers compute in float32 in a float64 model too.
TOLERANCE = {"gemma2": 1e-5, "gpt_oss": 1e-5, "qwen3_moe": 1e-5}


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """A stock model and one with the same weights that shares, both in float64."""
    options = dict(MODELS[name])
    implementation = options.pop("attn_implementation", None)
    pair = [tiny.model(name, attn_implementation=implementation, **options).double() for _ in range(2)]
    for model in pair:
        tiny.compute_norms_in_input_dtype(model)
    return pair[0], enable_prefix_grouper(pair[1])


@dataclass(frozen=True)
class Batch:
    """Arguments of `prefix_grouped_logps`; ``broken`` says what is wrong with them, None for a batch that is right."""

    blocks: tuple[Tensor, Tensor, Tensor, Tensor]
    temperature: float
    entropy: bool
    broken: str | None = None


def random_batch(source: random.Random) -> Batch:
    """Few prompts for many rows, some of which begin alike; empty completions; every dtype that trainers use."""
    texts = [_words(source, source.randint(1, 9)) for _ in range(source.randint(1, 3))]
    texts += [text[: source.randint(1, len(text))] + _words(source, 2) for text in texts if source.random() < 0.3]
    prompts = [source.choice(texts) for _ in range(source.randint(1, 7))]
    completions = [_words(source, source.choice([0, 1, 1, 2, 4, 7])) for _ in prompts]
    if source.random() < 0.3:  # completions that begin alike, or are equal
        completions = [source.choice(completions) + _words(source, source.randint(0, 2)) for _ in prompts]
    blocks = (*_padded(prompts, "left"), *_padded(completions, "right"))
    ids, masks = source.choice([torch.int64, torch.int32]), source.choice([torch.int64, torch.bool, torch.float32])
    cast = tuple(x.to(masks if i % 2 else ids) for i, x in enumerate(blocks))
    batch = Batch(cast, source.choice([1.0, 0.7, 2.5]), source.random() < 0.5)
    return _break(batch, source) if source.random() < 0.15 else batch


def _words(source: random.Random, count: int) -> list[int]:
    return [source.randrange(1, VOCABULARY) for _ in range(count)]


def _padded(texts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(1, *map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(width - len(text), width) if side == "left" else slice(len(text))
        ids[row, columns], mask[row, columns] = torch.tensor(text, dtype=torch.int64), 1
    return ids, mask


def _break(batch: Batch, source: random.Random) -> Batch:
    """The batch with one thing wrong; batches in which the damage would change nothing stay as they are."""
    prompts, prompt_mask, completions, completion_mask = batch.blocks
    kind = source.choice(["wrong side", "hole", "empty prompt", "temperature", "rows", "shape"])
    if kind == "temperature":
        return replace(batch, temperature=source.choice([0.0, -1.0]), broken=kind)
    if kind == "rows":
        return replace(batch, blocks=(prompts, prompt_mask, completions[1:], completion_mask[1:]), broken=kind)
    if kind == "shape":
        return replace(batch, blocks=(prompts, prompt_mask[:, 1:], completions, completion_mask), broken=kind)
    mask = prompt_mask.clone()
    row = source.randrange(len(mask))
    if kind == "empty prompt":
        mask[row] = 0
    elif kind == "wrong side":
        mask[row] = mask[row].flip(0)
    else:
        mask[row, -1 - source.randrange(mask.shape[1])] = 0
    real = mask[row].bool()
    still_right = bool(real.any()) and bool((real.int().diff() >= 0).all())
    if still_right or not bool(completion_mask.any()):  # then nothing is scored, and prompts are not looked at
        return batch
    return replace(batch, blocks=(prompts, mask, completions, completion_mask), broken=kind)


def try_batch(case: int) -> Verdict:
    """Log-probs, entropies and gradients of one random batch against forwards of its rows."""
    source = random.Random(f"batch {case}")
    name = source.choice(sorted(MODELS))
    batch = random_batch(source)
    stock, shared = models(name)
    tolerance = TOLERANCE.get(name, 1e-9)
    keywords = {"temperature": batch.temperature, "compute_entropy": batch.entropy}
    try:
        logps, entropy = prefix_grouped_logps(shared, *batch.blocks, **keywords)
    except ValueError as error:
        return (ERROR, "") if batch.broken else (WRONG, f"{name}: a right batch was refused: {error}")
    except Exception as error:
        return WRONG, f"{name}: {type(error).__name__} instead of a ValueError ({batch.broken}): {error}"
    if batch.broken:
        return WRONG, f"{name}: took a batch that is broken ({batch.broken})"
    expected = _row_by_row(stock, batch)
    weights = torch.rand(logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(case))
    found = [(logps, expected[0])] + ([(entropy, expected[1])] if batch.entropy else [])
    for what, (mine, right) in zip(("log-probs", "entropies"), found, strict=False):
        if not torch.allclose(mine, right, rtol=tolerance, atol=tolerance):
            return WRONG, f"{name}: {what} are off by {float((mine - right).detach().abs().max()):.1e}"
    gradients = [
        torch.autograd.grad((result * weights).sum(), list(model.parameters()), allow_unused=True)
        for model, result in ((shared, logps), (stock, expected[0]))
        if result.requires_grad
    ]
    off = _difference(*gradients) if len(gradients) == 2 else 0.0
    return (EQUAL, "") if off < 10 * tolerance else (WRONG, f"{name}: gradients are off by {off:.1e}")


def _row_by_row(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, zero where there is no token, each row without padding."""
    prompts, prompt_mask, completions, completion_mask = batch.blocks
    logps, entropies = (torch.zeros(completions.shape, dtype=torch.float64) for _ in range(2))
    for row in range(len(prompts)):
        length = int(completion_mask[row].sum())
        if not length:
            continue
        prompt = prompts[row][prompt_mask[row] != 0]
        ids = torch.cat([prompt, completions[row, :length]]).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1] / batch.temperature
        distribution = logits.log_softmax(-1)
        values = distribution.gather(1, ids[len(prompt) :, None])[:, 0]
        place = (torch.tensor(row), torch.arange(length))
        logps = logps.index_put(place, values)
        entropies = entropies.index_put(place, -(distribution.exp() * distribution).sum(-1))
    return logps, entropies


def _difference(found: Any, expected: Any) -> float:
    pairs = [(x, y) for x, y in zip(found, expected, strict=True) if x is not None or y is not None]
    if any(x is None or y is None for x, y in pairs):
        nothing = torch.zeros(())
        pairs = [(nothing if x is None else x, nothing if y is None else y) for x, y in pairs]
    size = sum(float(y.square().sum()) for _, y in pairs) ** 0.5
    return sum(float((x - y).square().sum()) for x, y in pairs) ** 0.5 / max(size, 1e-6)


# ------------------------------------------------------------------------------------------------------------- forests


def try_forest(case: int, backends: tuple[str, ...] = ("blockwise", "merged_lse")) -> Verdict:
    """Attention over one random forest by each backend, outputs and gradients, against the dense oracle."""
    source = random.Random(f"forest {case}")
    layout = PrefixLayout.from_rows(_random_rows(source))
    kv_heads, group, dim = source.choice([1, 2, 3]), source.choice([1, 2, 4]), source.choice([4, 8, 16])
    generator = torch.Generator().manual_seed(case)
    options: dict[str, Any] = {"scale": source.choice([None, 0.3])}
    if source.random() < 0.4:
        options["sliding_window"] = source.randint(1, 12)
    if source.random() < 0.3:
        options["softcap"] = source.choice([1.0, 5.0])
    shapes = [(kv_heads * group, dim), (kv_heads, dim), (kv_heads, dim if source.random() < 0.7 else dim + 3)]
    tensors = [torch.randn(layout.num_tokens, *s, dtype=torch.float64, generator=generator) for s in shapes]
    if source.random() < 0.3:
        options["sinks"] = torch.randn(kv_heads * group, dtype=torch.float64, generator=generator)
    expected = _attend(tensors, layout, "dense", options)
    for backend in backends:
        try:
            found = _attend(tensors, layout, backend, options)
        except ValueError as error:
            if backend != "merged_lse" or not {"sliding_window", "softcap"} & options.keys():
                return WRONG, f"{backend} refused a call: {error}"
            continue
        for what, mine, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
            if not torch.allclose(mine, right, rtol=1e-9, atol=1e-9):
                return WRONG, f"{backend}: {what} is off by {float((mine - right).abs().max()):.1e} ({options})"
    return EQUAL, ""


def _random_rows(source: random.Random) -> list[Tensor]:
    """Rows that part and part again, of two words, so that they meet often."""
    rows = [[source.randrange(2) for _ in range(source.randint(2, 25))] for _ in range(source.randint(1, 4))]
    for _ in range(source.randint(0, 6)):
        old = source.choice(rows)
        rows.append(old[: source.randint(1, len(old))] + [source.randrange(3) for _ in range(source.randint(1, 30))])
    return [torch.tensor(row) for row in rows]


def _attend(tensors: list[Tensor], layout: PrefixLayout, backend: str, options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = shared_prefix_attention(*leaves, layout, backend=backend, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


# --------------------------------------------------------------------------------------------------------------- plans


def try_plan(case: int) -> Verdict:
    """Planned micro-batches hold every row once, keep their limit, and count tokens as a layout does."""
    source = random.Random(f"plan {case}")
    lengths = {group: source.randint(1, 40) for group in range(source.randint(1, 6))}
    sizes = [RowSize(group, lengths[group], source.randint(1, 30)) for group in source.choices(list(lengths), k=20)][
        : source.randint(1, 20)
    ]
    most = source.choice([10**6, source.randint(5, 200)])
    longest = max(packed_tokens([size]) for size in sizes)
    try:
        plan = plan_micro_batches(sizes, most)
    except ValueError as error:
        return (ERROR, "") if longest > most else (WRONG, f"refused {sizes} within {most} tokens: {error}")
    if longest > most:
        return WRONG, f"took a row of {longest} tokens within {most}"
    count = source.randint(len(plan), len(sizes))
    for micro_batches in (plan, spread_micro_batches(plan, sizes, count)):
        if sorted(row for rows in micro_batches for row in rows) != list(range(len(sizes))):
            return WRONG, f"rows are lost or doubled: {micro_batches}"
        for rows in micro_batches:
            tokens = packed_tokens(sizes[row] for row in rows)
            if tokens != _tokens_of_layout([sizes[row] for row in rows]):
                return WRONG, f"{tokens} tokens are planned for {rows}, a layout has other ones"
            if tokens > most:
                return WRONG, f"{rows} has {tokens} tokens, beyond {most}"
    return EQUAL, ""


def _tokens_of_layout(sizes: list[RowSize]) -> int:
    groups: dict[Any, list[int]] = {}
    for size in sizes:
        groups.setdefault((size.group, size.prompt), []).append(size.response)
    return PrefixLayout.from_groups([prompt for _, prompt in groups], list(groups.values())).num_tokens


# ----------------------------------------------------------------------------------------------------------- arguments


def try_arguments(case: int) -> Verdict:
    """The launcher takes our options out of a command line, or stops; it hands nothing of ours on to the script."""
    source = random.Random(f"arguments {case}")
    argv, ours, misspelt = _random_arguments(source)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options, rest = split_arguments(argv)
    except SystemExit:
        return (ERROR, "") if misspelt else (WRONG, f"stopped at {argv}")
    if misspelt:
        return WRONG, f"took {misspelt} in {argv}"
    left = [t for t in rest if t.startswith("-") and t.lstrip("-").replace("-", "_").split("=")[0] in TRL_OPTIONS]
    if left or set(options) != ours:
        return WRONG, f"{argv} gave {options} and {rest}"
    return EQUAL, ""


def _random_arguments(source: random.Random) -> tuple[list[str], set[str], str | None]:
    """A command line, the options of ours in it, and one of them misspelt or None."""
    argv, ours, misspelt = [["train.py"]], set[str](), None
    for _ in range(source.randint(0, 3)):
        argv.append(source.choice([["--output_dir", "use_prefix_grouper"], ["--bf16"], ["--lr", "-1e-3"], ["-v"]]))
    for name in source.sample(sorted(TRL_OPTIONS), source.randint(0, 2)):
        option = TRL_OPTIONS[name]
        values = ["true", "false"] if option.is_switch else list(option.choices or ["1000"])
        value, spelt = source.choice(values), name.replace("_", "-") if source.random() < 0.4 else name
        argv.append([f"--{spelt}={value}"] if source.random() < 0.5 else [f"--{spelt}", value])
        ours.add(name)
    if source.random() < 0.3:
        misspelt = _misspelt(source)
        argv.append([misspelt])
    return [token for part in argv for token in part], ours, misspelt


def _misspelt(source: random.Random) -> str:
    name = source.choice(sorted(TRL_OPTIONS))
    at = source.randrange(len("prefix_grouper"), len(name)) if len(name) > 18 else source.randrange(4, len(name))
    letters = [name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], f"{name}s"]
    wrong = source.choice([x for x in letters if x not in TRL_OPTIONS])
    return source.choice([f"--{wrong}", f"--{wrong.replace('_', '-')}", f"-{name}"])


# ---------------------------------------------------------------------------------------------------------------- runs

TRIALS: dict[str, Callable[[int], Verdict]] = {
    "batches": try_batch,
    "forests": try_forest,
    "plans": try_plan,
    "arguments": try_arguments,
}


def run(trial: str, cases: range) -> tuple[Counter[str], list[str]]:
    """Counts of the verdicts, and a line for each case that was WRONG."""
    counts: Counter[str] = Counter({EQUAL: 0, ERROR: 0, WRONG: 0})
    wrong: list[str] = []
    for case in cases:
        verdict, details = TRIALS[trial](case)
        counts[verdict] += 1
        if verdict == WRONG:
            wrong.append(f"{trial}:{case} {details}")
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Random inputs against independent answers.")
    for name, count in (("batches", 500), ("forests", 300), ("plans", 2000), ("arguments", 2000)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"cases (default: {count})")
    parser.add_argument("--only", metavar="TRIAL:CASE", help="run one case again")
    options = parser.parse_args()
    if options.only:
        trial, _, case = options.only.partition(":")
        print(*TRIALS[trial](int(case)))
        return 0
    failures = 0
    print(f"{'':12}{EQUAL:>10}{ERROR:>14}{WRONG:>8}{'seconds':>10}")
    for trial in TRIALS:
        start = time.process_time()  # whatever else the machine does
        counts, wrong = run(trial, range(getattr(options, trial)))
        seconds = time.process_time() - start
        print(f"{trial:12}{counts[EQUAL]:>10}{counts[ERROR]:>14}{counts[WRONG]:>8}{seconds:>10.1f}")
        print(*(f"  {line}" for line in wrong[:20]), sep="\n", end="\n" if wrong else "")
        failures += len(wrong)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
