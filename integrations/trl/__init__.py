"""GRPO and RLOO trainers of TRL that encode every prompt of a micro-batch once."""

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
