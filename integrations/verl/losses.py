"""Which losses of verl let rows change their micro-batch: those that are known to be sums over rows.

verl scales each micro-batch's loss for the whole optimizer step, so for most losses it does not matter which rows are
together. Some do look at the micro-batch as a whole: ``geo_mean`` averages over its rows, ``clip_cov`` and ``kl_cov``
select among its tokens, ``seq-mean-token-sum-norm`` without a ``loss_scale_factor`` divides by its longest response, and
importance weights may be normalized over it. The engine, which plans micro-batches, and the driver, which deals rows out
to ranks, ask the same functions. What is not known here keeps its rows where verl puts them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import verl
from verl.trainer.distillation import losses as distillation
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.utils import losses
from verl.workers.utils.losses import ppo_loss, sft_loss, value_loss

from prefix_grouper_plugins.modeling.code_origin import home_of, roots_of

# Of verl's policy losses, those that compute a loss for each token of a row and leave the rest to `agg_loss`.
_TOKEN_WISE = frozenset("vanilla dppo_tv dppo_kl gspo sapo gpg dro cispo bypass_mode".split())
_SUMS_OVER_ROWS = frozenset("token-mean token-sum seq-mean-token-sum seq-mean-token-mean".split())
_BY_LONGEST_RESPONSE = "seq-mean-token-sum-norm"
# Of all losses, where verl's modules hold them.
_PARTS = ("agg_loss", "kl_penalty", "get_policy_loss_fn", "compute_value_loss", "masked_sum", "masked_mean")
_AVERAGE_OVER_ROWS = {"sapo"}  # policy losses, whatever `loss_agg_mode` says
_VERL = roots_of(verl)


def why_rows_stay(loss_function: Any, *, knows_global_batch: bool = True) -> str | None:
    """Why rows must keep their micro-batches under this loss function, None where they may move.

    Args:
        loss_function: as verl's engines take it: None where nothing but log-probs is computed, else one of verl's with
            its configs bound by :func:`functools.partial`.
        knows_global_batch: whether the batch says how many rows the optimizer step has on all ranks
            (``global_batch_size``).
    """
    if loss_function is None:
        return None
    function, given = loss_function, {}
    if type(loss_function) is partial:  # a subclass may do more
        function, given = loss_function.func, loss_function.keywords
    if function in (sft_loss, value_loss, ppo_loss, distillation.distillation_ppo_loss) and not _is_verls(function):
        return f"{function.__name__} was replaced by code that is not verl's and may depend on which rows are in one micro-batch"
    if function is sft_loss:
        return None
    config = given.get("config")
    if not knows_global_batch and config is not None:
        mode, policy_loss = str(config.get("loss_agg_mode")), config.get("policy_loss") or {}
        if mode.startswith("seq-mean"):
            return f"loss_agg_mode={mode} averages over a micro-batch where global_batch_size is missing"
        if (name := policy_loss.get("loss_mode")) in _AVERAGE_OVER_ROWS:
            return f"the policy loss {name} averages over a micro-batch where global_batch_size is missing"
    if function is value_loss and config is not None:
        return why_aggregation_keeps_rows(config)
    if function not in (ppo_loss, distillation.distillation_ppo_loss) or config is None:
        return f"{_named(function)} is not a loss of verl's that is known to be a sum over rows"
    return why_actor_rows_stay(config, given.get("distillation_config"))


def why_prompts_are_read(loss_function: Any) -> str | None:
    """Why a part of a group cannot do without log-probs (or values) of the prompt's tokens; None where responses alone are read.

    Args:
        loss_function: as verl's engines take it; None where the log-probs are the result, prompts included.
    """
    function = loss_function.func if type(loss_function) is partial else loss_function
    if function is None:
        return None
    if function is distillation.distillation_ppo_loss:
        mode = loss_function.keywords["distillation_config"].distillation_loss.get("loss_mode")
        if not _is_distillation_of_verl(mode):
            return f"the distillation loss {mode} is not known to read log-probs of responses alone"
    if function in (ppo_loss, distillation.distillation_ppo_loss, value_loss) and _is_verls(function):
        return None
    return f"{_named(function)} is not known to read log-probs of responses alone"


def why_actor_rows_stay(actor: Any, distillation_config: Any = None) -> str | None:
    """:func:`why_rows_stay` of the loss that verl makes from ``actor`` and ``distillation``, dataclasses or Hydra's."""
    if reason := why_aggregation_keeps_rows(actor):
        return reason
    policy_loss = actor.get("policy_loss") or {}
    if reason := _why_policy_loss_keeps_rows(policy_loss.get("loss_mode", "vanilla")):
        return reason
    if policy_loss.get("loss_mode") == "bypass_mode":
        correction = policy_loss.get("rollout_correction") or {}
        weighted = correction.get("rollout_is") and correction.get("loss_type", "ppo_clip") != "ppo_clip"
        if weighted and correction.get("rollout_is_batch_normalize"):
            return "rollout_is_batch_normalize divides by the mean weight of each micro-batch"
    if distillation_config is None or not distillation.is_distillation_enabled(distillation_config):
        return None
    return _why_distillation_keeps_rows(distillation_config.distillation_loss)


def why_aggregation_keeps_rows(config: Any) -> str | None:
    """:func:`why_rows_stay` of ``agg_loss``, which actor and critic (``config``) apply to every term of their losses."""
    for module in (core_algos, losses, torch_functional):
        for name in _PARTS:
            if (part := getattr(module, name, None)) is not None and not _is_verls(part):
                return f"{name} was replaced by code that is not verl's and may depend on which rows are in one micro-batch"
    mode = config.get("loss_agg_mode", "token-mean")
    if mode in _SUMS_OVER_ROWS:
        return None
    if mode != _BY_LONGEST_RESPONSE:
        return f"loss_agg_mode={mode} is not known to be a sum over rows"
    if config.get("loss_scale_factor") is not None:
        return None
    return f"loss_agg_mode={mode} divides by the longest response of each micro-batch unless loss_scale_factor is set"


def _why_policy_loss_keeps_rows(mode: str) -> str | None:
    function = core_algos.POLICY_LOSS_REGISTRY.get(mode)
    if mode in _TOKEN_WISE and getattr(function, "__module__", None) == core_algos.__name__ and _is_verls(function):
        return None
    return f"the policy loss {mode} may depend on which rows are in one micro-batch"


def _why_distillation_keeps_rows(config: Any) -> str | None:
    mode = config.get("loss_mode")
    if not _is_distillation_of_verl(mode):
        return f"the distillation loss {mode} is not known to be a sum over rows"
    if not config.get("use_policy_gradient"):
        return None
    mode = config.get("policy_loss_mode")
    if mode == "bypass_mode":  # whose settings a distillation config does not have
        return f"the policy loss {mode} of distillation is not known to be a sum over rows"
    return _why_policy_loss_keeps_rows(mode)


def _is_distillation_of_verl(mode: Any) -> bool:
    function = distillation.DISTILLATION_LOSS_REGISTRY.get(mode)
    return getattr(function, "__module__", None) == distillation.__name__ and _is_verls(function)


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _is_verls(function: Any) -> bool:
    """Whether ``function``, and all that it wraps, is code of verl: others may have put their own under its name."""
    return home_of(function, _VERL) is not None
