"""Every option once: its name, default, choices and help.

The training arguments for TRL, verl's engine config and its yaml files, the launcher and the tables of the docs read
these, or are checked against them by tests. Nothing is imported here that takes time: the launcher reads them before a
script has set the environment variables that torch and transformers look at.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

BACKENDS = ("merged_lse", "triton", "flex", "blockwise")  # in the order in which `auto` asks them
SHARDINGS = ("fsdp2", "fsdp")


@dataclass(frozen=True)
class Setting:
    """One option.

    Attributes:
        name: as it is called in the code; frameworks may put something in front of it.
        default: its value where nobody sets it.
        help: one paragraph for users.
        choices: the values that it takes, where they are few.
        kind: type of its values.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    kind: type = str

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    def check(self, value: Any, name: str | None = None) -> None:
        """
        Args:
            value: what was set.
            name: what the user calls the option.

        Raises:
            ValueError: ``value`` is not among the choices.
        """
        if self.choices and value not in self.choices:
            raise ValueError(f"{name or self.name} is {value!r}: choose one of {', '.join(self.choices)}")

    def field(self) -> Any:
        """A field of a dataclass with this default, and help and choices as argument parsers read them."""
        metadata: dict[str, Any] = {"help": self.help}
        if self.choices:
            metadata["choices"] = list(self.choices)
        return dataclasses.field(default=self.default, metadata=metadata)


BACKEND = Setting(
    "backend",
    "auto",
    "Attention backend of packed forwards. 'auto' takes the fastest one that each layer can use.",
    ("auto", *BACKENDS),
)
ON_UNSUPPORTED = Setting(
    "on_unsupported",
    "error",
    "What to do with a model or setting that cannot be shared exactly: 'error' stops before training and says why; "
    "'fallback' trains on the ordinary path, says why and counts it.",
    ("error", "fallback"),
)
SELF_CHECK = Setting(
    "self_check",
    True,
    "Before the first packed forward, compare a tiny packed forward and backward of the model with forwards of its rows; "
    "a model that fails is unsupported. Without it, model types that no test has compared are refused.",
    kind=bool,
)

# Of TRL's training arguments and of the launcher, which put `prefix_grouper_` in front of all but the first.
USE = Setting(
    "use_prefix_grouper",
    None,
    "Encode the prompt of a group once instead of once for each completion. Same numbers, less time and memory. On by "
    "default in this config; the stock trainer's path is taken when off.",
    kind=bool,
)
TRL_REGROUP = Setting(
    "regroup",
    "exact",
    "How rows of one prompt, which TRL shuffles over the micro-batches of a generation batch, are brought together again. "
    "'exact' moves rows only among the micro-batches of one optimizer step, and only where the loss is known not to "
    "depend on which rows stand together; 'group' brings every group together, so a row may move to another optimizer "
    "step of the same generation batch; 'none' leaves the shuffle alone.",
    ("exact", "group", "none"),
)
REBATCH = Setting(
    "rebatch",
    False,
    "When per_device_train_batch_size is smaller than num_generations, make micro-batches larger and "
    "gradient_accumulation_steps smaller by the same factor, so that whole groups fit in one. The optimization is the "
    "same; memory per step is that of the larger micro-batch with its prompts shared.",
    kind=bool,
)
TRL_SETTINGS = (USE, BACKEND, TRL_REGROUP, REBATCH, ON_UNSUPPORTED, SELF_CHECK)

# Of verl's engine config, below `fsdp_config.prefix_grouper`.
SHARDING = Setting(
    "sharding", "fsdp2", "How parameters are sharded: verl's own fsdp2 or fsdp engine underneath.", SHARDINGS
)
VERL_REGROUP = Setting(
    "regroup",
    "auto",
    "How rows of one prompt are brought together. 'exact' moves rows among the micro-batches and ranks of one optimizer "
    "step, and only where the loss is known not to depend on which rows stand together; 'auto' also brings whole groups "
    "into one optimizer step, where verl assigns rows to steps by the order of their arrival, their lengths or a shuffle; "
    "'group' does so whatever the loss; 'none' leaves them where verl put them. A step always has as many rows as verl's.",
    ("auto", "exact", "group", "none"),
)
VERIFY = Setting(
    "verify", False, "Run the first update twice, ordinary and shared, and stop if the gradients differ.", kind=bool
)
VERL_SETTINGS = (SHARDING, BACKEND, VERL_REGROUP, ON_UNSUPPORTED, VERIFY, SELF_CHECK)


def trl_name(setting: Setting) -> str:
    """What TRL's training arguments and the launcher call ``setting``."""
    return setting.name if setting is USE else f"prefix_grouper_{setting.name}"


TRL_OPTIONS = {trl_name(setting): setting for setting in TRL_SETTINGS}
