"""How a transformers model is made to use a layout, and which models can."""

from prefix_grouper_plugins.modeling.enable import awaits_proof, enable_prefix_grouper, refutation, settle
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.interface import (
    base_implementation,
    disable_prefix_grouper,
    is_enabled,
    layout_inputs,
    packed_inputs,
    row_positions,
    without_prefix_grouper,
)
from prefix_grouper_plugins.modeling.proof import Proof, agreed, prove
from prefix_grouper_plugins.modeling.rope import row_limit
from prefix_grouper_plugins.modeling.sequence_parallel import ShardedLayout
from prefix_grouper_plugins.modeling.support import (
    SupportReport,
    check_support,
    numbers_padded_columns,
    transformers_model,
    without_router_loss,
)

__all__ = [
    "Proof",
    "ShardedLayout",
    "SupportReport",
    "UnsupportedModelError",
    "agreed",
    "awaits_proof",
    "base_implementation",
    "check_support",
    "disable_prefix_grouper",
    "enable_prefix_grouper",
    "is_enabled",
    "layout_inputs",
    "numbers_padded_columns",
    "packed_inputs",
    "prove",
    "refutation",
    "row_limit",
    "row_positions",
    "settle",
    "transformers_model",
    "without_prefix_grouper",
    "without_router_loss",
]
