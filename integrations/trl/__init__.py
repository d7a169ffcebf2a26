"""Trainers of TRL that forward what the rows of a micro-batch begin alike with once."""

from typing import TYPE_CHECKING

from prefix_grouper_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from prefix_grouper_plugins.integrations.trl.async_grpo import PrefixGrouperAsyncGRPOTrainer
    from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperGRPOConfig, PrefixGrouperRLOOConfig
    from prefix_grouper_plugins.integrations.trl.rows_trainer import ShareRowsMixin
    from prefix_grouper_plugins.integrations.trl.trainer import (
        PrefixGrouperGRPOTrainer,
        PrefixGrouperMixin,
        PrefixGrouperRLOOTrainer,
    )
    from prefix_grouper_plugins.integrations.trl.trainers import (
        PrefixGrouperCPOConfig,
        PrefixGrouperCPOTrainer,
        PrefixGrouperDPOConfig,
        PrefixGrouperDPOTrainer,
        PrefixGrouperKTOConfig,
        PrefixGrouperKTOTrainer,
        PrefixGrouperOnlineDPOConfig,
        PrefixGrouperOnlineDPOTrainer,
        PrefixGrouperORPOConfig,
        PrefixGrouperORPOTrainer,
        PrefixGrouperRewardConfig,
        PrefixGrouperRewardTrainer,
        PrefixGrouperSDFTConfig,
        PrefixGrouperSDFTTrainer,
        PrefixGrouperSDPOConfig,
        PrefixGrouperSDPOTrainer,
        PrefixGrouperTPOConfig,
        PrefixGrouperTPOTrainer,
    )

__all__ = [
    "PrefixGrouperAsyncGRPOTrainer",
    "PrefixGrouperCPOConfig",
    "PrefixGrouperCPOTrainer",
    "PrefixGrouperDPOConfig",
    "PrefixGrouperDPOTrainer",
    "PrefixGrouperGRPOConfig",
    "PrefixGrouperGRPOTrainer",
    "PrefixGrouperKTOConfig",
    "PrefixGrouperKTOTrainer",
    "PrefixGrouperMixin",
    "PrefixGrouperORPOConfig",
    "PrefixGrouperORPOTrainer",
    "PrefixGrouperOnlineDPOConfig",
    "PrefixGrouperOnlineDPOTrainer",
    "PrefixGrouperRLOOConfig",
    "PrefixGrouperRLOOTrainer",
    "PrefixGrouperRewardConfig",
    "PrefixGrouperRewardTrainer",
    "PrefixGrouperSDFTConfig",
    "PrefixGrouperSDFTTrainer",
    "PrefixGrouperSDPOConfig",
    "PrefixGrouperSDPOTrainer",
    "PrefixGrouperTPOConfig",
    "PrefixGrouperTPOTrainer",
    "ShareRowsMixin",
]

__getattr__ = lazy_names(
    __name__,
    async_grpo=["PrefixGrouperAsyncGRPOTrainer"],
    config=["PrefixGrouperGRPOConfig", "PrefixGrouperRLOOConfig"],
    rows_trainer=["ShareRowsMixin"],
    trainer=["PrefixGrouperGRPOTrainer", "PrefixGrouperMixin", "PrefixGrouperRLOOTrainer"],
    trainers=[
        "PrefixGrouperCPOConfig",
        "PrefixGrouperCPOTrainer",
        "PrefixGrouperDPOConfig",
        "PrefixGrouperDPOTrainer",
        "PrefixGrouperKTOConfig",
        "PrefixGrouperKTOTrainer",
        "PrefixGrouperOnlineDPOConfig",
        "PrefixGrouperOnlineDPOTrainer",
        "PrefixGrouperORPOConfig",
        "PrefixGrouperORPOTrainer",
        "PrefixGrouperRewardConfig",
        "PrefixGrouperRewardTrainer",
        "PrefixGrouperSDFTConfig",
        "PrefixGrouperSDFTTrainer",
        "PrefixGrouperSDPOConfig",
        "PrefixGrouperSDPOTrainer",
        "PrefixGrouperTPOConfig",
        "PrefixGrouperTPOTrainer",
    ],
)
