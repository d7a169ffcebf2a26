"""The trainers and configs of TRL that share rows, one pair for each algorithm whose rows begin alike.

Each class is TRL's own with :class:`.rows_trainer.ShareRowsMixin` or :class:`.config.ShareRowsArguments` in front, and is made
when it is first asked for: TRL imports its trainers lazily, too, and warns when an experimental one is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from prefix_grouper_plugins.integrations.trl.config import ShareRowsArguments
from prefix_grouper_plugins.integrations.trl.rows_trainer import ShareRowsMixin

_PAIR = "the chosen and the rejected completion of a prompt share it"
_SAMPLED = "completions sampled from one prompt share it"


@dataclass(frozen=True)
class Algorithm:
    """
    Attributes:
        homes: modules of TRL that hold its trainer, the newest first, without ``_trainer`` at their end.
        rows_in_common: which rows of a micro-batch begin alike.
    """

    homes: tuple[str, ...]
    rows_in_common: str

    def modules(self, kind: str) -> list[str]:
        """Modules of TRL that may hold its ``trainer`` or its ``config``."""
        return [f"{home}_{kind}" for home in self.homes]


ALGORITHMS = {
    "DPO": Algorithm(("trl.trainer.dpo",), _PAIR),
    "KTO": Algorithm(
        ("trl.trainer.kto", "trl.experimental.kto.kto"),
        "completions of one prompt, and what they are compared with for the KL term, share it",
    ),
    "Reward": Algorithm(("trl.trainer.reward",), _PAIR),
    "ORPO": Algorithm(("trl.experimental.orpo.orpo",), _PAIR),
    "CPO": Algorithm(("trl.experimental.cpo.cpo",), _PAIR),
    "TPO": Algorithm(
        ("trl.experimental.tpo.tpo",), "the chosen, the rejected and the reference completion of a prompt share it"
    ),
    "OnlineDPO": Algorithm(("trl.experimental.online_dpo.online_dpo",), _SAMPLED),
    "SDPO": Algorithm(("trl.experimental.sdpo.sdpo",), _SAMPLED),
    "SDFT": Algorithm(("trl.experimental.sdft.sdft",), _SAMPLED),
}
# Whose rows have no prompt in common with others.
NOTHING_TO_SHARE = {"SFT": "trl.trainer.sft", "Distillation": "trl.trainer.distillation"}

NAMES = [f"PrefixGrouper{algorithm}{kind}" for algorithm in ALGORITHMS for kind in ("Trainer", "Config")]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = "Trainer" if name.endswith("Trainer") else "Config"
    algorithm = name.removeprefix("PrefixGrouper").removesuffix(kind)
    stock = _stock(algorithm, kind)
    if kind == "Config":
        made: type = dataclass(_subclass(name, ShareRowsArguments, stock, {}))
    else:
        made = _subclass(name, ShareRowsMixin, stock, {"rows_in_common": ALGORITHMS[algorithm].rows_in_common})
    globals()[name] = made
    return made


def _stock(algorithm: str, kind: str) -> type:
    """TRL's own class.

    Raises:
        ImportError: the installed TRL has none.
    """
    for module in ALGORITHMS[algorithm].modules(kind.lower()):
        try:
            return getattr(importlib.import_module(module), f"{algorithm}{kind}")  # type: ignore[no-any-return]
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):  # something that TRL's module needs is missing
                raise
    raise ImportError(f"the installed TRL has no {algorithm}{kind}: upgrade trl")


def _subclass(name: str, mixin: type, stock: type, attributes: dict[str, Any]) -> type:
    doc = f":class:`{stock.__module__}.{stock.__name__}` with :class:`{mixin.__module__}.{mixin.__name__}` in front."
    return type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name, "__doc__": doc, **attributes})
