"""What the results of a forward depend on besides its inputs: results that are kept must not outlive it.

Micro-batches of one optimizer step may share forwards (:mod:`.scores_ahead`, :mod:`.prompt_reuse`). That is exact as long as
each of them would have run the same model. A callback, a hook or an optimizer that steps within the backward may have
changed it in between: then later micro-batches would get the results of another model, and the backward would meet other
weights than the forward did.

Weights are compared by identity, by the version that autograd counts, and by a sum over their bits, since changes through
``.data`` are not counted. Under FSDP2 they are this process's shards, which outlive what is gathered of them. Buffers and
other attributes of modules are not compared: forwards change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.self_check.changes import codes_of_classes, fingerprint, modules_of

# PEFT's layers: which adapters are used, which of them are merged into the weights, and how much each counts.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ModelState:
    """``model``, a transformers model that is bare or wrapped, as it is now.

    Made for each micro-batch: it reads the module tree once and each weight once, and waits for no device until
    :meth:`other_weights` is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = modules_of(model)
        weights = _parameters(modules)
        self._model = model
        self._code = fingerprint(transformers_model(model), modules), codes_of_classes(modules)
        self._modes = [module.training for module in modules]
        self._adapters = _adapters(modules)
        self._learn = [weight.requires_grad for weight in weights]
        self._versions = [(id(weight), _address(weight), weight._version) for weight in weights]
        self._sums = [_sum(weight.data) for weight in weights]

    def what_differs(self, later: ModelState) -> str | None:
        """What has changed, as far as that can be seen without waiting for the device; None where nothing has."""
        if self._code != later._code:
            return "layers, hooks or code of the model have changed"
        if self._adapters != later._adapters:
            return "other adapters are active, adapters were merged, or a scaling has changed"
        if self._modes != later._modes:
            return "modules were switched between training and evaluation"
        if self._learn != later._learn:
            return "other parameters require a gradient"
        return later._first_that_differs(self._versions, later._versions)

    def other_weights(self, later: ModelState) -> str | None:
        """Likewise, by the values of the weights: reads one number for each of them from their device."""
        return later._first_that_differs(_read(self._sums), _read(later._sums))

    def _first_that_differs(self, before: Sequence[Any], now: Sequence[Any]) -> str | None:
        """Names the first weight for which the two differ. Names are looked up here, and not for each micro-batch."""
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                names = [name for name, _ in self._model.named_parameters()]
                return f"the weight {names[number]} has changed"
        return None


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """As ``parameters()``, each once."""
    modules = list(modules)
    found = (weight for module in modules if module._parameters for weight in module._parameters.values())
    weights = dict.fromkeys(weight for weight in found if weight is not None)
    shards = _shards_of_gathered(modules)
    return [shards.get(id(weight), weight) for weight in weights] if shards else list(weights)


def _shards_of_gathered(modules: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    """By the id of a parameter that FSDP2 has gathered: this process's shard, which modules show between forwards."""
    shards: dict[int, nn.Parameter] = {}
    for module in modules:
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for parameter in (own for group in groups if group is not None for own in group.fsdp_params):
                for name in ("_unsharded_param", "_sharded_post_forward_param"):
                    if (gathered := getattr(parameter, name, None)) is not None:
                        shards[id(gathered)] = parameter.sharded_param
    return shards


def _address(weight: Tensor) -> int:
    return (weight.to_local() if isinstance(weight, DTensor) else weight).data_ptr()


def _adapters(modules: Iterable[nn.Module]) -> list[tuple[str, ...]]:
    owners = (own for own in map(vars, modules) if not own.keys().isdisjoint(_ADAPTERS))
    return [tuple(str(own[name]) for name in _ADAPTERS if name in own) for own in owners]


def _sum(values: Tensor) -> Tensor | None:
    """The bits of ``values``, added up as integers; None where it holds no plain numbers (meta device, torchao)."""
    if isinstance(values, DTensor):
        values = values.to_local()
    size = values.element_size()
    if type(values) is not Tensor or values.is_meta or size not in _INTEGERS:
        return None
    # Eight bytes at a time: shorter integers are converted to 64 bits first, which takes a CPU 15 to 50 times as long.
    if values.is_contiguous() and values.numel() * size % 8 == 0 and values.storage_offset() * size % 8 == 0:
        return values.view(-1).view(torch.int64).sum()
    return values.view(_INTEGERS[size]).sum(dtype=torch.int64)


def _read(sums: Sequence[Tensor | None]) -> list[int | None]:
    """The values of ``sums``; those on one device are read together."""
    known = [value for value in sums if value is not None]
    if len({value.device for value in known}) == 1:
        values = iter(torch.stack(known).tolist())
    else:
        values = iter([int(value) for value in known])
    return [None if value is None else next(values) for value in sums]
