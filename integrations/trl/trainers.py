"""The trainers and configs of TRL that share rows, one pair for each algorithm whose rows begin alike.

Each class is TRL's own with :class:`.rows_trainer.ShareRowsMixin` or :class:`.config.ShareRowsArguments` in front, and is made
when it is first asked for: TRL imports its trainers lazily, too, and warns when an experimental one is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from prefix_grouper_plugins.integrations.trl.algorithms import ALGORITHMS, modules_of
from prefix_grouper_plugins.integrations.trl.config import SampledRowsArguments, ShareRowsArguments
from prefix_grouper_plugins.integrations.trl.rows_trainer import ShareRowsMixin

NAMES = [f"PrefixGrouper{algorithm}{kind}" for algorithm in ALGORITHMS for kind in ("Trainer", "Config")]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    algorithm, kind = _parts(name)
    return shared_class(name, _stock(algorithm, kind))


def shared_class(name: str, stock: type) -> type:
    """Our class called ``name``, made of TRL's ``stock``.

    Each is made once. TRL 0.29 has two classes for KTO, of which one derives from the other: the launcher hands over the first
    that TRL defines, before TRL has defined the second.
    """
    if name in globals():
        return globals()[name]  # type: ignore[no-any-return]
    algorithm, kind = _parts(name)
    if kind == "Config":
        arguments = SampledRowsArguments if ALGORITHMS[algorithm].samples else ShareRowsArguments
        made: type = dataclass(_subclass(name, arguments, stock, {}))
    else:
        made = _subclass(name, ShareRowsMixin, stock, {"rows_in_common": ALGORITHMS[algorithm].rows_in_common})
    globals()[name] = made
    return made


def _parts(name: str) -> tuple[str, str]:
    """``"PrefixGrouperDPOConfig"`` as ``("DPO", "Config")``."""
    kind = "Trainer" if name.endswith("Trainer") else "Config"
    return name.removeprefix("PrefixGrouper").removesuffix(kind), kind


def _stock(algorithm: str, kind: str) -> type:
    """TRL's own class.

    Raises:
        ImportError: the installed TRL has none.
    """
    for module in modules_of(algorithm, kind):
        try:
            return getattr(importlib.import_module(module), f"{algorithm}{kind}")  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):  # something that TRL's module needs is missing
                raise
    raise ImportError(f"the installed TRL has no {algorithm}{kind}: upgrade trl")


def _subclass(name: str, mixin: type, stock: type, attributes: dict[str, Any]) -> type:
    doc = f":class:`{stock.__module__}.{stock.__name__}` with :class:`{mixin.__module__}.{mixin.__name__}` in front."
    return type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name, "__doc__": doc, **attributes})
