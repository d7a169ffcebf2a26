"""``prefix-grouper plan``: options, and from them to the figures of :mod:`.report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, TypeVar

from prefix_grouper_plugins.usage import UsageError

if TYPE_CHECKING:
    from prefix_grouper_plugins.cost import ModelShape
    from prefix_grouper_plugins.plan.estimate import Training
    from prefix_grouper_plugins.plan.schedule import Prompts, Schedule, TRLSizes, VerlSizes

Number = TypeVar("Number", int, float)

MOST = 10**7  # of anything that is counted, so that a slip of a key does not fill the memory
LIMIT = 2000  # prompts that are read unless another number is asked for
ADVICE_LIMIT = 256  # prompts that are tried with other sizes
BARS = 12  # of a histogram
# Options that concern a training on data, and say nothing of one group.
DATA_OPTIONS = (
    "tokenizer", "prompt_column", "response_column", "limit", "trainer", "batch_size", "accumulation",
    "steps_per_generation", "max_tokens", "mini_batch", "max_token_len", "processes", "memory", "lora_rank", "checkpointing", "dtype",
    "forward_passes", "outside_share", "plot", "seed",
)  # fmt: skip


def count(text: str) -> int:
    """
    Raises:
        argparse.ArgumentTypeError: ``text`` is not a whole number from 1 to `MOST`.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return _at_most(int(text), text)


def _at_most(value: Number, text: str) -> Number:
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST:,}")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return _at_most(int(text), text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return _at_most(value, text)


def _share(text: str) -> float:
    value = _positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share below 1")
    return value


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """The options of ``plan``. Those that concern a training have no default here, so that :func:`check` sees them."""
    plan.add_argument(
        "data", nargs="?", type=Path, metavar="DATA", help="prompts: .jsonl, .json, .parquet, or a folder of datasets"
    )
    plan.add_argument("--prompt", type=int, help="tokens of the prompt, to look at one group without data")
    plan.add_argument(
        "--responses", nargs="+",
        help="tokens of the responses: one number for all, or each; with DATA also a file of samples (lengths or texts)",
    )  # fmt: skip
    plan.add_argument("--group", type=count, help="responses to a prompt (default: 8)")
    data = plan.add_argument_group("with DATA: what is in the files")
    data.add_argument("--tokenizer", help="folder or hub name (default: that of --model; 'whitespace' for an estimate)")
    data.add_argument("--prompt-column", help="default: prompt, messages, question, query or input")
    data.add_argument(
        "--response-column", help="in a file of samples; default: completion, response, output or a length"
    )
    data.add_argument("--limit", type=_whole, help=f"prompts to read, 0 for all (default: {LIMIT})")
    sizes = plan.add_argument_group("with DATA: the batches")
    sizes.add_argument(
        "--trainer", choices=("trl", "verl"), help="the trainer whose micro-batches are planned (default: trl)"
    )
    sizes.add_argument(
        "--batch-size", type=count,
        help="rows of a micro-batch: per_device_train_batch_size (default: 8), ppo_micro_batch_size_per_gpu",
    )  # fmt: skip
    sizes.add_argument("--accumulation", type=count, help="TRL: gradient_accumulation_steps (default: 1)")
    sizes.add_argument("--steps-per-generation", type=count, help="TRL: steps_per_generation (default: --accumulation)")
    sizes.add_argument("--max-tokens", type=count, help="TRL: prefix_grouper_max_tokens (default: auto)")
    sizes.add_argument("--mini-batch", type=count, help="verl: ppo_mini_batch_size, in prompts (default: 256, or all)")
    sizes.add_argument("--max-token-len", type=count, help="verl, with use_dynamic_bsz: ppo_max_token_len_per_gpu")
    sizes.add_argument("--processes", type=count, help="data-parallel processes (default: 1)")
    training = plan.add_argument_group("with DATA: the training")
    training.add_argument(
        "--memory", type=_positive, metavar="GIB", help="memory of a device: also print the largest group that fits"
    )
    training.add_argument(
        "--lora-rank", type=count, help="LoRA on all linear layers (default: all weights are trained)"
    )
    training.add_argument("--checkpointing", action="store_true", default=None, help="gradient checkpointing")
    training.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of weights and activations (default: bfloat16)"
    )
    training.add_argument(
        "--forward-passes", type=_whole, help="passes without gradients: reference and old policy (default: 0)"
    )
    training.add_argument(
        "--outside-share", type=_share,
        help="share of a stock step that generation, rewards and the optimizer take (default: 0.25, 0.5 and 0.75)",
    )  # fmt: skip
    training.add_argument("--seed", type=_whole, help="of the order of rows and the drawn lengths (default: 0)")
    training.add_argument("--plot", type=Path, metavar="PNG", help="also draw the figures into this file")


def check(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        UsageError: neither data nor a prompt's length, both, or options of the other kind or the other trainer.
    """
    prompts = "--prompt" if options.data is None and options.prompt is None else None
    missing = [name for name in (prompts, "--responses" if options.responses is None else None) if name]
    if missing:
        needed = f"the following arguments are required: {', '.join(missing)}"
        raise UsageError(
            f"prefix-grouper plan: {needed} (DATA can take the place of --prompt); see prefix-grouper plan --help"
        )
    if options.data is not None and options.prompt is not None:
        raise UsageError("--prompt looks at one group, and DATA at a training: give one of them")
    given = [name for name in DATA_OPTIONS if getattr(options, name) is not None]
    if options.data is None:
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} goes with DATA, the prompts of a training; --prompt looks at one group"
            )
        return
    others = {"trl": ("mini_batch", "max_token_len"), "verl": ("accumulation", "steps_per_generation", "max_tokens")}
    trainer = options.trainer or "trl"
    if wrong := [name for name in others[trainer] if name in given]:
        raise UsageError(f"--{wrong[0].replace('_', '-')} is no option of --trainer {trainer}")
    if options.max_token_len is not None and options.batch_size is not None:
        raise UsageError("--max-token-len and --batch-size are two limits of verl's micro-batches: give one")


def figures(options: argparse.Namespace, name: str, shape: ModelShape, config: Any) -> dict[str, Any]:
    """Everything that ``plan DATA`` prints.

    Args:
        options: checked by :func:`check`.
        name, shape: of the model.
        config: its config, None for a model by name.
    """
    from prefix_grouper_plugins.plan.data import WHITESPACE, draw_lengths, read_lengths, read_prompts, tokenizer_of
    from prefix_grouper_plugins.plan.schedule import Prompts

    trainer, group, seed = options.trainer or "trl", options.group or 8, options.seed or 0
    tokenizer = options.tokenizer or options.model or WHITESPACE
    tokenize = tokenizer_of(tokenizer)
    limit = LIMIT if options.limit is None else options.limit or None
    ids = read_prompts(options.data, tokenize, column=options.prompt_column, limit=limit)
    samples = read_lengths(options.responses, tokenize, options.response_column)
    prompts = Prompts(
        ids, beginnings_share=trainer == "trl", padded_positions=_numbers_padding(config), window=shape.sliding_window
    )
    sizes = _sizes(options, trainer, group, len(ids))
    if len(ids) < sizes.prompts_needed:
        raise UsageError(
            f"{options.data}: {len(ids)} prompt(s) were read, and one {'generation batch' if trainer == 'trl' else 'optimizer step'} "
            f"takes {sizes.prompts_needed}: give more data or smaller batches"
        )
    training = _training(options, trainer, shape, config)
    schedule = _schedule(prompts, draw_lengths(samples, len(ids) * group, seed), sizes, seed)
    found = {
        "data": str(options.data),
        "model": name,
        "tokenizer": tokenizer,
        "trainer": trainer,
        "group": group,
        "prompts": _statistics([len(x) for x in ids]) | {"limit": limit if limit == len(ids) else None},
        "responses": _statistics(samples),
        "sizes": {key: value for key, value in vars(sizes).items() if value is not None},
    }
    found |= _savings(schedule, training, options.outside_share)
    return found | _what_fits(options, prompts, samples, sizes, shape, config)


def _numbers_padding(config: Any) -> bool:
    from prefix_grouper_plugins.modeling.model_types import known_of

    return config is None or not known_of(config.model_type).skips_padding


def _sizes(options: argparse.Namespace, trainer: str, group: int, num_prompts: int) -> TRLSizes | VerlSizes:
    from prefix_grouper_plugins.plan.schedule import TRLSizes, VerlSizes

    processes = options.processes or 1
    if trainer == "verl":
        rows = None if options.max_token_len else options.batch_size or group
        return VerlSizes(group, options.mini_batch or min(256, num_prompts), rows, options.max_token_len, processes)
    accumulation = options.accumulation or 1
    return TRLSizes(
        group,
        options.batch_size or 8,
        accumulation,
        options.steps_per_generation or accumulation,
        processes,
        options.max_tokens,
        bool(options.checkpointing),
    )


def _training(options: argparse.Namespace, trainer: str, shape: ModelShape, config: Any) -> Training:
    """TRL keeps AdamW's two states in the weights' dtype. verl cuts float32 weights, gradients and states over processes."""
    from prefix_grouper_plugins.plan.estimate import Training

    size = 4 if options.dtype == "float32" else 2
    verl = trainer == "verl"
    return Training(
        shape,
        shape.num_weights if config is None else _num_weights(config),
        element_size=size,
        lora_rank=options.lora_rank,
        checkpointing=bool(options.checkpointing),
        full_logits=verl,
        forward_passes=options.forward_passes or 0,
        optimizer_size=(8 + 2 * (4 - size)) if verl else 2 * size,
        shards=(options.processes or 1) if verl else 1,
    )


def _num_weights(config: Any) -> int:
    """Of the whole model, experts that a token does not meet included. Builds it without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            x.numel() for x in AutoModelForCausalLM.from_config(config.get_text_config(decoder=True)).parameters()
        )


def _schedule(prompts: Prompts, lengths: list[int], sizes: TRLSizes | VerlSizes, seed: int) -> Schedule:
    from prefix_grouper_plugins.plan.schedule import TRLSizes, trl_schedule, verl_schedule

    if isinstance(sizes, TRLSizes):
        return trl_schedule(prompts, lengths, sizes, seed)
    return verl_schedule(prompts, lengths, sizes)


def _statistics(lengths: list[int]) -> dict[str, Any]:
    """Of lengths, with a histogram of bars ``[from, to, count]``, ``to`` excluded."""
    low, high = min(lengths), max(lengths)
    width = max(-(-(high + 1 - low) // BARS), 1)
    edges = range(low, high + 1, width)
    bars = [[edge, edge + width, sum(edge <= x < edge + width for x in lengths)] for edge in edges]
    ordered = sorted(lengths)
    return {
        "count": len(lengths),
        "min": low,
        "median": median(lengths),
        "mean": mean(lengths),
        "p90": ordered[9 * (len(ordered) - 1) // 10],
        "max": high,
        "histogram": bars,
    }


def _savings(schedule: Schedule, training: Training, outside: float | None) -> dict[str, Any]:
    from prefix_grouper_plugins.plan.estimate import SHARES_OUTSIDE, step_speedups

    both = {"stock": schedule.stock, "shared": schedule.shared}
    update = {way: training.update_flops(loads) for way, loads in both.items()}
    passes = {way: training.step_flops(loads) for way, loads in both.items()}
    steps, ratio = schedule.optimizer_steps, passes["stock"] / passes["shared"]
    shares = SHARES_OUTSIDE if outside is None else (outside,)
    return {
        "token_ratio": schedule.token_ratio,
        "tokens_per_step": {way: sum(load.tokens for load in loads) / steps for way, loads in both.items()}
        | {"rows": schedule.row_tokens / steps},
        "update_flops_per_step": {way: flops / steps for way, flops in update.items()},
        "update_speedup": update["stock"] / update["shared"],
        "passes_speedup": ratio,
        "step_speedup": [
            {"outside_share": share, "times_as_fast": faster} for share, faster in step_speedups(ratio, shares).items()
        ],
        "peak_bytes": {way: training.peak_bytes(loads) for way, loads in both.items()}
        | {"static": training.static_bytes},
    }


def _what_fits(
    options: argparse.Namespace,
    prompts: Prompts,
    samples: list[int],
    sizes: TRLSizes | VerlSizes,
    shape: ModelShape,
    config: Any,
) -> dict[str, Any]:
    """Settings of both trainers that share most, and with ``--memory`` the largest group of one micro-batch."""
    from prefix_grouper_plugins.plan import advice
    from prefix_grouper_plugins.plan.data import draw_lengths

    memory = None if options.memory is None else int(options.memory * 2**30)
    trl, verl = (_training(options, trainer, shape, config) for trainer in ("trl", "verl"))
    trl_sizes, verl_sizes = advice.in_both(sizes, trl.checkpointing)
    few = prompts.ids[: max(ADVICE_LIMIT, sizes.prompts_needed)]
    lengths = draw_lengths(samples, len(few) * sizes.group, options.seed or 0)
    found: dict[str, Any] = {
        "settings": {
            "trl": advice.advise_trl(prompts.first(len(few), share=True), lengths, trl_sizes, trl, memory)._asdict(),
            "verl": advice.advise_verl(
                prompts.first(len(few), share=False), lengths, verl_sizes, verl, memory
            )._asdict(),
        }
    }
    if memory is not None:
        training = trl if sizes is trl_sizes else verl
        peaks = advice.peaks_of_one_group(prompts, samples, training)
        found["memory_bytes"] = memory
        found["largest_group"] = {way: advice.largest_group(peak, memory) for way, peak in peaks.items()}
        found["largest_group"]["searched_up_to"] = advice.MOST_ROWS
    return found
