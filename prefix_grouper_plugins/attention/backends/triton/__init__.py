"""Triton backend: one fused kernel each for the forward, dQ and dK/dV of a prefix forest, with every feature.

FlashAttention-2 (arXiv 2307.08691) over the spans of keys that a block of queries sees (`tables`): K and V of a prefix are
read in place by all of its responses, nothing is masked that need not be, and no ``T x T`` tensor exists. Sums are in
float32 and in one order, so gradients are the same in every run with the same tile sizes (`configs`).

The kernels are imported with the first call, so on a machine without Triton the package works as before.
"""

from __future__ import annotations

import torch

from prefix_grouper_plugins.attention.backends.triton.launches import backward, forward
from prefix_grouper_plugins.attention.device import interpreted, triton_version, why_not_dtype, why_not_triton
from prefix_grouper_plugins.attention.request import Request

__all__ = ["backward", "forward", "why_not"]

# The widest head dim for which there are tiles that do not spill registers.
MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
KERNELS = "the Triton kernels"


def why_not(request: Request) -> str | None:
    """Why this backend cannot serve ``request``, in words; None if it can."""
    if (reason := why_not_dtype(request, KERNELS)) is not None:
        return reason
    head_dim, widest = max(request.head_dim, request.value_dim), MAX_HEAD_DIM[request.dtype]
    if head_dim > widest:
        return f"head dim {head_dim} is above {widest}, the most that the Triton kernels take in {request.dtype}"
    if interpreted() and request.dtype == torch.bfloat16:
        return "Triton's interpreter does not multiply bfloat16 matrices; take float16 or float32"
    return why_not_triton(request.device, KERNELS) or _why_not_compiled(request.device)


def _why_not_compiled(device: torch.device) -> str | None:
    """Triton 3.4 breaks off in its pass TritonGPUHoistTMEMAlloc where it compiles dK and dV for Blackwell; 3.5 does not."""
    if interpreted() or torch.cuda.get_device_capability(device)[0] not in (10, 11) or triton_version() >= (3, 5):
        return None
    version = ".".join(map(str, triton_version()))
    return f"Triton {version} does not compile the kernels for compute capability 10.0 and above: upgrade it to 3.5"
