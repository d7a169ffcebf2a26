"""Qwen2.5 and Qwen3 models with random weights, and the published package inside one, for actor_update.py and flops.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from methods import grouped_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from prefix_grouper_plugins.cost import SHAPES, ModelShape

TINY = ModelShape(64, 2, 4, 2, 16, 128, 256, tied_head=True)
SIZES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
QWEN3 = {  # normalises queries and keys
    "qwen3-4b": ModelShape(2560, 36, 32, 8, 128, 9728, 151936, tied_head=True),
    "tiny-qwen3": TINY,
}
MODELS = {"tiny": TINY, **{name: SHAPES[name] for name in SIZES}, **QWEN3}
# What a CPU trains in seconds, in the proportions of Qwen2.5: an MLP that is 5.5 times as wide as the model, and with four layers a
# head that holds a tenth of the weights, as in 7B. Narrower models spend more on attention, which is not shared in full.
SMALL = ModelShape(512, 4, 8, 2, 64, 2816, 4096, tied_head=True)
_PUBLISHED = "published_prefix_grouper"


def shape_of(name: str, layers: int | None = None) -> ModelShape:
    """A shape of `MODELS`, with another number of layers if asked for."""
    return MODELS[name] if layers is None else dataclasses.replace(MODELS[name], num_layers=layers)


def build(shape: ModelShape, device: str, dtype: torch.dtype, qwen3: bool = False) -> PreTrainedModel:
    """A Qwen2 or Qwen3 model of this shape, its weights random, in training mode."""
    config = (Qwen3Config if qwen3 else Qwen2Config)(
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_head,
        max_position_embeddings=131_072,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


def use_published_attention(model: nn.Module) -> None:
    """Let every attention layer of a model call `PrefixGrouper.forward`, as the package's README says to."""
    AttentionInterface.register(_PUBLISHED, _published_attention)
    model.config._attn_implementation = _PUBLISHED  # type: ignore[union-attr]


def published_inputs(grouper: Any, prompt: int, response: int, group: int, device: str) -> dict[str, Any]:
    """Arguments of a model under `use_published_attention`, but for ``input_ids``."""
    positions = [torch.arange(prompt)] + [torch.arange(prompt, prompt + response)] * group
    return {
        "position_ids": torch.cat(positions).to(device)[None],
        # Anything 4-D is handed through unchanged; the function below does without.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "use_cache": False,
        "grouped_attention": grouped_attention(grouper, prompt, response, device),
    }


def _published_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, grouped_attention: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return grouped_attention(query, key, value), None
