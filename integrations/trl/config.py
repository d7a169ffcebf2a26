"""Training arguments: the fields that the trainers add to TRL's own."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig, RLOOConfig

from prefix_grouper_plugins import settings
from prefix_grouper_plugins.integrations.trl.losses import why_rows_depend
from prefix_grouper_plugins.metrics import logger


@dataclass
class PrefixGrouperArguments:
    """Fields for any config of TRL whose trainer samples several completions of each prompt.

    Each field can also be set by the environment variable of its name in capitals (``USE_PREFIX_GROUPER=true``), which
    wins over the code: this is how the launcher hands its command line to an unmodified script.
    """

    use_prefix_grouper: bool | None = settings.USE.field()
    prefix_grouper_backend: str = settings.BACKEND.field()
    prefix_grouper_regroup: str = settings.TRL_REGROUP.field()
    prefix_grouper_rebatch: bool = settings.REBATCH.field()
    prefix_grouper_generation: bool = settings.GENERATION.field()
    prefix_grouper_on_unsupported: str = settings.ON_UNSUPPORTED.field()
    prefix_grouper_self_check: bool = settings.SELF_CHECK.field()

    def __post_init__(self) -> None:
        for name, setting in settings.TRL_OPTIONS.items():
            if (text := os.environ.get(name.upper())) is not None:
                setattr(self, name, string_to_bool(text) if setting.is_switch else text)
            setting.check(getattr(self, name), name)
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
    if (why := why_rows_depend(args)) is not None:
        raise ValueError(
            f"prefix_grouper_rebatch would change the result: {why}. Set per_device_train_batch_size to a multiple of {group} "
            "yourself"
        )
    slices = args.steps_per_generation or accumulation
    if args.generation_batch_size is not None:
        slices = args.generation_batch_size // (rows * int(os.environ.get("WORLD_SIZE", "1")))
    common = math.gcd(accumulation, slices)
    factors = [m for m in range(1, common + 1) if common % m == 0]
    whole = [m for m in factors if (rows * m) % group == 0]
    factor = whole[0] if whole else max((m for m in factors if rows * m <= group), default=1)
    if factor > 1:
        args.rows_before_rebatching = rows  # the trainer knows whether its loss allows this
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
