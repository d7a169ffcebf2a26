"""``plan --prompt``: tokens, FLOPs and memory of a training step on one group, packed and row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefix_grouper_plugins.cost import Comparison, ModelShape, compare
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.usage import UsageError

MOST_TOKENS = 10**8
# Label, field of `cost.Cost`, unit.
FIGURES = (
    ("Tokens forwarded", "tokens", 1),
    ("Pairs of query and key, million", "pairs", 1e6),
    ("Training step, TFLOP", "training_flops", 1e12),
    ("  with gradient checkpointing", "checkpointed_training_flops", 1e12),
    ("Keys and values of all layers, GiB", "kv_bytes", 2**30),
    ("Activations kept for the backward, GiB", "activation_bytes", 2**30),
    ("  with gradient checkpointing", "checkpointed_bytes", 2**30),
)


def lengths_of(responses: Sequence[str], group: int | None) -> list[int]:
    """Tokens of each response.

    Raises:
        UsageError: not numbers, or a group size together with one number for each response.
    """
    wrong = next((text for text in responses if not text.lstrip("-").isdecimal()), None)
    if wrong is not None:
        raise UsageError(f"--responses {wrong}: with --prompt give numbers of tokens; files of samples go with DATA")
    lengths = [int(text) for text in responses]
    if group is not None and len(lengths) > 1:
        raise UsageError("--group goes with one length for all responses; leave it out where each has its own")
    return lengths if len(lengths) > 1 else lengths * (group or 8)


def compare_group(shape: ModelShape, prompt: int, responses: Sequence[int]) -> Comparison:
    """
    Raises:
        UsageError: a length below 1, or more tokens than memory is certain to hold.
    """
    if (tokens := prompt + sum(responses)) > MOST_TOKENS:
        raise UsageError(f"--prompt and --responses are {tokens:,} tokens: choose up to {MOST_TOKENS:,} in all")
    try:
        layout = PrefixLayout.from_groups([prompt], [responses])
    except ValueError as error:
        raise UsageError(str(error)) from error
    return compare(shape, layout, scored=sum(responses))


def as_json(name: str, prompt: int, responses: Sequence[int], both: Comparison) -> dict[str, Any]:
    costs = {"shared": both.shared, "row_by_row": both.ordinary}
    figures = {kind: {field: getattr(cost, field) for _, field, _ in FIGURES} for kind, cost in costs.items()}
    asked = {"model": name, "prompt": prompt, "responses": list(responses)}
    return asked | figures | {"token_ratio": both.token_ratio, "speedup": both.speedup}


def print_group(name: str, prompt: int, responses: Sequence[int], both: Comparison) -> None:
    print(f"{name}, a prompt of {prompt:,} tokens, {len(responses)} responses of {sum(responses):,} in all")
    print(f"\n{'':44}{'shared':>12}{'row by row':>12}{'ratio':>8}")
    for label, field, unit in FIGURES:
        ours, theirs = (getattr(cost, field) / unit for cost in (both.shared, both.ordinary))
        form = ",.0f" if unit in (1, 1e6) else ",.2f"
        print(f"{label:44}{ours:>12{form}}{theirs:>12{form}}{theirs / ours:>8.2f}")
    print(
        f"\nToken ratio {both.token_ratio:.3f}. A training step is at most {both.speedup:.2f} times as fast, at equal "
        "FLOP/s and without padding.\nMemory in bfloat16, without weights, logits and optimizer."
    )
