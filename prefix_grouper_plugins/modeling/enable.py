"""Turn sharing on for a model: what it is made of decides, and a self-check confirms."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from prefix_grouper_plugins.attention.registry import BACKEND_NAMES
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.modeling.attention import disable_prefix_grouper, enable_layers
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, given_layout
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.self_check import SelfCheck, is_sharded, self_check, why_not_yet
from prefix_grouper_plugins.modeling.support.report import SupportReport, check_support, transformers_model


def enable_prefix_grouper(
    model: nn.Module, *, backend: str = "auto", self_check: bool | Literal["later"] = True
) -> nn.Module:
    """Let ``model`` (a transformers causal LM, bare or wrapped by PEFT) take packed rows. In place and idempotent.

    Nothing changes for ordinary calls. Packed calls are made with :func:`packed_inputs`.

    Args:
        model: the model.
        backend: attention backend of every layer, see :func:`~prefix_grouper_plugins.shared_prefix_attention`.
        self_check: compare a tiny packed forward and backward with forwards of the rows (:func:`~prefix_grouper_plugins.self_check`)
            at once, or before the first packed forward where weights are not loaded yet; ``"later"`` waits for it in any
            case. Without the self-check, model types that no test has compared are refused.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: the packed result could differ from the ordinary one, or did in the self-check; the message
            says why.
        ValueError: there is no such backend.
    """
    if backend not in BACKEND_NAMES:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(BACKEND_NAMES)}")
    report = check_support(model)
    reasons = report.reasons if self_check else report.reasons + report.unverified
    if reasons:
        raise UnsupportedModelError("; ".join(reasons))
    enable_layers(model, backend)
    base = transformers_model(model)
    _forget(base)
    if not self_check:
        return model
    if self_check == "later" or why_not_yet(model) is not None or is_sharded(model):
        base.register_forward_pre_hook(_before_first_packed_forward, with_kwargs=True)
        return model
    if reasons := reasons_after(report, result := run_self_check(model)):
        disable_prefix_grouper(model)
        raise UnsupportedModelError("; ".join(reasons))
    logger.log(logging.INFO if result.passed else logging.WARNING, "prefix grouper: %s", result)
    return model


def self_check_pending(model: nn.Module) -> bool:
    """Whether the self-check of ``model`` waits for its first packed forward."""
    base = transformers_model(model)
    return base is not None and _before_first_packed_forward in base._forward_pre_hooks.values()


def run_self_check(model: nn.Module, device: torch.device | None = None) -> SelfCheck:
    """The self-check of ``model``, for which nothing waits any longer. Under FSDP a collective, see :func:`self_check`."""
    _forget(transformers_model(model))
    return self_check(model, device)


def reasons_after(report: SupportReport, result: SelfCheck) -> tuple[str, ...]:
    """Why a model is refused after its self-check: it failed, or it was needed and could not be made."""
    if result.reason is not None:
        return (str(result),)
    if report.unverified and not result.passed:
        return (*report.unverified, str(result))
    return ()


def _before_first_packed_forward(base: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Check a model whose weights were not loaded when it was enabled."""
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is None:
        return
    _forget(base)
    report = check_support(base)
    if is_sharded(base):
        # Only some layers may be sharded, and this process cannot know what others do.
        if report.unverified:
            raise UnsupportedModelError(
                "; ".join([*report.unverified, "call self_check(model) on every process first"])
            )
        logger.warning(
            "prefix grouper: %s is sharded, so it is not self-checked on its own: call self_check(model) on every process",
            type(base).__name__,
        )
        return
    result = self_check(base)
    if reasons := reasons_after(report, result):
        raise UnsupportedModelError("; ".join(reasons))
    logger.log(logging.INFO if result.passed else logging.WARNING, "prefix grouper: %s", result)


def _forget(base: Any) -> None:
    hooks = base._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_first_packed_forward]:
        del hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)
