"""A CPU as a platform of verl, with the two repairs that verl and torch need there.

verl 0.9.1 knows GPUs and NPUs. Its own hook for others is a `PlatformBase` that is registered under a name:

    VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_on_cpu.platform

verl imports the module at the end of `import verl`, in the driver and, as Ray workers inherit the environment, in each
of its processes. So it imports nothing that verl has not imported by then, but for one small module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch
import verl.utils.distributed
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.plugin.platform import PlatformBase, PlatformRegistry


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a call that only an accelerator needs."""


def zero(*args: Any, **kwargs: Any) -> int:
    """Stand in for a figure of an accelerator's memory."""
    return 0


def make_device_module() -> ModuleType:
    """What verl calls of `torch.cuda`, for a CPU."""
    module = ModuleType("verl_on_cpu.device")
    for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "current_stream", "manual_seed_all"):
        setattr(module, name, nothing)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, zero)
    module.reset_peak_memory_stats = nothing
    module.mem_get_info = lambda *args: (0, 0)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: torch.device("cpu")
    module.get_device_name = lambda *args: "cpu"
    module.manual_seed = torch.manual_seed
    module.get_rng_state = lambda *args: torch.get_rng_state()
    module.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One CPU device in each process; collectives by gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = make_device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # verl places its workers by GPUs; `ray.init(num_gpus=2)` makes as many up as it needs

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def use_gloo_alone() -> None:
    """Make gloo the default: verl asks for `cpu:gloo,<device>:<backend>`, and torch rejects `cpu:gloo,cpu:gloo`."""
    original = verl.utils.distributed.initialize_global_process_group_ray

    @wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "gloo")

    verl.utils.distributed.initialize_global_process_group_ray = initialize


def never_pin_memory() -> None:
    """Ignore `CPUOffloadPolicy(pin_memory=True)`, which verl sets for the reference: pinning needs an accelerator."""

    def initialize(self: CPUOffloadPolicy, pin_memory: bool = True) -> None:
        object.__setattr__(self, "pin_memory", False)  # a frozen dataclass

    CPUOffloadPolicy.__init__ = initialize


use_gloo_alone()
never_pin_memory()
# LoRA adapters start from random numbers, and verl sets no seed for them: without one no two runs are comparable.
torch.manual_seed(0)
