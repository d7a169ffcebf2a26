"""Running a model without leaving a trace, and with its rounding made visible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(base: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode; afterwards modes, buffers and random states are what they were."""
    modes = [(module, module.training) for module in base.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in base.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = [device] if device.type == "cuda" else []
    try:
        for module, _ in modes:
            module.training = False  # `eval()` may be overridden with something that merges weights
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer.copy_(content)


@contextmanager
def rounding(base: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Move the outputs of the innermost modules and of the layers by up to half a unit in the last place."""
    layers = {id(child) for m in base.modules() if isinstance(m, nn.ModuleList) for child in m}
    # Norms, rotary angles and recurrent kernels of transformers compute in float32 in a float64 model too.
    half_unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) / 2

    def move(output: Tensor) -> Tensor:
        return output * (1 + half_unit * (2 * torch.rand_like(output) - 1))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point():
            return move(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].is_floating_point():
            return (move(output[0]), *output[1:])
        return output

    with ExitStack() as hooks:
        for module in base.modules():
            if id(module) in layers or next(module.children(), None) is None:
                hooks.callback(module.register_forward_hook(hook).remove)
        yield
