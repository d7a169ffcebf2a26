"""Call a function once a module has been imported, without importing it: the post-import hooks of wrapt.

verl loads our entry point in every process, at the very beginning of ``import verl``. Importing its engines and trainers
there would cost every reward and rollout worker seconds and pull in Megatron where that is installed; instead each hook
waits for the module that it is for. The launcher of TRL scripts waits too, since a script may set environment variables
that torch and transformers read when they are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import wrapt

Callback = Callable[[ModuleType], None]


def after_import(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` as soon as the module ``name`` has been imported, at once if it has been already."""
    wrapt.register_post_import_hook(callback, name)
