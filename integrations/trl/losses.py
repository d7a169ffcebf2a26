"""What is known of the loss of the trainer that runs.

Rows may change their micro-batch only where the gradient of an optimizer step is a sum over rows, whichever of them are
together. That is known of TRL's own losses, by their code. Whatever else computes the loss (a subclass, a mixin, a
function put on the trainer) may do anything with its micro-batch: its rows stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import accelerate
import torch
import transformers
import trl

from prefix_grouper_plugins.integrations.trl.fused_head import MASKS_PADDING
from prefix_grouper_plugins.modeling.code_origin import home_of, roots_of
from prefix_grouper_plugins.modeling.gradient_hooks import hooked_weight

SCORING = "_get_per_token_logps_and_entropies"
PARTS_OF_SCORING = ("_full_logits_logps", "_chunked_logps")  # what it is made of in TRL 1.14

# Losses of GRPO that are a mean over rows, or a sum with a normaliser that is the same for the whole generation batch.
_ROW_SUM_LOSSES = {"grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"}
_GRPO, _RLOO, _GMPO = "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "trl.experimental.gmpo.gmpo_trainer"
# What decides about the loss of a micro-batch: the loss itself, the step around it, its inputs and its parts.
_PARTS_OF_THE_LOSS = (
    "compute_loss",
    "_compute_loss",
    "training_step",
    "_prepare_inputs",
    SCORING,
    "get_high_entropy_mask",
    "get_off_policy_mask",
    "get_gamma_weights",
)
_STEPS_IN_BACKWARD = {"lomo", "adalomo"}
_HOMES = {_GRPO, _RLOO, _GMPO, "transformers.trainer"}


# Methods of TRL are wrapped in decorators of its own, of torch and of transformers.
_ROOTS = roots_of(trl, torch, transformers)
_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def why_rows_depend(settings: Any) -> str | None:
    """Why ``loss_type`` and the entropy terms make the loss of a row depend on its micro-batch; None where they do not.

    Args:
        settings: training arguments, or a trainer, which may have changed them.
    """
    loss_type = getattr(settings, "loss_type", "grpo")
    if not isinstance(loss_type, str) or loss_type not in _ROW_SUM_LOSSES:
        return f"loss_type={loss_type!r} is not known to be a sum over rows"
    return _why_entropy_depends(settings)


def why_rows_stay(trainer: Any) -> str | None:
    """Why rows keep the micro-batch that TRL puts them in; None where the loss is known to be a sum over rows.

    ``trainer.loss_is_sum_over_rows`` answers for code that is not TRL's.
    """
    optimizer = getattr(trainer.args, "optim", None)
    if (name := getattr(optimizer, "value", optimizer)) in _STEPS_IN_BACKWARD:
        return f"optim={name!r} makes an optimizer step in the backward of each micro-batch"
    if getattr(trainer, "aux_loss_enabled", False):
        return "the router loss is made of means over a micro-batch"
    if trainer.loss_is_sum_over_rows:
        return _why_promise_is_older(trainer)
    if (owner := owner_of_the_loss(trainer)) is not None:
        return (
            f"{owner} is not TRL's own and may compute something from the whole micro-batch; set "
            "loss_is_sum_over_rows = True on the class if it does not"
        )
    if (reason := _why_gradients_depend(trainer.model) or _why_steps_are_seen(trainer)) is not None:
        return reason
    home = next(home_of(function, _ROOTS) for _, function in _definitions(trainer, "_compute_loss"))
    if home == _RLOO:
        return None
    return _why_entropy_depends(trainer) if home == _GMPO else why_rows_depend(trainer)


def what_padding_changes(trainer: Any) -> str | None:
    """What code that is not TRL's own may not read; None for TRL's, and where TRL has none of padding either."""
    if MASKS_PADDING or (owner := owner_of_the_loss(trainer)) is None:
        return None
    return (
        f"{owner} is not TRL's own. Log-probs and entropies of padding are 0 with sharing, and in this release of TRL those of the "
        "padding token: multiply by completion_mask before you average them, or upgrade TRL"
    )


def _why_promise_is_older(trainer: Any) -> str | None:
    """Why ``loss_is_sum_over_rows`` does not answer for the loss: a class below the one that sets it has code of its own."""
    if "loss_is_sum_over_rows" in vars(trainer):
        return None
    mro = type(trainer).__mro__
    promising = next(place for place, cls in enumerate(mro) if "loss_is_sum_over_rows" in vars(cls))
    for cls in mro[:promising]:
        for name in _PARTS_OF_THE_LOSS:
            if name in vars(cls) and home_of(vars(cls)[name], _ROOTS) not in _HOMES and not _is_ours(vars(cls)[name]):
                return (
                    f"{cls.__name__}.{name} may compute something from the whole micro-batch, and loss_is_sum_over_rows = True stands "
                    f"on {mro[promising].__name__}, which does not know it; set it on {cls.__name__} too if it does not"
                )
    return None


def _why_steps_are_seen(trainer: Any) -> str | None:
    """The user's own code that runs between micro-batches, where gradients, settings and rows may be read or changed."""
    promise = (
        "set loss_is_sum_over_rows = True on the trainer's class if it changes none of gradients, settings and rows"
    )
    for callback in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()):
        if not _is_of_libraries(callback.on_substep_end):
            return f"{type(callback).__name__}.on_substep_end runs between micro-batches; {promise}"
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is not None and not _is_of_libraries(accelerator.backward):
        return f"{type(accelerator).__name__}.backward is not Accelerate's own, and gets the loss of each micro-batch; {promise}"
    return None


def owner_of_the_loss(trainer: Any) -> str | None:
    """Who computes the loss, if it is not TRL, see :func:`own_code`."""
    return next(filter(None, (own_code(trainer, name) for name in _PARTS_OF_THE_LOSS)), None)


def own_code(trainer: Any, name: str, *, behind: type | None = None) -> str | None:
    """Who has put code of their own in the place of TRL's method ``name``: "MyTrainer.compute_loss"; None for TRL's.

    Args:
        trainer: the trainer that runs.
        name: of a method.
        behind: look only at the classes after this one in the method resolution order.
    """
    for owner, function in _definitions(trainer, name, behind):
        return None if home_of(function, _ROOTS) in _HOMES else f"{owner}.{name}"
    return None


def who_stands_in_front(trainer: Any, ours: type, name: str) -> str | None:
    """The class or object whose method ``name`` runs in the place of that of ``ours``; None where ours runs first."""
    if name in vars(trainer):
        return f"{type(trainer).__name__} object"
    mro = type(trainer).__mro__
    return next((cls.__name__ for cls in mro[: mro.index(ours)] if name in vars(cls)), None)


def _why_gradients_depend(model: Any) -> str | None:
    """A hook may do anything with the gradient of one backward: clip it, or let an optimizer step."""
    if (name := hooked_weight(model)) is None:
        return None
    return (
        f"a hook on {name} gets the gradient of each micro-batch; set loss_is_sum_over_rows = True on the class if it "
        "only multiplies by what is the same for all of them"
    )


def _why_entropy_depends(settings: Any) -> str | None:
    if getattr(settings, "top_entropy_quantile", 1.0) < 1.0:
        return f"top_entropy_quantile={settings.top_entropy_quantile} is a quantile over a micro-batch"
    if getattr(settings, "entropy_coef", 0.0) != 0.0 or getattr(settings, "use_adaptive_entropy", False):
        return "the entropy bonus is a mean over a micro-batch"
    return None


def _definitions(trainer: Any, name: str, behind: type | None = None) -> Iterator[tuple[str, Any]]:
    """Where ``name`` is defined, in the order in which Python finds it: on the object, and in its classes, but not by us.

    Our classes count too: a script that sets a method on ``GRPOTrainer`` sets it on ours where the launcher has put it there.
    """
    if behind is None and name in vars(trainer):
        yield f"{type(trainer).__name__} object", vars(trainer)[name]
    mro = type(trainer).__mro__
    for cls in mro if behind is None else mro[mro.index(behind) + 1 :]:
        if name in vars(cls) and not _is_ours(vars(cls)[name]):
            yield cls.__name__, vars(cls)[name]


def _is_ours(function: Any) -> bool:
    home = home_of(function, (*_ROOTS, _OURS))
    return home is not None and home.startswith("prefix_grouper_plugins.")


def _is_of_libraries(function: Any) -> bool:
    """Whether ``function``, and all that decorates it, is code of TRL, its libraries, Accelerate or ours."""
    return home_of(function, (*_ROOTS, _OURS, *roots_of(accelerate))) is not None
