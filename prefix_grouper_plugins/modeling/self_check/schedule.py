"""When the option ``verify`` asks for a comparison."""

from __future__ import annotations

from prefix_grouper_plugins.settings import VERIFY


class Schedule:
    """Optimizer steps before which a micro-batch is verified: none, the first that shows something, or every N-th.

    Args:
        value: of the option: ``off``, ``first`` or a number.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, value: object) -> None:
        word = VERIFY.read(value)
        self._every = int(word) if word.isdecimal() else None
        self._waits = word == "first"
        self._seen: int | None = None

    @property
    def is_on(self) -> bool:
        """Whether any step is still to be verified."""
        return self._waits or self._every is not None

    def is_due(self, step: int) -> bool:
        """Whether the optimizer step number ``step``, counted from 0, is verified now; true once for each step."""
        is_new, self._seen = step != self._seen, step
        return is_new and (self._waits if self._every is None else step % self._every == 0)

    def done(self) -> None:
        """A micro-batch has shown what it should."""
        self._waits = False
