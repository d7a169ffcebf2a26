"""The kernels have a first derivative only. Whoever asks for a second one gets an error that says what to do."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    """The derivative of a kernel's gradients.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "shared_prefix_attention has a first derivative only: take backend='dense' for double backward, or leave "
        "create_graph=True out"
    )


class _Gradient(torch.autograd.Function):
    """A gradient as it is, whose own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(no_second_derivative)


def first_derivative_only(gradients: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> Any:
    """A hook for the node of a kernel that torch differentiates: torch's own error would not name the remedy.

    Args:
        gradients: of the kernel's inputs. They have a graph of their own under ``create_graph=True`` only.
    """
    if not torch.is_grad_enabled():
        return None
    return tuple(None if gradient is None else _Gradient.apply(gradient) for gradient in gradients)
