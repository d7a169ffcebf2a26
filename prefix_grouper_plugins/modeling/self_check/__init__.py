"""The self-check: a tiny packed forward and backward of the real model, against forwards of its rows alone.

What a model is made of says that packed rows should work (modeling/support/report.py); this shows that they do, with the
weights, the code and the kernels that are there now. A few rows that form a tree are forwarded one by one and as one
packed row. Three things are compared:

- the output at every packed position;
- the gradient of a random projection of all outputs with respect to the input embeddings, which exist also where every
  weight is frozen, and with respect to one trainable parameter, where there is one;
- the gradient of a single row's outputs at tokens of other rows. It must be zero, exactly and in every dtype, so this
  part needs no tolerance.

The tolerance of the first two is that of rounding. Where a difference exceeds what is plain in the dtype, it is compared
with what rounding does to this model: the rows are forwarded once more, and every module's output is moved by half a unit
in its last place. In half precision rounding also sends tokens to other experts, so there the differences of a mixture
of experts are judged by their medians.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.enable import has_layers_enabled
from prefix_grouper_plugins.modeling.self_check.comparison import Comparison
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck, on_all_ranks, why_not_yet

__all__ = ["SelfCheck", "checked_before", "on_all_ranks", "self_check", "why_not_yet"]


def self_check(model: nn.Module, device: torch.device | None = None, *, anatomy: Anatomy | None = None) -> SelfCheck:
    """Compare a tiny packed forward and backward of ``model`` with forwards of the rows. Leaves the model as it was.

    No gradient, cache, buffer, random state or mode of a module is changed. A model that was checked before is not
    checked again, unless its attention backend has changed. Where parameters are sharded, every process must call it, with
    the outermost module: it runs collectives.

    Args:
        model: has been through :func:`~prefix_grouper_plugins.enable_prefix_grouper`, bare or wrapped.
        device: where token ids go, by default where the input embeddings are (under CPU offload they are elsewhere).
        anatomy: the parts of ``model``, where the caller knows them already.

    Returns:
        the self-check; nothing is raised for a model that fails it.

    Raises:
        ValueError: the model has not been enabled.
    """
    anatomy = Anatomy(model) if anatomy is None else anatomy
    if not has_layers_enabled(anatomy):
        raise ValueError("call enable_prefix_grouper(model) first: this model would read the packed row as one text")
    base = anatomy.base
    if (known := checked_before(anatomy)) is not None:
        return known
    if (reason := why_not_yet(anatomy)) is not None:
        return SelfCheck(type(base).__name__, not_covered=reason)
    with torch.inference_mode(False), torch.enable_grad():
        result = Comparison(anatomy, device).run()
    if result.passed or result.reason is not None:
        _CHECKED[base] = (_backends(anatomy), result)
    return result


def checked_before(anatomy: Anatomy) -> SelfCheck | None:
    """The self-check of a model as it is enabled now, if there was one."""
    backends, result = _CHECKED.get(anatomy.base, ((), None))
    return result if backends == _backends(anatomy) else None


def _backends(anatomy: Anatomy) -> tuple[str, ...]:
    return tuple(str(config._attn_implementation) for config in anatomy.configs)


_CHECKED: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], SelfCheck]] = weakref.WeakKeyDictionary()
