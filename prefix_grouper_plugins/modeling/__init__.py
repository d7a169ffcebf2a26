"""How a transformers model is made to use a layout, and which models can."""

from prefix_grouper_plugins.modeling.anatomy import Anatomy, decoder_of, is_multimodal, row_limit, transformers_model
from prefix_grouper_plugins.modeling.attention import base_implementation
from prefix_grouper_plugins.modeling.enable import (
    disable_prefix_grouper,
    is_enabled,
    why_not_enabled,
    without_prefix_grouper,
)
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.inputs import layout_inputs, packed_inputs, row_positions
from prefix_grouper_plugins.modeling.self_check import SelfCheck, on_all_ranks
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout
from prefix_grouper_plugins.modeling.support.report import (
    SupportReport,
    check_support,
    numbers_padded_columns,
    without_router_loss,
)

__all__ = [
    "Anatomy",
    "SelfCheck",
    "ShardedLayout",
    "SupportReport",
    "UnsupportedModelError",
    "base_implementation",
    "check_support",
    "decoder_of",
    "disable_prefix_grouper",
    "is_enabled",
    "is_multimodal",
    "layout_inputs",
    "numbers_padded_columns",
    "on_all_ranks",
    "packed_inputs",
    "row_limit",
    "row_positions",
    "transformers_model",
    "why_not_enabled",
    "without_prefix_grouper",
    "without_router_loss",
]
