"""What this package logs, for tests in processes that have no fixtures of pytest. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def messages() -> Iterator[list[str]]:
    """What is logged in here, from INFO on."""
    logger, handler = logging.getLogger("prefix_grouper_plugins"), logging.Handler()
    found: list[str] = []
    level = logger.level
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
