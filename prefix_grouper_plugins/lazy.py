"""Names of a package that are imported when they are first asked for (PEP 562).

verl imports our entry point in every one of its processes, most of which never run a model: importing a package must
not import torch and transformers along with it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any


def lazy_names(package: str, **modules: Sequence[str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` for ``package``.

    Args:
        package: ``__name__`` of the package.
        modules: for each of its modules the names that it provides.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
