"""What the mixins in front of TRL's trainers have in common."""

from __future__ import annotations

import inspect
from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer

from prefix_grouper_plugins.settings import TRL_OPTIONS

# Parameters are cut into shards when training begins, and until then some processes hold none.
SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}
_DEFAULTS = {name: setting.default for name, setting in TRL_OPTIONS.items()} | {"use_prefix_grouper": True}


def option(args: Any, name: str) -> Any:
    """The training argument ``name``, or its default where the config is TRL's own."""
    return getattr(args, name, _DEFAULTS[name])


def must_come_before_trainers(mixin: type, cls: type) -> None:
    """
    Raises:
        ValueError: ``mixin`` comes after a trainer in the bases of ``cls``, so that it would change nothing.
    """
    in_front = cls.__mro__[: cls.__mro__.index(mixin)]
    trainer = next((c for c in in_front if issubclass(c, Trainer) and not issubclass(c, mixin)), None)
    if trainer is not None:
        raise ValueError(
            f"{trainer.__name__} comes before {mixin.__name__} in {cls.__name__}, so its methods would run and "
            f"nothing would be shared: write class {cls.__name__}({mixin.__name__}, {trainer.__name__})"
        )


def show_signature(mixin: type, cls: type) -> None:
    """Let ``inspect.signature`` of ``cls``, and of its ``__init__``, tell what the trainer behind ``mixin`` takes.

    Scripts ask it which release of TRL they meet.
    """
    own = next(vars(c)["__init__"] for c in cls.__mro__ if c is not mixin and "__init__" in vars(c))
    signature = inspect.signature(own)
    _, *parameters = signature.parameters.values()
    cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    if "__init__" in vars(cls) or not cls.__module__.startswith("prefix_grouper_plugins."):
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(*args, **kwargs)  # type: ignore[arg-type,misc]

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]


def is_reference(model: Any) -> bool:
    """Whether PEFT has switched the adapter off, or to a frozen copy that TRL calls "ref" or "teacher"."""
    # A property of PEFT's layers. transformers' models have a method of that name.
    layer = next((m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)), None)
    return layer is not None and (layer.disable_adapters or bool({"ref", "teacher"} & set(layer.active_adapters)))
