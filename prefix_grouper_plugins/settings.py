"""Every option once: its name, default, choices and help.

The training arguments for TRL, verl's engine config and its yaml files, the launcher and the tables of the docs read
these, or are checked against them by tests. Nothing is imported here that takes time: the launcher reads them before a
script has set the environment variables that torch and transformers look at.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

BACKENDS = ("merged_lse", "triton", "flex", "blockwise")  # in the order in which `auto` asks them
SHARDINGS = ("fsdp2", "fsdp")


@dataclass(frozen=True)
class Setting:
    """One option.

    Attributes:
        name: as it is called in the code; frameworks may add a prefix.
        default: its value where nobody sets it.
        help: one paragraph for users.
        choices: the values that it takes, where they are few.
        kind: type of its values.
        words: what it takes besides positive whole numbers, where it takes those; the first two also as false and true.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    kind: type = str
    words: tuple[str, ...] = ()

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
        if self.words:
            self.read(value, name)
        if self.choices and value not in self.choices:
            raise ValueError(f"{name or self.name} is {value!r}: choose one of {', '.join(self.choices)}")

    def read(self, value: Any, name: str | None = None) -> str:
        """The value of an option with ``words``: one of them, or a positive whole number. YAML makes false of ``off``.

        Raises:
            ValueError: ``value`` is neither.
        """
        text = str(value).lower()
        text = dict(zip(("false", "true"), self.words, strict=False)).get(text, text)
        if text in self.words or (text.isdecimal() and int(text) > 0):
            return text
        raise ValueError(f"{name or self.name} is {value!r}: choose {', '.join(self.words)} or a positive whole number")

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
SHARE = Setting(
    "share",
    "auto",
    "What rows share: 'prompt' forwards what their prompts have in common once; 'tree' does so with sampled tokens too, as in "
    "conversations that fork late and tool calls that several rollouts make; 'auto' takes from the tree the levels that are "
    "long enough to pay. The results are the same.",
    ("auto", "prompt", "tree"),
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

# Of TRL's training arguments and of the launcher, where all but the first have the prefix `prefix_grouper_`.
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
    "depend on which rows are together; 'group' brings every group together, so a row may move to another optimizer "
    "step of the same generation batch; 'none' leaves the shuffle alone.",
    ("exact", "group", "none"),
)
MAX_TOKENS = Setting(
    "max_tokens",
    "auto",
    "Tokens that one packed forward may hold, open prompts included. As many micro-batches of a group as fit share a forward. "
    "'auto' is what the stock trainer holds, the rows of a micro-batch with their padding. Where memory is left, a larger "
    "number N makes fewer forwards, with the same results. A micro-batch is never cut.",
    words=("auto",),
)
GENERATION = Setting(
    "generation",
    True,
    "When completions are generated by transformers (without vLLM), prefill each distinct prompt once. The same tokens are "
    "sampled. Caches that cannot be repeated, and images, are prefilled row by row; the log says why.",
    kind=bool,
)
VERIFY = Setting(
    "verify",
    "off",
    "Run rows of the update on the ordinary path as well, and compare loss and gradients: 'first' before the first optimizer "
    "step, a number N before every N-th. Where they differ by more than rounding explains, sharing is refused. A second line "
    "of defence after the self-check; it costs a few forwards and backwards.",
    words=("off", "first"),
)
TRL_SETTINGS = (USE, SHARE, BACKEND, TRL_REGROUP, MAX_TOKENS, GENERATION, ON_UNSUPPORTED, SELF_CHECK, VERIFY)

# Of verl's engine config, below `fsdp_config.prefix_grouper`.
SHARDING = Setting(
    "sharding", "fsdp2", "How parameters are sharded: verl's own fsdp2 or fsdp engine underneath.", SHARDINGS
)
VERL_REGROUP = Setting(
    "regroup",
    "auto",
    "How rows of one prompt are brought together. 'exact' moves rows among the micro-batches and ranks of one optimizer "
    "step, and only where the loss is known not to depend on which rows are together; 'auto' also brings whole groups "
    "into one optimizer step, where verl assigns rows to steps by the order of their arrival, their lengths or a shuffle; "
    "'group' does so whatever the loss; 'none' leaves them where verl put them. A step always has as many rows as verl's.",
    ("auto", "exact", "group", "none"),
)
VERL_SETTINGS = (SHARDING, SHARE, BACKEND, VERL_REGROUP, ON_UNSUPPORTED, VERIFY, SELF_CHECK)


def trl_name(setting: Setting) -> str:
    """What TRL's training arguments and the launcher call ``setting``."""
    return setting.name if setting is USE else f"prefix_grouper_{setting.name}"


TRL_OPTIONS = {trl_name(setting): setting for setting in TRL_SETTINGS}
# Environment variables that set something else.
_OTHER_VARIABLES = {"PREFIX_GROUPER_TRITON_TILES"}
# How much a name must be like one of ours (difflib's ratio) to be taken for a slip. `use_prefix_caching`, the nearest
# name that we know of elsewhere, has 0.62; ours with two pairs of letters swapped still have 0.88.
_ALIKE = 0.8


def nearest_option(name: str) -> str | None:
    """The option of TRL's arguments that ``name`` looks like, in whatever case and with whatever dashes; None for another's."""
    letters = "".join(character for character in name.lower() if character.isalnum())
    plain = {option.replace("_", ""): option for option in TRL_OPTIONS}
    found = difflib.get_close_matches(letters, plain, n=1, cutoff=_ALIKE)
    if not found and "prefixgroup" in letters:
        found = difflib.get_close_matches(letters, plain, n=1, cutoff=0.0)
    return plain[found[0]] if found else None


def misspelt_variables(environment: Iterable[str]) -> list[str]:
    """One line for each environment variable that looks like an option of ours and sets none.

    Args:
        environment: names of variables.
    """
    known = {option.upper() for option in TRL_OPTIONS} | _OTHER_VARIABLES
    nearest = ((name, nearest_option(name)) for name in environment if name not in known)
    return [
        f"the environment variable {name} sets nothing: did you mean {option.upper()}?"
        for name, option in nearest
        if option
    ]
