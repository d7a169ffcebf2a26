"""What runs where: which GPUs and dtypes kernels take, how tables get to a device, and in what dtype sums are kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.request import Request

LOWEST_CAPABILITY = (8, 0)


def why_not_dtype(request: Request, kernels: str) -> str | None:
    """Why ``kernels`` of Triton (their name in the plural) cannot compute in the request's dtype; None if they can."""
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{kernels} take float16, bfloat16 and float32, not {request.dtype}"
    return None


def why_not_gpu(device: torch.device, kernels: str) -> str | None:
    """Why ``kernels`` of Triton (their name in the plural) cannot run on ``device``; None if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{kernels} need an NVIDIA CUDA device, not {'ROCm' if device.type == 'cuda' else device.type}"
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    return why_not_capability(torch.cuda.get_device_capability(device), kernels)


def why_not_capability(capability: tuple[int, int], kernels: str) -> str | None:
    """Why ``kernels`` (their name in the plural) cannot run on a GPU of this compute capability; None if they can."""
    if capability < LOWEST_CAPABILITY:
        lowest, found = (f"{major}.{minor}" for major, minor in (LOWEST_CAPABILITY, capability))
        return f"{kernels} need compute capability {lowest}, this GPU has {found}"
    return None


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """``table`` on ``device`` without waiting for it.

    A plain copy to a GPU waits until the GPU has done all that was asked of it, here once for each new layout; one from
    pinned memory is queued behind it. So the copy is ordered with the current stream alone: whoever keeps it, keeps it
    by `stream_of` too.
    """
    tensor = torch.from_numpy(table)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU; 0 for other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of softmax statistics, partial outputs and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32
