"""What one attention call asks of a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Request:
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
