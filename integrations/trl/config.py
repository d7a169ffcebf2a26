"""Training arguments: the fields that the trainers add to TRL's own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig, RLOOConfig

from prefix_grouper_plugins.attention.registry import BACKENDS
from prefix_grouper_plugins.integrations.trl.options import SWITCHES
from prefix_grouper_plugins.integrations.trl.regroup import rows_mix_freely
from prefix_grouper_plugins.metrics import logger

REGROUP = ("exact", "group", "none")
ON_UNSUPPORTED = ("error", "fallback")


@dataclass
class PrefixGrouperArguments:
    """Fields for any config of TRL whose trainer samples several completions of each prompt.

    Each field can also be set by the environment variable of its name in capitals (``USE_PREFIX_GROUPER=true``), which
    wins over the code: this is how the launcher hands its command line to an unmodified script.
    """

    use_prefix_grouper: bool | None = field(
        default=None,
        metadata={
            "help": "Encode the prompt of a group once instead of once for each completion. Same numbers, less time "
            "and memory. On by default in this config; the stock trainer's path is taken when off."
        },
    )
    prefix_grouper_backend: str = field(
        default="auto",
        metadata={
            "help": "Attention backend of packed forwards. 'auto' takes the fastest one that each layer can use.",
            "choices": ["auto", *BACKENDS],
        },
    )
    prefix_grouper_regroup: str = field(
        default="exact",
        metadata={
            "help": "How rows of one prompt, which TRL shuffles over the micro-batches of a generation batch, are "
            "brought together again. 'exact' moves rows only among the micro-batches of one optimizer step, and only "
            "where the loss does not depend on which rows stand together; 'group' brings every group together, so a "
            "row may move to another optimizer step of the same generation batch; 'none' leaves the shuffle alone.",
            "choices": list(REGROUP),
        },
    )
    prefix_grouper_rebatch: bool = field(
        default=False,
        metadata={
            "help": "When per_device_train_batch_size is smaller than num_generations, make micro-batches larger and "
            "gradient_accumulation_steps smaller by the same factor, so that whole groups fit in one. The optimization "
            "is the same; memory per step is that of the larger micro-batch with its prompts shared."
        },
    )
    prefix_grouper_on_unsupported: str = field(
        default="error",
        metadata={
            "help": "What to do with a model or setting that cannot be shared exactly: 'error' stops before training "
            "and says why; 'fallback' trains on the stock path, says why and counts it.",
            "choices": list(ON_UNSUPPORTED),
        },
    )

    prefix_grouper_self_check: bool = field(
        default=True,
        metadata={
            "help": "Before training, compare a tiny packed forward and backward of the model with forwards of its rows; "
            "a model that fails is unsupported. Without it, model types that no test has compared are refused."
        },
    )

    def __post_init__(self) -> None:
        for option in fields(PrefixGrouperArguments):
            if (text := os.environ.get(option.name.upper())) is not None:
                setattr(self, option.name, string_to_bool(text) if option.name in SWITCHES else text)
            choices = option.metadata.get("choices")
            if choices and getattr(self, option.name) not in choices:
                raise ValueError(f"{option.name} is {getattr(self, option.name)!r}: choose one of {', '.join(choices)}")
        if self.use_prefix_grouper is None:
            self.use_prefix_grouper = True
        if self.use_prefix_grouper and self.prefix_grouper_rebatch:
            _rebatch(self)
        super().__post_init__()  # type: ignore[misc]


def _rebatch(args: Any) -> None:
    """Trade accumulation steps for rows in a micro-batch, ``bs * m, ga / m, spg / m``, until a group fits.

    The rows of every optimizer step stay the same, since TRL cuts a generation batch into consecutive slices.
    """
    rows, group, accumulation = args.per_device_train_batch_size, args.num_generations, args.gradient_accumulation_steps
    if rows % group == 0:
        return
    if not rows_mix_freely(args):
        raise ValueError(
            "prefix_grouper_rebatch would change the result: with this loss the rows of a micro-batch depend on each "
            f"other (loss_type={args.loss_type!r}). Set per_device_train_batch_size to a multiple of {group} yourself"
        )
    slices = args.steps_per_generation or accumulation
    if args.generation_batch_size is not None:
        slices = args.generation_batch_size // (rows * int(os.environ.get("WORLD_SIZE", "1")))
    common = math.gcd(accumulation, slices)
    factors = [m for m in range(1, common + 1) if common % m == 0]
    whole = [m for m in factors if (rows * m) % group == 0]
    factor = whole[0] if whole else max((m for m in factors if rows * m <= group), default=1)
    args.per_device_train_batch_size = rows * factor
    args.gradient_accumulation_steps = accumulation // factor
    if args.steps_per_generation is not None:
        args.steps_per_generation //= factor
    logger.warning(
        "prefix_grouper_rebatch: per_device_train_batch_size %d -> %d, gradient_accumulation_steps %d -> %d, so that "
        "%d of the %d rows of a group stand in one micro-batch",
        rows, rows * factor, accumulation, accumulation // factor, min(rows * factor, group), group,
    )  # fmt: skip


@dataclass
class PrefixGrouperGRPOConfig(PrefixGrouperArguments, GRPOConfig):
    """:class:`trl.GRPOConfig` with the fields of :class:`PrefixGrouperArguments`."""


@dataclass
class PrefixGrouperRLOOConfig(PrefixGrouperArguments, RLOOConfig):
    """:class:`trl.RLOOConfig` with the fields of :class:`PrefixGrouperArguments`."""
