"""The backends that run inside the custom op, which of them can serve a request, and which one ``auto`` takes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from prefix_grouper_plugins.attention import blockwise, merged_lse
from prefix_grouper_plugins.attention.plan import Forest, Request


class Backend(Protocol):
    """What a backend module offers. Sinks are not its business: the op folds them into ``out`` and ``lse``."""

    def why_not(self, request: Request) -> str | None:
        """Why it cannot serve ``request``, in words; None if it can."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forest: Forest,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """``out [T, H, D_v]`` and ``lse [H, T]``."""

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        forest: Forest,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, given the merged ``out`` and ``lse``."""


# In the order in which `auto` asks them; the last one serves every request.
BACKENDS: dict[str, Backend] = {"merged_lse": merged_lse, "blockwise": blockwise}
# What `shared_prefix_attention` takes; the dense oracle does not run inside the op.
BACKEND_NAMES = ("auto", *BACKENDS, "dense")


def select(name: str, request: Request) -> Backend:
    """The backend called ``name``, or for ``auto`` the first that can serve ``request``.

    Raises:
        ValueError: the backend asked for by name cannot serve the request.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.why_not(request) is None)
    reason = BACKENDS[name].why_not(request)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot run this call: {reason}; use backend='auto' or 'blockwise'")
    return BACKENDS[name]


def available_backends(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    value_dim: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> dict[str, str | None]:
    """For each backend None if it can run such a layer, else the reason why not, in words; in the order of ``auto``.

    Args:
        device: where the layer runs.
        dtype: of query, key and value.
        head_dim: ``D`` of query and key.
        value_dim: ``D_v`` of value, by default ``head_dim``.
        sliding_window: taken to hide something; a window as wide as the longest row is dropped when a call is made.
        softcap: cap of the scores.
    """
    device = torch.device(device)
    value_dim = head_dim if value_dim is None else value_dim
    request = Request(device, dtype, head_dim, value_dim, sliding_window, softcap)
    return {name: backend.why_not(request) for name, backend in BACKENDS.items()}
