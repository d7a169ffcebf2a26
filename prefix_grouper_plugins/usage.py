"""Mistakes on a command line: one line on stderr, and exit status 2 as argparse has it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(SystemExit):
    """
    Args:
        message: one line that names the value and the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 2  # the interpreter prints a code only where it is text


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print the message of a `UsageError` that leaves the block."""
    try:
        yield
    except UsageError as error:
        print(error, file=sys.stderr)
        raise


def first_line(error: Exception) -> str:
    """Of the message of ``error``, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
