"""What one attention call asks of a backend, and how a backend says that it cannot do it after all."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """What a layer does to its scores.

    Attributes:
        scale: factor of the scores.
        window: tokens of its row that a query sees, itself included; None where a window would hide nothing.
        softcap: scores become ``softcap * tanh(score / softcap)``, after scaling; or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class Request(NamedTuple):
    """What a call needs, as far as it decides which backend can serve it.

    Attributes:
        device: where query, key and value are.
        dtype: their dtype.
        head_dim: ``D`` of query and key.
        value_dim: ``D_v`` of value and output.
        window: sliding window that does hide something, else None.
        softcap: cap of the scores, or None.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None


class CannotRun(RuntimeError):
    """A backend finds during a call that it cannot run it, although it has found nothing against the request.

    The next backend that can then runs the call; the message is counted and logged as the reason.
    """
