"""Training arguments: the fields that the trainers add to TRL's own."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers.hf_argparser import string_to_bool
from trl import GRPOConfig, RLOOConfig

from prefix_grouper_plugins import settings


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
        super().__post_init__()  # type: ignore[misc]


@dataclass
class PrefixGrouperGRPOConfig(PrefixGrouperArguments, GRPOConfig):
    """:class:`trl.GRPOConfig` with the fields of :class:`PrefixGrouperArguments`."""


@dataclass
class PrefixGrouperRLOOConfig(PrefixGrouperArguments, RLOOConfig):
    """:class:`trl.RLOOConfig` with the fields of :class:`PrefixGrouperArguments`."""
