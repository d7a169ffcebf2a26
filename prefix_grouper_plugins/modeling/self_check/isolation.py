"""Running a model without leaving a trace, without dropout, and with its rounding made visible."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_SIMPLE = (bool, int, float, str, Tensor, RemovableHandle, type(None))
_CONTAINERS = (list, dict, set, deque)
_INTERNAL = frozenset(vars(nn.Module()))  # what torch keeps in any module
_HOOKS = [name for name, value in vars(nn.Module()).items() if name.endswith("hooks") and isinstance(value, dict)]


@contextmanager
def untouched(base: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards modes, buffers, plain attributes of modules (counters, kept states) and random states are as before.

    Hooks that have come since go, together with the attributes that may say so: a first forward of transformers puts hooks on
    that record hidden states, and a note on the model that they are there.

    Hooks on the gradients of weights are not called meanwhile: what they do (clip, say) to that of each backward need not be
    the same for packed rows as for rows one by one.
    """
    modules = list(base.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    # FSDP1's wrappers note at the first forward which of them is the root, and keep that.
    plain = [module for module in modules if not isinstance(module, FullyShardedDataParallel)]
    attributes = [plain_attributes(module) for module in plain]
    hooks = [{name: set(vars(module)[name]) for name in _HOOKS if name in vars(module)} for module in plain]
    weights = {weight: weight._backward_hooks for weight in base.parameters() if weight._backward_hooks}
    devices = [device] if device.type == "cuda" else []
    try:
        for weight in weights:
            weight._backward_hooks = None
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for weight, gradient_hooks in weights.items():
            weight._backward_hooks = gradient_hooks
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, values, known in zip(plain, attributes, hooks, strict=True):
            restore_attributes(module, values)
            _remove_hooks_but(known, module)
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, content):  # a write, even of the same, spoils the graph of an open prompt
                    buffer.copy_(content)
        # Weights that autocast has cast under `no_grad` would be used again, without a gradient, by forwards that follow.
        torch.clear_autocast_cache()


def _remove_hooks_but(known: Mapping[str, set[int]], module: nn.Module) -> None:
    """Remove the hooks of ``module`` whose keys are not among those ``known`` by the names of torch's dictionaries."""
    for name, keys in known.items():
        hooks = vars(module)[name]
        for key in hooks.keys() - keys:
            del hooks[key]


def plain_attributes(module: Any) -> dict[str, Any]:
    """What a call could leave in ``module`` besides buffers: numbers, tensors, and copies of its containers."""
    plain = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    kept = {name: value for name, value in plain.items() if isinstance(value, _SIMPLE)}
    return kept | {name: value.copy() for name, value in plain.items() if type(value) in _CONTAINERS}


def restore_attributes(module: Any, before: dict[str, Any]) -> None:
    """Put back what :func:`plain_attributes` has found; what has come since goes."""
    own = vars(module)
    for name in [name for name in own if name not in _INTERNAL and name not in before]:
        if isinstance(own[name], _SIMPLE) or type(own[name]) in _CONTAINERS:
            del own[name]
    for name, value in before.items():
        now: Any = own.get(name)
        if type(value) in _CONTAINERS and type(now) is type(value):  # others may hold the same object
            now.clear()
            now.update(value) if isinstance(now, (dict, set)) else now.extend(value)
        else:
            own[name] = value


@contextmanager
def mode(base: nn.Module, training: bool) -> Iterator[None]:
    """Every module in training or evaluation mode, without checkpointing and without dropout.

    Modes are set one by one: ``train`` and ``eval`` may be overridden with something that merges weights. What overrides
    them keeps its mode. Dropout is switched off past the modules too, so that everything else that runs in training
    only is compared.
    """
    for module in _following(base):
        module.training = training and not isinstance(module, _DropoutNd)
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False) is True:  # reentrant ones know no torch.autograd.grad
            module.gradient_checkpointing = False  # type: ignore[assignment]
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in base.modules())
    with ExitStack() as stack:
        if training and not compiled:
            stack.enter_context(without_dropout())
        for module in base.modules():
            for name in _DRAWN_RATES:
                rates = vars(module).get(name)
                if isinstance(rates, dict):
                    stack.callback(rates.update, dict(rates))
                    rates.update(dict.fromkeys(rates, 0.0))
        yield


def _following(module: nn.Module, root: bool = True) -> Iterator[nn.Module]:
    """The modules that do what :meth:`nn.Module.train` says."""
    if not root and type(module).train not in (nn.Module.train, PreTrainedModel.train):
        return
    yield module
    for child in module.children():
        yield from _following(child, root=False)


_DRAWN_RATES = ("module_dropout", "rank_dropout")  # PEFT's LyCORIS adapters draw for these themselves
_DROPOUTS = {F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout}


_BACKWARD = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


class without_dropout(TorchFunctionMode):
    """A context in which dropout returns its input, whether a module applies it or a function."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _DROPOUTS:
            return _its_input(*args, **keywords)
        if func in _BACKWARD:  # in which checkpointed layers run again, and no function mode is on
            with _functions_without_dropout():
                return func(*args, **keywords)
        if func is F.scaled_dot_product_attention:
            keywords.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **keywords)


def _its_input(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # as torch names it
    return input


@contextmanager
def _functions_without_dropout() -> Iterator[None]:
    """In here the functions themselves are exchanged, for all threads."""
    with ExitStack() as stack:
        for module in (F, torch):
            for name, function in [(name, value) for name, value in vars(module).items() if callable(value)]:
                if any(function is dropout for dropout in _DROPOUTS):
                    stack.callback(setattr, module, name, function)
                    setattr(module, name, _its_input)
        yield


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
