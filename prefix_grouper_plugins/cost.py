"""What a layout costs: FLOPs, memory and the speed-up to expect, against forwarding each row on its own.

Only matrix products are counted, and those of any forest are counted exactly: linear layers cost by token, attention by
visible pair of query and key, the language-model head by scored position. A multiplication and an addition are two FLOPs.
The backward of a matrix product is two products; a flash backward has five products where its forward has two. So a
training step costs

    3 * linear + 3.5 * attention + 3 * head

and with gradient checkpointing, which runs the layers and our chunked head again, 4 * linear + 4.5 * attention + 4 *
head. tests/test_cost.py compares with what ``torch.utils.flop_counter`` counts on real steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefix_grouper_plugins.forest import visible_pairs, visible_pairs_of_rows
from prefix_grouper_plugins.layout import PrefixLayout


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size: as in transformers' configs.
        intermediate_size: width of the MLP; of a mixture of experts, the widths that one token meets, added up.
        mlp_matrices: 3 for gate, up and down; 2 for an MLP without a gate.
        tied_head: input embedding and language-model head are one weight; costs memory once, FLOPs all the same.
        sliding_window: tokens that a query of the ``num_windowed_layers`` sees; other layers see the whole row.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    mlp_matrices: int = 3
    tied_head: bool = False
    sliding_window: int | None = None
    num_windowed_layers: int = 0

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape of a transformers ``config`` (of a multimodal model: its text model).

        Raises:
            ValueError: the model type is not among those whose cost is known here, or its layers are of two kinds.
        """
        from prefix_grouper_plugins.modeling.model_types import known_of  # brings transformers, as the config did

        config = config.get_text_config(decoder=True)
        kind = config.model_type
        layer_cost = known_of(kind).layer_cost
        if layer_cost is None:
            raise ValueError(
                f"the cost of model type {kind!r} is not known: give a ModelShape with the sizes of a model of your own"
            )
        window = getattr(config, "sliding_window", None)
        layers = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        windowed = layers.count("sliding_attention") if window else 0
        return cls(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=_active_width(config),
            vocab_size=config.vocab_size,
            mlp_matrices=2 if layer_cost == "ungated" else 3,
            tied_head=bool(config.tie_word_embeddings),
            sliding_window=window if windowed else None,
            num_windowed_layers=windowed,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that take part in a token's matrix products."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def num_weights(self) -> int:
        """Weights of all matrices, embeddings included; of a mixture of experts, those that one token meets."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_layers * self.layer_weights + embeddings


def _active_width(config: Any) -> int:
    """Width of the MLP, or of all experts that one token meets."""
    active = getattr(config, "num_experts_per_tok", None)
    if not active:
        return config.intermediate_size
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError("some layers have experts and others have not: give a ModelShape with their mean width")
    routed = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return active * routed + (getattr(config, "shared_expert_intermediate_size", None) or 0)


# Published configs, for `prefix-grouper plan --shape` and the benchmarks.
SHAPES = {
    "qwen2.5-0.5b": ModelShape(896, 24, 14, 2, 64, 4864, 151936, tied_head=True),
    "qwen2.5-1.5b": ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied_head=True),
    "qwen2.5-7b": ModelShape(3584, 28, 28, 4, 128, 18944, 152064),
    "qwen2.5-32b": ModelShape(5120, 64, 40, 8, 128, 27648, 152064),
    "llama-3.1-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256),
}


@dataclass(frozen=True)
class Cost:
    """One pass over some rows: forward FLOPs by where they go, and bytes.

    Attributes:
        tokens: tokens that are forwarded.
        pairs: visible pairs of query and key, of one head in a layer without a window.
        linear, attention, head: FLOPs of the forward.
        kv_bytes: keys and values of all layers.
        activation_bytes: what autograd keeps for the backward, logits apart, as a Llama-like layer of transformers
            keeps it with an attention that saves query, key, value, output and log-sum-exp.
        checkpointed_bytes: the same under gradient checkpointing: each layer's input, and one layer in full.
    """

    tokens: int
    pairs: int
    linear: int
    attention: int
    head: int
    kv_bytes: int
    activation_bytes: int
    checkpointed_bytes: int

    @property
    def forward_flops(self) -> int:
        return self.linear + self.attention + self.head

    @property
    def training_flops(self) -> int:
        """Forward and backward, all weights trained."""
        return 3 * self.linear + 7 * self.attention // 2 + 3 * self.head

    @property
    def checkpointed_training_flops(self) -> int:
        """Forward and backward with one more forward of every layer and of the head."""
        return self.training_flops + self.forward_flops


@dataclass(frozen=True)
class Comparison:
    """The same rows packed (``shared``) and each on its own, without padding (``ordinary``)."""

    shared: Cost
    ordinary: Cost

    @property
    def token_ratio(self) -> float:
        """Tokens forwarded, divided by the rows' tokens; smaller is better, as in the metric of this name."""
        return self.shared.tokens / self.ordinary.tokens

    @property
    def pair_ratio(self) -> float:
        """Visible pairs, divided by those of the rows."""
        return self.shared.pairs / self.ordinary.pairs

    @property
    def speedup(self) -> float:
        """Bound on how many times as fast a training step becomes: the ratio of FLOPs, at equal FLOP/s."""
        return self.ordinary.training_flops / self.shared.training_flops

    @property
    def checkpointed_speedup(self) -> float:
        """`speedup` under gradient checkpointing."""
        return self.ordinary.checkpointed_training_flops / self.shared.checkpointed_training_flops


def compare(shape: ModelShape, layout: PrefixLayout, *, scored: int | None = None, element_size: int = 2) -> Comparison:
    """Cost of the rows of ``layout``, packed and each on its own.

    Args:
        shape: the model.
        layout: the rows.
        scored: positions of the rows that go through the language-model head, by default each row's ``L_i - 1``. Both
            ways score them row by row; a trainer scores the responses only.
        element_size: bytes of an activation, 2 for bfloat16.
    """
    scored = sum(length - 1 for length in layout.row_lengths) if scored is None else scored
    alone = [visible_pairs_of_rows(layout.row_lengths, window) for window in (None, shape.sliding_window)]
    packed = [visible_pairs(layout.segments, window) for window in (None, shape.sliding_window)]
    return Comparison(
        shared=cost_of(shape, layout.num_tokens, packed, scored, element_size=element_size),
        ordinary=cost_of(shape, layout.num_row_tokens, alone, scored, element_size=element_size),
    )


def cost_of(shape: ModelShape, tokens: int, pairs: Sequence[int], scored: int, *, element_size: int = 2) -> Cost:
    """Cost of a forward.

    Args:
        shape: the model.
        tokens: positions that are forwarded.
        pairs: of query and key that attention computes for one head, in a layer without a window and in one with it.
        scored: positions that go through the language-model head.
        element_size: bytes of an activation.
    """
    full = shape.num_layers - shape.num_windowed_layers
    all_pairs = full * pairs[0] + shape.num_windowed_layers * pairs[1]
    layer = tokens * _saved_bytes(shape, element_size)
    return Cost(
        tokens=tokens,
        pairs=pairs[0],
        linear=2 * shape.num_layers * shape.layer_weights * tokens,
        attention=4 * shape.num_heads * shape.head_dim * all_pairs,
        head=2 * shape.hidden_size * shape.vocab_size * scored,
        kv_bytes=2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens * element_size,
        activation_bytes=shape.num_layers * layer,
        checkpointed_bytes=shape.num_layers * tokens * shape.hidden_size * element_size + layer,
    )


def _saved_bytes(shape: ModelShape, element_size: int) -> int:
    """Bytes that one layer keeps for the backward of one token.

    Two norms keep their input in float32, its scale, and the normalised value; attention keeps query, key, value,
    output and a float32 log-sum-exp; each linear layer its input; a gated MLP gate, activated gate and up.
    """
    norms = 2 * (4 * shape.hidden_size + 4) + 4 * shape.hidden_size * element_size
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * element_size + 4 * shape.num_heads
    mlp = (4 if shape.mlp_matrices == 3 else 2) * shape.intermediate_size * element_size
    return norms + attention + mlp
