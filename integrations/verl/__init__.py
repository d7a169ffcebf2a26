"""A backend for verl's actor, reference policy and critic that encodes every prompt of a micro-batch once:
``model_engine=prefix_grouper``."""

import importlib
from typing import TYPE_CHECKING, Any

# Sets the hooks up: a config that names a class of this package brings its engine along, even in a process where verl
# was told not to load plugins.
from prefix_grouper_plugins.integrations.verl import plugin  # noqa: F401
from prefix_grouper_plugins.lazy import lazy_names

if TYPE_CHECKING:
    from prefix_grouper_plugins.integrations.verl.config import PrefixGrouperEngineConfig, PrefixGrouperOptions
    from prefix_grouper_plugins.integrations.verl.engine import PrefixGrouperEngine
    from prefix_grouper_plugins.integrations.verl.value_engine import PrefixGrouperValueEngine

__all__ = ["PrefixGrouperEngine", "PrefixGrouperEngineConfig", "PrefixGrouperOptions", "PrefixGrouperValueEngine"]

_lazy = lazy_names(
    __name__,
    config=["PrefixGrouperEngineConfig", "PrefixGrouperOptions"],
    engine=["PrefixGrouperEngine"],
    value_engine=["PrefixGrouperValueEngine"],
)


def __getattr__(name: str) -> Any:
    if name in ("PrefixGrouperEngine", "PrefixGrouperValueEngine"):
        # verl's engine comes first: the hook that waits for it imports ours, which must not be half imported by then.
        importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    return _lazy(name)
