"""The CUDA driver of `merged_lse` on the CPU, its flash kernels emulated: for dry runs of the GPU scripts, and for host_time.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from prefix_grouper_plugins.attention import api
from prefix_grouper_plugins.attention.backends import merged_lse
from prefix_grouper_plugins.attention.backends.merged_lse import cuda


@contextmanager
def flash_on_cpu(forward: Any = None, backward: Any = None) -> Iterator[None]:
    """Let `merged_lse` take its CUDA path on tensors of the CPU.

    Args:
        forward, backward: the flash ops; by default those by which the tests emulate them, with right results.
    """
    if forward is None:
        from tests.attention.forests import emulated_flash_backward, emulated_flash_forward

        forward, backward = emulated_flash_forward, emulated_flash_backward

    def ops() -> tuple[Any, Any]:  # no mock, whose calls take time
        return forward, backward

    def is_one_causal_call(*arguments: Any) -> bool:  # no tensor is on a CPU, as far as the layer is concerned
        return False

    with (
        mock.patch.object(api, "_is_one_causal_call", is_one_causal_call),
        mock.patch.object(merged_lse, "cpu", cuda),
        mock.patch.object(cuda, "flash_ops", ops),
    ):
        yield
