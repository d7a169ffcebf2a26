"""Call a function once a module has been imported, without importing it.

verl loads our entry point in every process, at the very beginning of ``import verl``. Importing its engines and trainers
there would cost every reward and rollout worker seconds and pull in Megatron where that is installed; instead each hook
waits for the module that it is for. The launcher of TRL scripts waits so too, since a script may set environment
variables that torch and transformers read when they are imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def after_import(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` as soon as the module ``name`` has been imported, at once if it has been already."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    _WATCHED.setdefault(name, []).append(callback)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find a watched module, and wraps its loader."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _WATCHED or name in self._asking:
            return None
        self._asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The loader of a watched module, which calls the hooks in the end; it goes when the module takes over."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # `get_code` of `python -m`, `get_data`, and the like

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for callback in _WATCHED.pop(module.__name__, []):
            callback(module)


_WATCHED: dict[str, list[Callback]] = {}
_FINDER = _Finder()
