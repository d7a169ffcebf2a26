"""What kernels ask of a GPU and of a dtype, for backends to say why they cannot run."""

from __future__ import annotations

import torch

from prefix_grouper_plugins.attention.plan import Request

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
