"""Training arguments: the fields that the trainers add to TRL's own."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig, RLOOConfig

from prefix_grouper_plugins import settings
from prefix_grouper_plugins.metrics import logger


@dataclass
class PrefixGrouperArguments:
    """Fields for any config of TRL whose trainer samples several completions of each prompt.

    Each field can also be set by the environment variable of its name in capitals (``USE_PREFIX_GROUPER=true``), which
    wins over the code: this is how the launcher hands its command line to an unmodified script.
    """

    use_prefix_grouper: bool | None = settings.USE.field()
    prefix_grouper_share: str = settings.SHARE.field()
    prefix_grouper_backend: str = settings.BACKEND.field()
    prefix_grouper_regroup: str = settings.TRL_REGROUP.field()
    prefix_grouper_max_tokens: str = settings.MAX_TOKENS.field()
    prefix_grouper_generation: bool = settings.GENERATION.field()
    prefix_grouper_on_unsupported: str = settings.ON_UNSUPPORTED.field()
    prefix_grouper_self_check: bool = settings.SELF_CHECK.field()
    prefix_grouper_verify: str = settings.VERIFY.field()

    def __post_init__(self) -> None:
        _resolve(self)
        self.prefix_grouper_max_tokens = settings.MAX_TOKENS.read(
            self.prefix_grouper_max_tokens, "prefix_grouper_max_tokens"
        )
        self.prefix_grouper_verify = settings.VERIFY.read(self.prefix_grouper_verify)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class ShareRowsArguments:
    """Fields for the config of any other trainer of TRL, whose rows stay where TRL puts them.

    They are those of :class:`PrefixGrouperArguments` that do not concern groups of sampled completions, and are set in the
    same ways. Trainers that sample have :class:`SampledRowsArguments`.
    """

    use_prefix_grouper: bool | None = settings.USE.field()
    prefix_grouper_share: str = settings.SHARE.field()
    prefix_grouper_backend: str = settings.BACKEND.field()
    prefix_grouper_on_unsupported: str = settings.ON_UNSUPPORTED.field()
    prefix_grouper_self_check: bool = settings.SELF_CHECK.field()

    def __post_init__(self) -> None:
        _resolve(self)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class SampledRowsArguments(ShareRowsArguments):
    """Fields for the config of such a trainer that samples several completions of each prompt."""

    prefix_grouper_generation: bool = settings.GENERATION.field()


def _resolve(config: Any) -> None:
    """Read the environment, and check the values."""
    for slip in settings.misspelt_variables(os.environ):
        logger.warning("prefix grouper: %s", slip)
    fields = {field.name for field in dataclasses.fields(config)}
    for name, setting in settings.TRL_OPTIONS.items():
        text = os.environ.get(name.upper())
        if name not in fields:
            if text is not None:
                logger.warning("prefix grouper: %s has no effect on %s, which has no such setting", name, _kind(config))
            continue
        if text is not None:
            setattr(config, name, string_to_bool(text) if setting.is_switch else text)
        setting.check(getattr(config, name), name)
    if config.use_prefix_grouper is None:
        config.use_prefix_grouper = True


def _kind(config: Any) -> str:
    return type(config).__name__.removesuffix("Config").removeprefix("PrefixGrouper")


@dataclass
class PrefixGrouperGRPOConfig(PrefixGrouperArguments, GRPOConfig):
    """:class:`trl.GRPOConfig` with the fields of :class:`PrefixGrouperArguments`."""


@dataclass
class PrefixGrouperRLOOConfig(PrefixGrouperArguments, RLOOConfig):
    """:class:`trl.RLOOConfig` with the fields of :class:`PrefixGrouperArguments`."""
