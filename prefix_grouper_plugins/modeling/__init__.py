"""How a transformers model is made to use a layout, and which models can."""

from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.interface import (
    base_implementation,
    disable_prefix_grouper,
    enable_prefix_grouper,
    is_enabled,
    layout_inputs,
    packed_inputs,
    without_prefix_grouper,
)
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout
from prefix_grouper_plugins.modeling.support import (
    SupportReport,
    check_support,
    numbers_padded_columns,
    transformers_model,
)

__all__ = [
    "ShardedLayout",
    "SupportReport",
    "UnsupportedModelError",
    "base_implementation",
    "check_support",
    "disable_prefix_grouper",
    "enable_prefix_grouper",
    "is_enabled",
    "layout_inputs",
    "numbers_padded_columns",
    "packed_inputs",
    "transformers_model",
    "without_prefix_grouper",
]
