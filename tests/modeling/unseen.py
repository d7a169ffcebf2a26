"""A model class that nobody has seen: written here, with transformers' attention interface, and faults on demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

WIDTH, HEADS, SIZE = 32, 4, 97


class UnseenConfig(PreTrainedConfig):
    model_type = "unseen"


class UnseenAttention(nn.Module):
    is_causal = True

    def __init__(self, config: UnseenConfig, fault: str | None) -> None:
        super().__init__()
        self.config, self.fault = config, fault
        self.scaling = (WIDTH // HEADS) ** -0.5
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        if fault == "state leaked":  # a token takes something from the one before it, whichever row that is of
            self.decay = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        if self.fault == "state leaked":
            x = x + self.decay * torch.roll(x, 1, dims=1) * (torch.arange(x.shape[1]) > 0)[:, None]
        query, key, value = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        if self.fault == "kwarg dropped":
            attention_mask, kwargs = None, {}
        if self.fault == "mask ignored" and x.shape[0] == 1 and "prefix_layout" in kwargs:
            attention_mask, kwargs = torch.zeros(1, 1, x.shape[1], x.shape[1], dtype=x.dtype), {}
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out(output.flatten(2))


class UnseenLayer(nn.Module):
    def __init__(self, config: UnseenConfig, fault: str | None) -> None:
        super().__init__()
        self.attention = UnseenAttention(config, fault)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = x + self.attention(self.norms[0](x), **kwargs)
        return x + self.mlp(self.norms[1](x))


class UnseenForCausalLM(PreTrainedModel):
    """Learned positions, three layers; ``fault`` is in the second one alone."""

    config_class = UnseenConfig
    _supports_sdpa = True

    def __init__(self, config: UnseenConfig, fault: str | None = None) -> None:
        super().__init__(config)
        self.fault = fault
        self.embed, self.places = nn.Embedding(SIZE, WIDTH), nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList([UnseenLayer(config, fault if i == 1 else None) for i in range(3)])
        self.head = nn.Linear(WIDTH, SIZE, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if position_ids is None or self.fault == "wrong position":
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.places(position_ids)
        mask = create_causal_mask(self.config, x, attention_mask, None, position_ids=position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, **kwargs)
        return CausalLMOutputWithPast(logits=self.head(x))


def unseen(fault: str | None = None, dtype: torch.dtype = torch.float32) -> UnseenForCausalLM:
    config = UnseenConfig(vocab_size=SIZE, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS)
    torch.manual_seed(0)
    model = UnseenForCausalLM._from_config(config, attn_implementation="sdpa", fault=fault)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model.to(dtype).eval()
