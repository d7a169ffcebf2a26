"""From what micro-batches forward to FLOPs, expected speed-up and peak memory of a process.

The speed-up is the ratio of FLOPs, as in :mod:`prefix_grouper_plugins.cost`, of what each way really runs: the stock
trainer's padding, and the masked halves of its attention, included. Peak memory is weights, gradients and optimizer states,
what autograd keeps of the largest micro-batch, and the buffers of the step in which the backward begins. Those are mostly the
language-model head's: verl keeps the logits of all positions, and TRL's fused head (1.15 and newer) computes a tile at a time,
so that they do not grow with the micro-batch. How far both estimates are from measurements is in docs/benchmarks.md
(``benchmarks/plan_check.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefix_grouper_plugins.cost import Cost, ModelShape, cost_of
from prefix_grouper_plugins.plan.schedule import Load

SHARES_OUTSIDE = (0.25, 0.5, 0.75)  # of a stock step: generation, rewards, optimizer
TILE_TOKENS, TILE_WIDTH = 4096, 32768  # positions and vocabulary entries that TRL's fused head computes at a time
# Without Triton, TRL turns a tile of logits into its gradient by torch operations, which hold so many tiles in float32 at
# once, besides the tile: scaled twice, log-prob, prob, gradient, and three temporaries, one of them boolean.
TILES_IN_TORCH = 7.25


@dataclass(frozen=True)
class Training:
    """How the model is trained.

    Attributes:
        shape: the model.
        num_weights: all of its weights; of a mixture of experts more than ``shape.num_weights``.
        element_size: bytes of a weight, a gradient and an activation.
        lora_rank: None where all weights are trained.
        checkpointing: gradient checkpointing of every layer.
        full_logits: the head's output exists for all scored positions at once (verl), instead of in tiles (TRL).
        on_cpu: without Triton, TRL's head works in torch operations, and on prompts and padding as well.
        forward_passes: passes without gradients in a step: old-policy and reference log-probs.
        optimizer_size: bytes of a trained weight's optimizer states, and of a master copy where there is one.
        shards: processes over which weights, gradients and optimizer states are cut (FSDP).
    """

    shape: ModelShape
    num_weights: int
    element_size: int = 2
    lora_rank: int | None = None
    checkpointing: bool = False
    full_logits: bool = False
    on_cpu: bool = False
    forward_passes: int = 0
    optimizer_size: int = 4
    shards: int = 1

    @property
    def num_trained(self) -> int:
        """Weights that have a gradient. Of LoRA: two thin matrices for each linear layer, head and embeddings left out."""
        if self.lora_rank is None:
            return self.num_weights
        shape = self.shape
        heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention = 2 * (shape.hidden_size + heads) + 2 * (shape.hidden_size + kv_heads)
        mlp = shape.mlp_matrices * (shape.hidden_size + shape.intermediate_size)
        return self.lora_rank * shape.num_layers * (attention + mlp)

    @property
    def static_bytes(self) -> int:
        """Weights, gradients and optimizer states of a process."""
        weights = self.num_weights + (0 if self.lora_rank is None else self.num_trained)
        trained = self.num_trained * (self.element_size + self.optimizer_size)
        return (weights * self.element_size + trained) // self.shards

    # ----------------------------------------------------------------------------------------------------------- FLOPs

    def cost(self, load: Load) -> Cost:
        pairs = load.pairs, load.windowed_pairs
        return cost_of(self.shape, load.tokens, pairs, self._scored(load), element_size=self.element_size)

    def _scored(self, load: Load) -> int:
        """Positions that go through the head; a prompt that is forwarded for several micro-batches has none of them."""
        return load.tokens - load.apart_tokens if self.on_cpu else load.scored

    def update_flops(self, loads: Iterable[Load]) -> int:
        """Forward and backward. Frozen weights need no gradient of their own: LoRA does two thirds of the products."""
        return sum(self._update_flops(self.cost(load)) + self._again_flops(load) for load in loads)

    def _update_flops(self, cost: Cost) -> int:
        products = 3 if self.lora_rank is None else 2
        again = cost.linear + cost.attention if self.checkpointing else 0
        head = (products if self.full_logits else products + 1) * cost.head  # tiles are computed again in the backward
        return products * cost.linear + 7 * cost.attention // 2 + again + head

    def _again_flops(self, load: Load) -> int:
        """Of layers of prompts that run again in the backward, where not all layers do."""
        pairs = load.again_pairs, load.again_windowed_pairs
        cost = cost_of(self.shape, load.again_tokens, pairs, 0, element_size=self.element_size)
        return cost.linear + cost.attention

    def step_flops(self, loads: Sequence[Load]) -> int:
        """The update and the passes without gradients."""
        return self.update_flops(loads) + self.forward_passes * sum(self.cost(load).forward_flops for load in loads)

    # ---------------------------------------------------------------------------------------------------------- memory

    def peak_bytes(self, loads: Iterable[Load]) -> int:
        """Of a process, at the beginning of the backward of the largest micro-batch."""
        return self.static_bytes + max(map(self._activations, loads))

    def _activations(self, load: Load) -> int:
        """The larger of two moments: the head's backward, when all layers hold theirs, and that of the last MLP."""
        shape, size = self.shape, self.element_size
        held = self.cost(load._replace(tokens=load.held_tokens))
        inputs = shape.num_layers * held.tokens * shape.hidden_size * size  # of each layer
        before = inputs if self.checkpointing else held.activation_bytes
        norm = held.tokens * shape.hidden_size * (4 + 2 * size)  # the last norm's input and output, and the embedding
        in_layer = held.checkpointed_bytes if self.checkpointing else before + norm
        layers = 1 if self.checkpointing else shape.num_layers
        masked = 0
        if load.mask_entries:  # keys and values repeated for each query head, and the mask as numbers
            repeated = 2 * load.tokens * (shape.num_heads - shape.num_kv_heads) * shape.head_dim * size
            masked = layers * repeated + load.mask_entries * (1 + size)
        cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * load.cached_tokens * (size + 4)
        return masked + cached + max(before + norm + self._head(load), in_layer + self._mlp(load))

    def _head(self, load: Load) -> int:
        """Logits with their gradient: of all positions, or one tile, and the sums of gradients, which are in float32."""
        shape, size, scored = self.shape, self.element_size, self._scored(load)
        if self.full_logits:
            return 2 * scored * shape.vocab_size * size
        tile = min(scored, TILE_TOKENS) * min(shape.vocab_size, TILE_WIDTH)
        rounded = size if size < 4 else 0  # a float32 sum is returned as it is
        weight = shape.vocab_size * shape.hidden_size * (4 + rounded) if self.lora_rank is None else 0
        picked = 0 if self.on_cpu else size  # on a GPU the scored states are copied out of the others
        states = scored * shape.hidden_size * (4 + rounded + picked)
        return tile * size + (round(tile * 4 * TILES_IN_TORCH) if self.on_cpu else 0) + weight + states

    def _mlp(self, load: Load) -> int:
        """Gradients inside one MLP: three of its width, where its own last input is freed before."""
        return 2 * load.tokens * self.shape.intermediate_size * self.element_size


def step_speedups(flops_speedup: float, shares: Iterable[float] = SHARES_OUTSIDE) -> dict[float, float]:
    """How many times as fast a whole step becomes, by the share of a stock step that lies outside the policy's passes."""
    return {share: 1 / (share + (1 - share) / flops_speedup) for share in shares}
