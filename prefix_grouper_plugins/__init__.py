"""Forward each prompt of a GRPO group once: the same numbers, less time.

The package knows torch and transformers only; :mod:`prefix_grouper_plugins.integrations` holds what TRL and verl need.
"""

from typing import TYPE_CHECKING

from prefix_grouper_plugins.lazy import lazy_names
from prefix_grouper_plugins.version import __version__

if TYPE_CHECKING:
    from prefix_grouper_plugins.attention import shared_prefix_attention
    from prefix_grouper_plugins.layout import PrefixLayout
    from prefix_grouper_plugins.modeling import (
        UnsupportedModelError,
        check_support,
        disable_prefix_grouper,
    )
    from prefix_grouper_plugins.modeling.self_check import self_check
    from prefix_grouper_plugins.row_sharing import share_rows
    from prefix_grouper_plugins.scoring import prefix_grouped_logps
    from prefix_grouper_plugins.sharing import enable_prefix_grouper

__all__ = [
    "PrefixLayout",
    "UnsupportedModelError",
    "__version__",
    "check_support",
    "disable_prefix_grouper",
    "enable_prefix_grouper",
    "prefix_grouped_logps",
    "self_check",
    "share_rows",
    "shared_prefix_attention",
]

__getattr__ = lazy_names(
    __name__,
    attention=["shared_prefix_attention"],
    layout=["PrefixLayout"],
    modeling=["UnsupportedModelError", "check_support", "disable_prefix_grouper"],
    row_sharing=["share_rows"],
    scoring=["prefix_grouped_logps"],
    sharing=["enable_prefix_grouper"],
    **{"modeling.self_check": ["self_check"]},
)
