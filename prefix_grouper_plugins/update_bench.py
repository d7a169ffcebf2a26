"""Time the update of one group on this machine with a model of the user's shape: stock, and with its prompt shared.

An update is forward and backward of a policy-gradient loss, in micro-batches of so many rows, without the optimizer.
Stock forwards padded rows, as TRL does it; shared forwards packed rows, as many micro-batches at a time as hold no more
tokens than one of stock, and where the group is larger than that, each forward reuses the prompt of the first. Both score
completion tokens alone and in chunks, as :func:`~prefix_grouper_plugins.prefix_grouped_logps` does; another head can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.bench import Step
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling import packed_inputs, transformers_model, without_prefix_grouper
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache, decoder
from prefix_grouper_plugins.scoring import CHUNK_SIZE
from prefix_grouper_plugins.token_budget import Most, RowTokens, plan_forwards

STOCK, SHARED = "stock", "shared"
IGNORED = -100  # label of a position that is not scored

# From the model, its inputs and next-token labels [B, L], -100 where nothing is scored, to log-probs [N] of the others.
Head = Callable[[nn.Module, dict[str, Any], Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """The rows of one group, as a trainer holds them.

    Attributes:
        prompt_ids: ``[G, P]``, every row the same.
        completion_ids, completion_mask: ``[G, C]``, padded on the right.
        rows: rows of a micro-batch, a divisor of ``G``.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    rows: int

    @classmethod
    def random(cls, prompt: int, responses: Sequence[int], rows: int, vocabulary: int, device: str) -> Update:
        """Random tokens of these lengths, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor(responses)
        prompt_ids = torch.randint(vocabulary, (1, prompt), generator=generator).expand(len(responses), -1)
        completion_ids = torch.randint(vocabulary, (len(responses), max(responses)), generator=generator)
        mask = (torch.arange(max(responses)) < lengths[:, None]).long()
        return cls(prompt_ids.to(device), completion_ids.to(device), mask.to(device), rows)

    @property
    def micro_batches(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Prompts and completions of each with their masks."""
        return self._split([self.rows] * (len(self.prompt_ids) // self.rows))

    @property
    def forwards(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The same, joined where several fit into the tokens of one that is padded, as ours does it in TRL."""
        prompt, width = self.prompt_ids.shape[1], self.completion_ids.shape[1]
        lengths = self.completion_mask.sum(1).tolist()
        rows = [RowTokens.of(0, prompt, length) for length in lengths]
        batches = [rows[start : start + self.rows] for start in range(0, len(rows), self.rows)]
        forwards = plan_forwards(batches, Most(self.rows * (prompt + width)), len(rows))
        return self._split([len(forward.micro_batches) * self.rows for forward in forwards])

    def _split(self, sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        blocks = (self.prompt_ids, torch.ones_like(self.prompt_ids), self.completion_ids, self.completion_mask)
        return list(zip(*(block.split(sizes) for block in blocks), strict=True))

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that each way forwards, padding included."""
        (group, prompt), width = self.prompt_ids.shape, self.completion_ids.shape[1]
        return {STOCK: group * (prompt + width), SHARED: prompt - 1 + int(self.completion_mask.sum())}


def chunked_head(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Log-probs ``[N]``, from logits of :data:`~prefix_grouper_plugins.scoring.CHUNK_SIZE` positions at a time."""
    hidden = decoder(model)(**inputs).last_hidden_state[labels != IGNORED]
    head: Any = transformers_model(model).get_output_embeddings()  # type: ignore[operator]
    parts = zip(hidden.split(CHUNK_SIZE), labels[labels != IGNORED].split(CHUNK_SIZE), strict=True)
    return torch.cat([checkpoint(_logps, head, x, y, use_reentrant=False) for x, y in parts])


def steps_of(model: nn.Module, update: Update, *, zero_grad: bool = True, head: Head = chunked_head) -> dict[str, Step]:
    """The update in both ways, by name.

    Args:
        model: a causal LM in training mode that has been through ``enable_prefix_grouper``.
        update: the group.
        zero_grad: whether a step lets go of its gradients at the end.
        head: what forwards the model and scores.
    """
    ways: dict[str, Callable[[nn.Module, Update, Head], None]] = {STOCK: _stock, SHARED: _shared}

    def step_of(way: Callable[[nn.Module, Update, Head], None]) -> Step:
        def step() -> None:
            try:
                way(model, update, head)
            finally:  # out of memory too
                if zero_grad:
                    model.zero_grad(set_to_none=True)

        return step

    return {name: step_of(way) for name, way in ways.items()}


def _stock(model: nn.Module, update: Update, head: Head) -> None:
    with without_prefix_grouper(model):  # the backward inside, since checkpointed layers look the name up again
        for prompt_ids, prompt_mask, completion_ids, mask in update.micro_batches:
            ids, attention_mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1)
            labels = torch.full_like(ids, IGNORED)
            labels[:, prompt_ids.shape[1] - 1 : -1] = completion_ids.masked_fill(mask == 0, IGNORED)
            _backward(head(model, {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}, labels))


def _shared(model: nn.Module, update: Update, head: Head) -> None:
    batches = [GroupedBatch(*blocks) for blocks in update.forwards]
    cache = PromptCache()
    if len(batches) > 1:
        prompt = update.prompt_ids[0]
        cache.run(model, PrefixLayout.from_rows([prompt.cpu()]).to(prompt.device), prompt[:-1])
        batches = [batch.behind_prompt() for batch in batches]
    for number, batch in enumerate(batches, 1):
        if len(batches) > 1:
            cache.prepare(batch.layout, last=number == len(batches))
        labels = torch.full_like(batch.labels, IGNORED)
        labels[batch.positions] = batch.labels[batch.positions]
        _backward(head(model, packed_inputs(batch.layout, batch.input_ids, batch.position_ids), labels[None]))


def _backward(logps: Tensor) -> None:
    """Backward of a loss in which each of the tokens ``[N]`` has an advantage of its own."""
    (logps * torch.linspace(-1, 1, len(logps), device=logps.device)).sum().backward()


def _logps(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
