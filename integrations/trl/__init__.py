"""GRPO and RLOO trainers of TRL that encode every prompt of a micro-batch once."""

from typing import TYPE_CHECKING

from prefix_grouper_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperGRPOConfig, PrefixGrouperRLOOConfig
    from prefix_grouper_plugins.integrations.trl.trainer import (
        PrefixGrouperGRPOTrainer,
        PrefixGrouperMixin,
        PrefixGrouperRLOOTrainer,
    )

__all__ = [
    "PrefixGrouperGRPOConfig",
    "PrefixGrouperGRPOTrainer",
    "PrefixGrouperMixin",
    "PrefixGrouperRLOOConfig",
    "PrefixGrouperRLOOTrainer",
]

__getattr__ = lazy_names(
    __name__,
    config=["PrefixGrouperGRPOConfig", "PrefixGrouperRLOOConfig"],
    trainer=["PrefixGrouperGRPOTrainer", "PrefixGrouperMixin", "PrefixGrouperRLOOTrainer"],
)
