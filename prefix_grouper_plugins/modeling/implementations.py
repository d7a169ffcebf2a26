"""What transformers' attention implementations make of a layer's window, softcap and sinks.

Packed rows do what the user's own implementation does, so that they equal the ordinary path. Two things differ between
implementations:

- ``sdpa`` has no attention sinks and no softcap. It ignores sinks, and a softcap in older releases; newer ones refuse it.
- ``eager``, ``sdpa`` and ``flex_attention`` take a sliding window from the model's mask, flash kernels from the argument of
  the call. Some models give these two different windows.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType

from torch import nn
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BY_MASK = {"eager", "sdpa", "flex_attention"}  # which take all they need from the mask and their arguments
# Arguments beyond queries, keys and values that sdpa may lack, and what they are in words.
_OPTIONAL = {"softcap": "softcap", "s_aux": "attention sinks"}


def ignored_by(implementation: str) -> frozenset[str]:
    """The arguments, of ``softcap`` and ``s_aux`` (sinks), that ``implementation`` takes and ignores."""
    if implementation != "sdpa":
        return frozenset()
    code = ALL_ATTENTION_FUNCTIONS["sdpa"].__code__
    read = {*code.co_varnames, *(constant for constant in code.co_consts if isinstance(constant, str))}
    return frozenset(_OPTIONAL) - read


def in_words(arguments: frozenset[str]) -> str:
    """Names of ``arguments`` for a message."""
    return " and ".join(words for name, words in _OPTIONAL.items() if name in arguments)


def window_is_in_mask(implementation: str) -> bool | None:
    """Whether ``implementation`` takes a window from the mask (True) or from its call (False); None where that is not known."""
    if implementation in BY_MASK:
        return True
    masks = AttentionMaskInterface()
    return False if implementation in masks and masks[implementation] is flash_attention_mask else None


@functools.lru_cache(maxsize=256)
def looks_up_attention(cls: type[nn.Module]) -> bool:
    """Whether the forward of ``cls`` looks its attention up in transformers' ``AttentionInterface``."""
    own = getattr(cls, "_prefix_grouper_base", cls)  # of a class that enabling has extended
    return "ALL_ATTENTION_FUNCTIONS" in names_in(inspect.unwrap(own.forward).__code__)


@functools.lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[str, ...]:
    """The names that ``code`` looks up, and functions that are defined in it."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return code.co_names + tuple(name for names in inner for name in names)
