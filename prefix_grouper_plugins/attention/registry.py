"""The backends that run inside the custom op, which of them can serve a request, and which one ``auto`` takes.

docs/attention.md has the table of what ``auto`` takes for which layer on which device.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends import blockwise, flex
from prefix_grouper_plugins.attention.backends.merged_lse import cuda as merged_lse
from prefix_grouper_plugins.attention.backends.triton import launches as triton_kernels
from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.forest import Forest


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
BACKENDS: dict[str, Backend] = {
    "merged_lse": merged_lse,
    "triton": triton_kernels,
    "flex": flex,
    "blockwise": blockwise,
}
# What `shared_prefix_attention` takes; the dense oracle does not run inside the op.
BACKEND_NAMES = ("auto", *BACKENDS, "dense")
# Set to a backend's name it wins over what the code asks for, `dense` excepted.
BACKEND_VARIABLE = "PREFIX_GROUPER_BACKEND"


def check_backend_name(name: str) -> None:
    """
    Raises:
        ValueError: there is no backend of that name, or of the name in the environment variable.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend={name!r} is unknown: choose one of {', '.join(BACKEND_NAMES)}")
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced and forced not in ("auto", *BACKENDS):
        raise ValueError(f"{BACKEND_VARIABLE}={forced!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")


def choose(name: str, request: Request) -> str:
    """``name``, or for ``auto`` the first backend that can serve ``request``; the environment variable wins over both.

    Raises:
        ValueError: the backend asked for by name cannot serve the request, or the variable names none.
    """
    forced = os.environ.get(BACKEND_VARIABLE)
    if forced:
        check_backend_name("auto")
        name = forced
    if name == "auto":
        return next(name for name, backend in BACKENDS.items() if backend.why_not(request) is None)
    reason = BACKENDS[name].why_not(request)
    if reason is not None:
        asked = f"{BACKEND_VARIABLE}={name!r}" if forced else f"backend={name!r}"
        raise ValueError(f"{asked} cannot run this call: {reason}; use backend='auto' or 'blockwise'")
    return name


def select(name: str, request: Request) -> Backend:
    """The module of the backend that `choose` names."""
    return BACKENDS[choose(name, request)]


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
    request = _request(device, dtype, head_dim, value_dim, sliding_window, softcap)
    return {name: backend.why_not(request) for name, backend in BACKENDS.items()}


def auto_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    value_dim: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> str:
    """The backend that ``auto`` takes for such a layer, or why the one in the environment variable cannot run it.

    Args:
        device, dtype, head_dim, value_dim, sliding_window, softcap: as in `available_backends`.
    """
    try:
        return choose("auto", _request(device, dtype, head_dim, value_dim, sliding_window, softcap))
    except ValueError as error:
        return f"none: {error}"


def _request(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Request:
    value_dim = head_dim if value_dim is None else value_dim
    return Request(torch.device(device), dtype, head_dim, value_dim, sliding_window, softcap)
