"""The backends that run inside the custom op, which of them can serve a request, and which one ``auto`` takes.

docs/attention.md has the table of what ``auto`` takes for which layer on which device.
"""

from __future__ import annotations

import os
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from prefix_grouper_plugins.attention.backends import blockwise, flex, merged_lse, triton
from prefix_grouper_plugins.attention.request import CannotRun, Options, Request
from prefix_grouper_plugins.forest import Forest
from prefix_grouper_plugins.metrics import ReasonCounter


class Backend(Protocol):
    """What a backend, a module or a package, offers. Sinks are not its business: the op folds them into ``out`` and ``lse``.

    Queries may be fewer than keys: where the forest's first ``num_given`` tokens are given, query row ``i`` is the token
    at packed position ``num_given + i``.
    """

    def why_not(self, request: Request) -> str | None:
        """Why it cannot serve ``request``, in words; None if it can."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, options: Options
    ) -> tuple[Tensor, Tensor]:
        """``out [Q, H, D_v]`` and ``lse [H, Q]`` of ``query [Q, H, D]``, ``key [T, H_kv, D]``, ``value [T, H_kv, D_v]``.

        Raises:
            CannotRun: found out only now.
        """

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        forest: Forest,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, given the merged ``out`` and ``lse``.

        Raises:
            CannotRun: found out only now.
        """


# In the order in which `auto` asks them; the last one serves every request.
BACKENDS: dict[str, Backend] = {
    "merged_lse": merged_lse,
    "triton": triton,
    "flex": flex,
    "blockwise": blockwise,
}
# What `shared_prefix_attention` takes; the dense oracle does not run inside the op.
BACKEND_NAMES = ("auto", *BACKENDS, "dense")
# Set to a backend's name it wins over what the code asks for, `dense` excepted.
BACKEND_VARIABLE = "PREFIX_GROUPER_BACKEND"
# For each backend the forwards and backwards that it was chosen for and could not run, by reason.
fallbacks: dict[str, ReasonCounter] = {}


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
        check_backend_name("auto")  # and with it the variable
        name = forced
    if name == "auto":
        for name, backend in BACKENDS.items():
            if backend.why_not(request) is None:
                return name
    reason = BACKENDS[name].why_not(request)
    if reason is not None:
        asked = f"{BACKEND_VARIABLE}={name!r}" if forced else f"backend={name!r}"
        raise ValueError(f"{asked} cannot run this call: {reason}; use backend='auto' or 'blockwise'")
    return name


def run(chosen: str, request: Request, direction: Literal["forward", "backward"], *arguments: Any) -> Any:
    """Run the backend that `choose` named; where that one finds that it cannot serve the call, the next one that can.

    Args:
        chosen: by `choose`; request: what it was chosen for.
        direction: which function of the backend; arguments: of that function.
    """
    try:
        return getattr(BACKENDS[chosen], direction)(*arguments)
    except CannotRun as error:
        names = list(BACKENDS)
        behind = names[names.index(chosen) + 1 :]
        instead = next(other for other in behind if BACKENDS[other].why_not(request) is None)
        _count_fallback(chosen, instead, str(error))
    return getattr(BACKENDS[instead], direction)(*arguments)


def _count_fallback(name: str, instead: str, reason: str) -> None:
    if name not in fallbacks:
        fallbacks[name] = ReasonCounter(f"prefix grouper: {name} is not used, layers of this kind run on {instead}: %s")
    fallbacks[name].count(reason)


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
