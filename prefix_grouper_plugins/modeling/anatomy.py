"""What a model is made of, found in one walk of its module tree.

Whatever decides about a model asks for parts of it: where it mixes tokens, which configs name an attention
implementation, what draws at random, which adapters it wears. :class:`Anatomy` collects all of them while it meets each
module once, and is handed on from the check to enabling and to the self-check. It is a snapshot: who changes the
modules afterwards makes a new one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_grouper_plugins.modeling.column_positions import counts_columns
from prefix_grouper_plugins.modeling.implementations import ignored_by, looks_up_attention
from prefix_grouper_plugins.modeling.mixers.table import mixer_of
from prefix_grouper_plugins.modeling.rope import RowLimit, limits_of

# What modules call the rate of their dropout, and that of other random changes while they train: noise on a router's
# input (mixtral, minimax, dbrx) or on embeddings (NEFTune), layers that are left out (opt, biogpt, xglm; in vision towers).
_DROPOUT = re.compile(r"dropout|pdrop")
_OTHER_RANDOMNESS = re.compile(r"jitter|noise|layer_?drop|drop_path|drop_prob")


class Layer(NamedTuple):
    """A module that mixes tokens, by its name in the model, and what attention layers say about themselves."""

    name: str
    module: nn.Module

    @property
    def implementation(self) -> str:
        """The user's own attention implementation, ``sdpa`` say; empty where the config names none."""
        config = getattr(self.module, "config", None)
        return (getattr(config, "_attn_implementation", None) or "").split(":")[-1]

    @property
    def window(self) -> int | None:
        """The layer's own sliding window; models whose layers are all alike keep it in their config (mistral)."""
        if hasattr(self.module, "sliding_window"):
            return self.module.sliding_window  # type: ignore[return-value]
        config = getattr(self.module, "config", None)
        return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)

    @property
    def softcap(self) -> float | None:
        """None also where the implementation ignores it."""
        return None if "softcap" in self.ignored else getattr(self.module, "attn_logit_softcapping", None)

    @property
    def sinks(self) -> Any:
        """None also where the implementation ignores them."""
        return None if "s_aux" in self.ignored else getattr(self.module, "sinks", None)

    @property
    def ignored(self) -> frozenset[str]:
        """What the layer has and the user's own implementation ignores, so that packed rows do so too."""
        has = {"softcap": "attn_logit_softcapping", "s_aux": "sinks"}
        found = {argument for argument, name in has.items() if getattr(self.module, name, None) is not None}
        return ignored_by(self.implementation) & found

    @property
    def dropout(self) -> float:
        """The rate of the dropout on its attention weights."""
        names = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")  # the last one in opt and biogpt
        rates = (getattr(self.module, name, None) or 0.0 for name in names)
        return max(float(rate.p if isinstance(rate, nn.Dropout) else rate) for rate in rates)

    @property
    def head_dims(self) -> tuple[int, int]:
        """Head dims of query and key, and of value. Multi-head latent attention has names of its own for them."""
        config: Any = getattr(self.module, "config", None)
        heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
        by_width = width // heads if heads and width else 64
        own = (getattr(self.module, name, None) for name in ("qk_head_dim", "head_dim"))
        head_dim = next((dim for dim in own if isinstance(dim, int)), by_width)
        value_dim = getattr(self.module, "v_head_dim", None)
        return head_dim, value_dim if isinstance(value_dim, int) else head_dim


class Rate(NamedTuple):
    """A setting of randomness that is on: the class that has it, its name there, and its value."""

    owner: str
    name: str
    value: float


class Anatomy:
    """The parts of a model, in the order of :meth:`torch.nn.Module.named_modules`.

    Args:
        model: a transformers model, bare or wrapped (PEFT, DDP, FSDP). Any other module is taken as well; then `base` is
            None.

    Attributes:
        model: what was given.
        base: the transformers model in it, or None.
        text: the part of a multimodal model that mixes tokens; of any other model `base` itself, without towers that see
            no token ids.
        modules: all modules under `model` with their names, each once.
        base_modules: `base` and all modules under it.
        models, text_models: the transformers models at and under `base` and `text`.
        configs: the distinct configs under `text` that name an attention implementation.
        attention_layers: modules under `text` that look their attention up in transformers' ``AttentionInterface``.
        mixers: modules that mix tokens past that interface and are known (modeling/mixers/table.py).
        layers_with_mixers: the decoder layers around them: the nearest module that transformers checkpoints, or the
            parent, which may be the model itself.
        adapters: configs of PEFT by the names of the adapters; no wrapper (DDP, FSDP) hides them.
        row_limits: lengths of rows from which on rotary angles depend on the longest row, see modeling/rope.py.
        modules_with_row_limit: the modules that hand positions to such a rotary embedding, with its limits.
        dropout_rates: dropout that is active, on whatever.
        randomness: what else draws at random in training.
        int8_thresholds: thresholds of bitsandbytes' ``Linear8bitLt`` that are on.
        column_positions: embeddings that number tokens by their columns, see modeling/column_positions.py.
        numbers_positions: the module that numbers positions by the model's own padding token, or None.
        indexers: names of classes that choose keys by scores of their own.
        parameters: each once.
        checkpointable: modules on which transformers switches gradient checkpointing on and off.
        is_sharded: whether parameters are spread over processes, so that all of them must forward together.
        has_experts: whether any module is called an expert.
        has_generators: whether any module holds a random generator of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base: Any = None
        self.text: Any = None
        self.modules: list[tuple[str, nn.Module]] = []
        self.base_modules: list[nn.Module] = []
        self.models: list[PreTrainedModel] = []
        self.text_models: list[PreTrainedModel] = []
        self.attention_layers: list[Layer] = []
        self.mixers: list[Layer] = []
        self.adapters: dict[str, Any] = {}
        self.row_limits: list[RowLimit] = []
        self.text_row_limits: list[RowLimit] = []
        self.modules_with_row_limit: list[tuple[nn.Module, list[RowLimit]]] = []
        self.dropout_rates: set[float] = set()
        self.randomness: set[Rate] = set()
        self.int8_thresholds: set[float] = set()
        self.column_positions: list[nn.Module] = []
        self.numbers_positions: Any = None
        self.indexers: set[str] = set()
        self.checkpointable: list[nn.Module] = []
        self.is_sharded = False
        self.has_experts = False
        self.has_generators = False
        self._configs: dict[int, Any] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._layers_with_mixers: dict[int, nn.Module] = {}
        self._first_weight: nn.Parameter | None = None
        self._walk("", model, (), in_text=False, seen=set())
        for config in self.adapters.values():  # some adapters keep the rate of their dropout there alone
            self.dropout_rates |= {rate for name, rate in _rates_of(config) if _DROPOUT.search(name)}

    # ------------------------------------------------------------------------------------------------------- the answers

    @property
    def config(self) -> Any:
        """The config of `text`."""
        return self.text.config

    @property
    def configs(self) -> list[Any]:
        return list(self._configs.values())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    @property
    def layers_with_mixers(self) -> list[nn.Module]:
        return list(self._layers_with_mixers.values())

    @property
    def first_weight(self) -> nn.Parameter | None:
        """The first parameter of `base`, which tells where the model is and in which dtype."""
        return self._first_weight

    @property
    def row_limit(self) -> RowLimit | None:
        """The lowest of `row_limits`: while every row of a forward is shorter, each has the angles that it has alone."""
        return min(self.row_limits, default=None)

    @property
    def largest_window(self) -> int | None:
        """The longest sliding window of any attention layer; None where there is none."""
        return max((window for layer in self.attention_layers if (window := layer.window) is not None), default=None)

    # --------------------------------------------------------------------------------------------------------- the walk

    def _walk(
        self, name: str, module: nn.Module, around: tuple[nn.Module, ...], *, in_text: bool, seen: set[int]
    ) -> None:
        """Meet ``module`` and all below it. ``around``: the modules that hold it, outermost first."""
        seen.add(id(module))
        if self.base is None and isinstance(module, PreTrainedModel):
            self.base, self.text = module, text_part(module)
        in_text = (in_text or module is self.text) and not self._is_tower(module)
        self._meet(name, module, around, in_text)
        limits = []
        for child_name, child in module._modules.items():
            if child is None:
                continue
            limits += limits_of(child)
            if id(child) not in seen:
                inner = f"{name}.{child_name}" if name else child_name
                self._walk(inner, child, (*around, module), in_text=in_text, seen=seen)
        if limits:
            self.modules_with_row_limit.append((module, limits))
        if module is self.base:
            first = next(i for i, (_, other) in enumerate(self.modules) if other is module)
            self.base_modules = [other for _, other in self.modules[first:]]

    def _is_tower(self, module: nn.Module) -> bool:
        """Whether a model within the text part sees pixels or sound, and so does not run on tokens."""
        is_part = isinstance(module, PreTrainedModel) and module is not self.text and module is not self.base
        return is_part and "text" not in getattr(module, "input_modalities", "text")

    def _meet(self, name: str, module: nn.Module, around: tuple[nn.Module, ...], in_text: bool) -> None:
        self.modules.append((name, module))
        self._note_parameters(module)
        self._note_rates(module)
        owners = (*type(module).__mro__, module)
        self.has_generators |= any(isinstance(value, torch.Generator) for own in owners for value in vars(own).values())
        if isinstance(module, PreTrainedModel):
            self.models.append(module)
            if in_text:
                self.text_models.append(module)
        if mixer_of(module) is not None:
            self.mixers.append(Layer(name, module))
            parent = next((m for m in reversed(around) if not isinstance(m, nn.ModuleList)), module)
            layer = next((m for m in reversed(around) if isinstance(m, GradientCheckpointingLayer)), parent)
            self._layers_with_mixers[id(layer)] = layer
        elif in_text and _uses_attention_interface(module) and not _is_cross_attention(module):
            self.attention_layers.append(Layer(name, module))
        config = getattr(module, "config", None)
        if in_text and isinstance(config, PreTrainedConfig) and config._attn_implementation is not None:
            self._configs[id(config)] = config
        limits = limits_of(module)
        self.row_limits += limits
        self.text_row_limits += limits if in_text else []
        if in_text and around and counts_columns(module, around[-1]):
            self.column_positions.append(module)
        self._note_peculiarities(name, module)

    def _note_parameters(self, module: nn.Module) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                self._parameters[id(parameter)] = parameter
                self.is_sharded |= isinstance(parameter, DTensor)
                if self.base is not None and self._first_weight is None:
                    self._first_weight = parameter

    def _note_rates(self, module: nn.Module) -> None:
        if isinstance(module, nn.Dropout) and module.p > 0:
            self.dropout_rates.add(module.p)
        # opt, biogpt, seed_oss and starcoder2 keep plain numbers and call the function.
        for name, rate in _rates_of(module):
            if _DROPOUT.search(name):
                self.dropout_rates.add(rate)
            if _OTHER_RANDOMNESS.search(name):
                self.randomness.add(Rate(type(module).__name__, name, rate))

    def _note_peculiarities(self, name: str, module: nn.Module) -> None:
        kind = type(module).__name__
        self.is_sharded |= isinstance(module, FullyShardedDataParallel)
        self.has_experts |= "expert" in name.lower()
        if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in vars(module):
            self.checkpointable.append(module)
        if not self.adapters and isinstance(configs := getattr(module, "peft_config", None), dict):
            self.adapters = configs
        # PEFT's layer around the one of bitsandbytes has the same name, but no state.
        if kind == "Linear8bitLt" and (threshold := getattr(getattr(module, "state", None), "threshold", 0.0)) > 0:
            self.int8_thresholds.add(threshold)
        if self.numbers_positions is None and hasattr(module, "create_position_ids_from_input_ids"):
            self.numbers_positions = module
        if "Indexer" in kind:
            self.indexers.add(kind)


def transformers_model(model: nn.Module) -> Any:
    """The transformers model inside of ``model`` and its wrappers (PEFT, DDP, FSDP); None where there is none."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def is_multimodal(config: Any) -> bool:
    """Whether a decoder of text is one part of several, so that forwards of text may leave parts out."""
    return config.get_text_config(decoder=True) is not config


def text_part(base: Any) -> Any:
    """The part of a multimodal model that mixes tokens; any other transformers model itself."""
    if base.config.is_encoder_decoder or not is_multimodal(base.config):
        return base
    return base.get_decoder() or base


def decoder_of(base: PreTrainedModel) -> nn.Module | None:
    """The module whose output are the last hidden states; None where it is not known or `base` itself.

    Not ``base_model``: opt calls the decoder inside of it.
    """
    decoder = base.get_decoder()
    # llama4_text calls it otherwise than it says; what modernbert calls decoder is its projection.
    wrong = (base, base.get_output_embeddings())
    return getattr(base, "model", None) if any(decoder is module for module in wrong) else decoder


def row_limit(model: nn.Module) -> RowLimit | None:
    """The length in tokens from which on one row changes the rotary angles of all rows of its forward.

    RoPE of the kinds "dynamic" and "longrope" (transformers' ``dynamic_rope_update``) does that. While every row of a
    forward is shorter, padding included where it is numbered, each has the angles that it has alone.

    Returns:
        that length and the kind, of the module with the lowest; None where there is no such module.
    """
    return Anatomy(model).row_limit


def _rates_of(owner: Any) -> Iterator[tuple[str, float]]:
    """Attributes that are positive numbers, by name."""
    for name, value in vars(owner).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            yield name, value


def _uses_attention_interface(module: nn.Module) -> bool:
    kind = type(module).__name__
    return (
        ("Attention" in kind or kind.endswith("MLA"))
        and not kind.endswith(("Layer", "Norm", "Residual"))  # what surrounds attention in some models
        and looks_up_attention(type(module))  # type: ignore[arg-type]
    )


def _is_cross_attention(module: nn.Module) -> bool:
    """Whether a decoder's attention reads an encoder only, so that it does not run on text alone (BART and its kin).

    A call that does run it is refused by its own, since it is not causal.
    """
    return (
        getattr(module, "is_decoder", False) is True
        and getattr(module, "is_causal", True) is False
        and "key_value_states" in inspect.signature(type(module).forward).parameters
    )
