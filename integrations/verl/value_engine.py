"""The critic's engine: :class:`.engine.PrefixGrouperEngine` with verl's value head in place of the language model's.

A value function has a value at each token, the last one of a row too, so its packed rows hold the last tokens as well:
``P`` tokens of a prompt instead of ``P - 1``. The values of all rows are those of verl's engine, token by token.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import verl.workers.engine.fsdp.transformer_impl as fsdp
from tensordict import TensorDict
from torch import nn
from transformers import AutoModelForTokenClassification

from prefix_grouper_plugins.integrations.verl.config import CRITIC_SETTINGS
from prefix_grouper_plugins.integrations.verl.engine import PrefixGrouperEngine
from prefix_grouper_plugins.metrics import UPDATE, VALUES, SharingCounts


class PrefixGrouperValueEngine(PrefixGrouperEngine, fsdp.FSDPEngineWithValueHead):
    """:class:`verl.workers.engine.fsdp.FSDPEngineWithValueHead` that forwards every prompt of a micro-batch once.

    Arguments, attributes and errors are those of :class:`PrefixGrouperEngine`. Its settings are
    ``critic.fsdp.prefix_grouper``, by default the actor's.
    """

    unlogged: ClassVar[Any] = SimpleNamespace(counts=SharingCounts())  # of critics, apart from those of actors
    settings = CRITIC_SETTINGS
    _score = "values"
    _forward_last = True

    @property
    def _role(self) -> str:
        return "critic"

    def _build_module(self) -> nn.Module:
        if self._wraps_policy:
            return fsdp.FSDPEngineWithValueHead._build_module(self)  # type: ignore[no-any-return]
        return super()._build_module()

    @property
    def _wraps_policy(self) -> bool:
        """Whether verl may take trl's wrapper around a language model, for want of a model with a head for each token."""
        return type(self.model_config.hf_config) not in AutoModelForTokenClassification._model_mapping

    def _why_not_by_this_engine(self, module: nn.Module) -> list[str]:
        if hasattr(module, "v_head"):
            kind = self._model_type
            return [f"the values of {kind} are those of trl's wrapper, which no test has compared with packed rows"]
        return super()._why_not_by_this_engine(module)

    def _pass_of(self, forward_only: bool) -> str:
        return VALUES if forward_only else UPDATE

    def _limited_as(self, data: TensorDict) -> str:
        if self._pass != UPDATE:
            return VALUES
        # verl's V1 trainer, whose prompts are nested, gives both passes one limit.
        is_v1 = "prompts" in data and data["prompts"].is_nested
        return "critic_update_v1" if is_v1 else "critic_update"
