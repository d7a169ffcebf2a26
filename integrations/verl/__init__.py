"""An actor backend of verl that encodes every prompt of a micro-batch once: ``model_engine=prefix_grouper``."""

from typing import TYPE_CHECKING

# Sets the hooks up: a config that names a class of this package brings its engine along, even in a process where verl
# was told not to load plugins.
from prefix_grouper_plugins.integrations.verl import plugin  # noqa: F401
from prefix_grouper_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from prefix_grouper_plugins.integrations.verl.config import PrefixGrouperEngineConfig, PrefixGrouperOptions
    from prefix_grouper_plugins.integrations.verl.engine import PrefixGrouperEngine

__all__ = ["PrefixGrouperEngine", "PrefixGrouperEngineConfig", "PrefixGrouperOptions"]

__getattr__ = lazy_names(
    __name__,
    config=["PrefixGrouperEngineConfig", "PrefixGrouperOptions"],
    engine=["PrefixGrouperEngine"],
)
