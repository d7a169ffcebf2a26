"""What runs where: which GPUs and dtypes kernels take, how tables get to a device, and in what dtype sums are kept."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.attention.request import Request
from prefix_grouper_plugins.layout import on_device
from prefix_grouper_plugins.metrics import logger

LOWEST_CAPABILITY = (8, 0)
MAX_FLASH_HEAD_DIM = 256
# Kernels that torch.nn.attention.activate_flash_attention_impl puts in the place of FA2, and the GPUs that they refuse
# all others of, by the major number of the compute capability.
_ACTIVATED = {"FA3": (9,), "FA4": (9, 10)}
# FA4 is made for head dims up to 128 (flash_attn/cute/interface.py); its kernel for 256 on Blackwell hung, or read past its
# tensors, with entries of length 0, which forests can have (Dao-AILab/flash-attention, issue 2562 and pull request 2568).
_ACTIVATED_HEAD_DIM = {"FA4": 128}


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
    return _why_not_capability(torch.cuda.get_device_capability(device), kernels)


def _why_not_capability(capability: tuple[int, int], kernels: str) -> str | None:
    if capability < LOWEST_CAPABILITY:
        lowest, found = (f"{major}.{minor}" for major, minor in (LOWEST_CAPABILITY, capability))
        return f"{kernels} need compute capability {lowest}, this GPU has {found}"
    return None


def why_not_flash(device: torch.device, head_dim: int) -> str | None:
    """Why the CUDA flash ops of torch cannot run heads of ``head_dim`` on the GPU ``device``; None if they can.

    Args:
        device: of type cuda.
        head_dim: that the kernels see, a multiple of 8.
    """
    # Asked for each layer, forward and backward, and asking the driver takes microseconds. "cuda" is whichever is current.
    answer = _why_not_flash.__wrapped__ if device.index is None else _why_not_flash
    return answer(device, head_dim, activated_flash())


@lru_cache
def _why_not_flash(device: torch.device, head_dim: int, activated: str | None) -> str | None:
    if head_dim > MAX_FLASH_HEAD_DIM:
        return f"head dim {head_dim} is above {MAX_FLASH_HEAD_DIM}, the most that the CUDA flash ops take"
    if not torch.cuda.is_available() or not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no CUDA flash attention"
    capability = torch.cuda.get_device_capability(device)
    if (reason := _why_not_capability(capability, "the CUDA flash ops")) is not None:
        return reason
    found = f"{capability[0]}.{capability[1]}"
    majors = _ACTIVATED.get(activated or "", (capability[0],))
    if capability[0] not in majors:
        needed = " or ".join(f"{major}.x" for major in majors)
        return f"{activated} is activated and needs compute capability {needed}, this GPU has {found}"
    widest = _ACTIVATED_HEAD_DIM.get(activated or "", MAX_FLASH_HEAD_DIM)
    if head_dim > widest:
        return f"{activated} is activated and is used for head dims up to {widest}, not for {head_dim}"
    if head_dim > 192 and (capability in ((8, 6), (8, 9)) or capability[0] == 12):
        return f"flash backward with head dim {head_dim} does not fit compute capability {found}"
    return None


def activated_flash() -> str | None:
    """``"FA3"`` or ``"FA4"`` where `torch.nn.attention.activate_flash_attention_impl` (torch 2.10) has put one in place."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on any device: for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device, kernels: str) -> str | None:
    """Why ``kernels`` written in Triton (their name in the plural) cannot run on ``device``; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if interpreted() else why_not_gpu(device, kernels) or _why_not_started()


@lru_cache
def triton_version() -> tuple[int, ...]:
    """Major and minor, of the module: it may have been built under another name than its package on PyPI."""
    import triton

    return tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


@lru_cache  # so it is said once
def _why_not_started() -> str | None:
    """Triton builds the library by which it talks to the driver when it is first asked: many containers have no compiler."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018 - builds it, or finds it in Triton's cache
    except Exception as error:  # RuntimeError without a compiler, CalledProcessError without Python.h, ...
        remedy = _remedy()
        reason = f"Triton does not start on this machine ({type(error).__name__}: {str(error).partition(chr(10))[0]}){remedy}"
        logger.warning("prefix grouper: %s. Layers that need its kernels run on slower ones", reason)
        return reason
    return None


def _remedy() -> str:
    """What Triton lacks to build its library; empty where it has all of that."""
    named = os.environ.get("CC")
    if not (shutil.which("gcc") or shutil.which("clang") if named is None else shutil.which(named)):
        there = "" if named is None else f", and CC={named!r} is none"
        return f"; it needs a C compiler{there}: install one (apt-get install gcc), or set CC to where one is"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "; it needs Python.h: install the headers of this Python (apt-get install python3-dev)"
    return ""


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """``table`` on ``device`` without waiting for it: whoever keeps it, keeps it by `stream_of` too, see `on_device`."""
    return on_device(torch.from_numpy(table), device)


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU; 0 for other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with a dense last dimension; other strides are the kernels' business."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of softmax statistics, partial outputs and gradient sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``. Asking costs a tenth of calling ``to``, which is what matters where nothing is to be done."""
    return x if x.dtype == dtype else x.to(dtype)
