"""What the results of a forward depend on besides its inputs: results that are kept must not outlive it.

Micro-batches of one optimizer step may share forwards (:mod:`.scores_ahead`, :mod:`.prompt_reuse`). That is exact as long as
each of them would have run the same model. A callback, a hook or an optimizer that steps within the backward may have
changed it in between: then later micro-batches would get the results of another model, and the backward would meet other
weights than the forward did.

Weights are compared by identity, by the version that autograd counts, and by a sum over their bits, since changes through
``.data`` are not counted. Buffers and other attributes of modules are not compared: forwards change them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.self_check.changes import codes_of_classes, fingerprint

# PEFT's layers: which adapters are used, which of them are merged into the weights, and how much each counts.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelState:
    """``model``, a transformers model that is bare or wrapped, as it is now.

    Nothing waits for the device until :meth:`other_weights` is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        of_tree = list(model.named_modules())  # one walk, since this is made for each micro-batch
        modules = [module for _, module in of_tree]
        named = _parameters(of_tree)
        self._code = fingerprint(transformers_model(model), modules), codes_of_classes(modules)
        self._modes = [module.training for module in modules]
        self._adapters = [_adapters(module) for module in modules]
        self._names = list(named)
        self._learn = [weight.requires_grad for weight in named.values()]
        self._versions = [(id(weight), weight.data_ptr(), weight._version) for weight in named.values()]
        self._sums = _sums(named.values())

    def what_differs(self, later: ModelState) -> str | None:
        """What has changed, as far as that can be seen without waiting for the device; None where nothing has."""
        if self._code != later._code:
            return "layers, hooks or code of the model have changed"
        if self._adapters != later._adapters:
            return "other adapters are active, or adapters were merged or scaled"
        if self._modes != later._modes:
            return "modules were switched between training and evaluation"
        if self._names != later._names or self._learn != later._learn:
            return "other parameters require a gradient"
        places = zip(self._names, self._versions, later._versions, strict=True)
        name = next((name for name, before, after in places if before != after), None)
        return None if name is None else f"the weight {name} has changed"

    def other_weights(self, later: ModelState) -> str | None:
        """Likewise, by the values of the weights: reads one number for each of them from their device."""
        names = [name for name, sums in zip(self._names, self._sums, strict=True) if sums is not None]
        pairs = zip(_read(self._sums), _read(later._sums), strict=True)
        differs = [before != after for before, after in pairs]
        name = next((name for name, other in zip(names, differs, strict=True) if other), None)
        return None if name is None else f"the weight {name} has changed"


def _parameters(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """As ``named_parameters``, each once: by the first of its names."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in names.items()}


def _adapters(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    return tuple(str(own[name]) for name in _ADAPTERS if name in own)


def _sums(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """The bits of each weight as integers, added up; None where it holds no plain numbers (meta device, torchao)."""
    return [_sum(weight.data) for weight in weights]


def _sum(values: Tensor) -> Tensor | None:
    if type(values) is not Tensor or values.is_meta or values.element_size() not in _INTEGERS:
        return None
    return values.view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)


def _read(sums: Iterable[Tensor | None]) -> list[int]:
    """Read together what is on one device."""
    known = [value for value in sums if value is not None]
    devices = {value.device for value in known}
    if len(devices) == 1:
        return torch.stack(known).tolist()  # type: ignore[no-any-return]
    return [int(value) for value in known]
