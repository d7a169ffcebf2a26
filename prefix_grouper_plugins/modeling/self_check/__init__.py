"""The self-check: a tiny packed forward and backward of the real model, against forwards of its rows alone.

What a model is made of says that packed rows should work (modeling/support/report.py); this shows that they do, with the
weights, the code and the kernels that are there now. A few rows that form two trees are forwarded one by one and as one
packed row, in training mode (without dropout) and in evaluation mode. The rows pass 64 and 128 tokens, those of classes that no test has compared 256
as well, and hold special tokens. Compared are

- the output at every packed position, in both modes;
- the gradient of a random projection of all outputs with respect to the input embeddings, which exist also where every
  weight is frozen, and with respect to every trainable parameter (not where parameters are sharded);
- the gradient of a single row's outputs at tokens of other rows. It must be zero, exactly and in every dtype;
- a row's outputs when all tokens of other rows become extreme, which shows what a gradient does not (a maximum, a limit);
- where a trainer pads prompts on the left and passes no positions, outputs and gradients of such a batch.

The tolerance is that of rounding. Where a difference exceeds what is plain in the dtype, it is compared with what rounding
does to this model: the rows are forwarded once more, and every module's output is moved by half a unit in its last place.
In half precision rounding also sends tokens to other experts, so there the differences of a mixture of experts are judged
by their medians.

A model that has changed since is noticed (:mod:`.changes`), and what a few tokens cannot show, the first batch of a run
does (:mod:`.first_batch`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.enable import has_layers_enabled
from prefix_grouper_plugins.modeling.self_check.changes import remember, what_is_compared, while_checking
from prefix_grouper_plugins.modeling.self_check.comparison import Comparison
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck, on_all_ranks, on_any_rank, why_not_yet
from prefix_grouper_plugins.modeling.support.reasons import unverified_reasons

__all__ = ["SelfCheck", "checked_before", "on_all_ranks", "on_any_rank", "self_check", "why_not_yet"]


def self_check(
    model: nn.Module,
    device: torch.device | None = None,
    *,
    left_padding: bool = False,
    anatomy: Anatomy | None = None,
) -> SelfCheck:
    """Compare a tiny packed forward and backward of ``model`` with forwards of the rows. Leaves the model as it was.

    No gradient, cache, buffer, random state or mode of a module is changed. A model that was checked before is not
    checked again, unless its attention backend has changed. Where parameters are sharded, every process must call it, with
    the outermost module: it runs collectives.

    Args:
        model: has been through :func:`~prefix_grouper_plugins.enable_prefix_grouper`, bare or wrapped.
        device: where token ids go, by default where the input embeddings are (under CPU offload they are elsewhere).
        left_padding: also compare with an ordinary batch whose prompts are padded on the left and which brings no
            positions, for trainers that forward such batches (TRL).
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
    if (known := checked_before(anatomy, left_padding=left_padding)) is not None:
        return known
    if (reason := why_not_yet(anatomy)) is not None:
        return SelfCheck(type(base).__name__, not_covered=reason)
    with torch.inference_mode(False), torch.enable_grad():
        result = while_checking(lambda: _compare(anatomy, device, left_padding))
    if result.passed or result.reason is not None:
        _CHECKED[base] = (_state(anatomy), left_padding, result)
    if result.passed:
        remember(base, anatomy.base_modules)
    return result


def _compare(anatomy: Anatomy, device: torch.device | None, left_padding: bool) -> SelfCheck:
    if unverified_reasons(anatomy):
        comparison = Comparison(anatomy, device, left_padding, long_rows=True)
        result = comparison.run()
        if not comparison.rows_failed:
            return result
    return Comparison(anatomy, device, left_padding).run()


def checked_before(anatomy: Anatomy, *, left_padding: bool = False) -> SelfCheck | None:
    """The self-check of a model as it is enabled now, if there was one."""
    state, with_padding, result = _CHECKED.get(anatomy.base, ((), False, None))
    return result if state == _state(anatomy, state[-1:]) and with_padding >= left_padding else None


def _state(anatomy: Anatomy, before: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """What a self-check is of: the code of the model, its backends, and its kernels; those of ``before`` where it is sharded."""
    names = tuple(str(config._attn_implementation) for config in anatomy.configs)
    tree, classes, kernels = what_is_compared(anatomy.base, anatomy.base_modules)
    return tree, classes, names, before[0] if kernels is None and before else kernels


_Known = tuple[tuple[Any, ...], bool, SelfCheck]
_CHECKED: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
