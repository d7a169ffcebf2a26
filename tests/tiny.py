"""Tiny models, a tokenizer and data made on the spot: no hub, no data sets, no GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from datasets import Dataset

WORDS = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(21)]  # few, so that many completions end by themselves
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def model(model_type: str = "qwen3", *, attn_implementation: str | None = None, **changes: Any) -> PreTrainedModel:
    """A causal LM with random weights large enough that positions and masks matter."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 / weight.shape[-1] ** 0.5, generator=generator)
    built.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    return built.eval()


def saved_model(folder: Path, model_type: str = "qwen3", **changes: Any) -> str:
    """Path of a saved tiny model with its tokenizer."""
    model(model_type, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(count: int = 64, shortest: int = 3, longest: int = 12, seed: int = 0) -> Dataset:
    """Prompts of random words and lengths, so that batches are padded."""
    from datasets import Dataset  # comes with TRL, and most tests need none

    source = random.Random(seed)
    return Dataset.from_list(
        [{"prompt": " ".join(source.choices(WORDS[3:], k=source.randint(shortest, longest)))} for _ in range(count)]
    )


def rows(groups: dict[int, list[int]], seed: int = 0) -> list[torch.Tensor]:
    """Token rows with shared prompts: ``{prompt length: [response length, ...]}``."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(3, len(WORDS), (n,), generator=generator)

    return [
        torch.cat([prompt, tokens(response)])
        for length, responses in groups.items()
        for prompt in [tokens(length)]
        for response in responses
    ]


def compute_norms_in_input_dtype(module: nn.Module) -> None:
    """transformers' RMSNorms compute in float32; let float64 models compute in float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
        # From Gemma 3n on the weight is the factor, and some norms have none.
        is_offset = type(self).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
        return self._norm(x) * (1.0 + self.weight if is_offset else getattr(self, "weight", 1.0))

    for norm in module.modules():
        name = type(norm).__name__
        if name.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
            norm.forward = forward.__get__(norm)
        elif name.startswith("Gemma") and name.endswith("RMSNorm"):
            norm.forward = gemma.__get__(norm)
