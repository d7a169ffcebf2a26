"""Whose code a function is: others may have put their own under the name of a known one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def roots_of(*packages: Any) -> tuple[str, ...]:
    """The folders of imported packages."""
    return tuple(os.path.join(os.path.dirname(str(package.__file__)), "") for package in packages)


def home_of(function: Any, roots: tuple[str, ...]) -> str | None:
    """The module that a function or method was written in, if it and all that it wraps are code in ``roots``; else None."""
    function = getattr(function, "__func__", function)
    while True:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(roots):
            return None
        inner: Callable[..., Any] | None = getattr(function, "__wrapped__", None)
        if inner is None:
            return str(function.__module__)
        function = inner
