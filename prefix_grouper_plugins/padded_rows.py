"""The rows of any padded batch and their packed row: every real token forwarded, and what rows begin alike with once.

Where :class:`~prefix_grouper_plugins.batch.GroupedBatch` knows prompts and completions and scores next tokens, this knows
nothing but tokens: it gives each real token of each row its hidden state back, whatever is done with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefix_grouper_plugins.layout import PrefixLayout


class PaddedRows:
    """Rows that are padded on the left, on the right or on both sides, and their packed row.

    Rows share what they have in common from their first real token on, as a forest of any depth, provided that the tokens
    have the same positions. With all levels shared, a position of the packed row is one distinct beginning of a row, so
    ``T`` is the size of the rows' trie.

    Args:
        input_ids: ``[B, W]``, of any integer dtype, at least one real token in all.
        attention_mask: ``[B, W]``, other than 0 on real tokens; None where all are real.
        position_ids: ``[B, W]`` or ``[1, W]``; None where the model numbers tokens itself.
        padded_positions: without ``position_ids``, the model numbers padded columns, not each row's real tokens.
        min_level: share levels of the trie of at least this many tokens.
        beginnings: ``LongTensor[B, W]`` on the CPU, what tokens are compared by in place of ``input_ids``.

    Attributes:
        layout (`PrefixLayout`): on the device of ``input_ids``. Its rows have one token before those of the batch, so
            that the transitions which it counts are the tokens of the batch; its :meth:`PrefixLayout.labels` mean nothing.
        input_ids, position_ids (`LongTensor[T]`): of the packed row.
        lengths (`list[int]`): real tokens of each row.
        num_roots (`int`): rows that share nothing with a row before them.

    Raises:
        ValueError: see :func:`why_not_rows`.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        padded_positions: bool = False,
        min_level: int = 1,
        beginnings: Tensor | None = None,
    ) -> None:
        device, self._shape = input_ids.device, tuple(input_ids.shape)
        ids = input_ids.cpu().long()
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
        positions = None if position_ids is None else position_ids.cpu().expand(self._shape)
        if (reason := why_not_rows(ids, real, positions)) is not None:
            raise ValueError(reason)
        starts, self.lengths = _first_real(real).tolist(), real.sum(1).tolist()
        kept = [row for row, length in enumerate(self.lengths) if length]
        spans = [slice(starts[row], starts[row] + self.lengths[row]) for row in kept]
        compared = ids if beginnings is None else beginnings
        own = [compared[row, span] for row, span in zip(kept, spans, strict=True)]
        if positions is not None:
            numbers = [positions[row, span] for row, span in zip(kept, spans, strict=True)]
        else:
            first = [starts[row] if padded_positions else 0 for row in kept]
            numbers = [torch.arange(start, start + len(row)) for start, row in zip(first, own, strict=True)]

        token = torch.zeros(1, dtype=torch.long)  # the one before, and one after what is packed
        layout = PrefixLayout.from_rows(
            [torch.cat([token, row]) for row in own], [int(n[0]) for n in numbers], min_level=min_level
        )
        self.layout = layout.to(device)
        self.num_roots = int((layout.segments[:, 2] < 0).sum())
        places = torch.arange(ids.numel()).view(self._shape)
        self._places = layout.pack(
            [torch.cat([places[row, span], token]) for row, span in zip(kept, spans, strict=True)]
        )
        self.input_ids = self.pack(ids).to(device)
        self.position_ids = layout.pack([torch.cat([n, token]) for n in numbers]).to(device)
        source = torch.full(self._shape, layout.num_tokens)  # padding takes the zeros that unpack appends
        source[real] = layout.row_index
        self._source = source.flatten().to(device)

    @property
    def num_row_tokens(self) -> int:
        """Real tokens of the batch, which an ordinary forward without padding would process."""
        return sum(self.lengths)

    @property
    def has_something_in_common(self) -> bool:
        """Whether any two rows share a token."""
        return self.layout.num_tokens < self.num_row_tokens

    def pack(self, values: Tensor) -> Tensor:
        """Values of the padded batch, ``[B, W, ...]``, to packed ``[T, ...]``; shared positions take the first row's."""
        return values.flatten(0, 1)[self._places.to(values.device)]

    def unpack(self, values: Tensor) -> Tensor:
        """Packed ``[T, ...]`` to the padded batch, ``[B, W, ...]``, zeros at padding. Differentiable.

        Raises:
            ValueError: ``values`` has another number of positions than the packed row.
        """
        if len(values) != self.layout.num_tokens:
            raise ValueError(f"values has {len(values)} positions, the packed row has {self.layout.num_tokens}")
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded.index_select(0, self._source).view(*self._shape, *values.shape[1:])


def why_not_rows(input_ids: Tensor, real: Tensor, position_ids: Tensor | None) -> str | None:
    """Why a batch is not made of rows with padding around them; None if it is.

    Args:
        input_ids: ``[B, W]``.
        real: ``BoolTensor[B, W]``, true on real tokens.
        position_ids: ``[B, W]``, or None.
    """
    if input_ids.dim() != 2 or real.shape != input_ids.shape:
        return (
            f"input_ids has shape {tuple(input_ids.shape)} and attention_mask {tuple(real.shape)}: not [rows, tokens]"
        )
    if not real.any():
        return "attention_mask hides every token"
    start, column = _first_real(real)[:, None], torch.arange(real.shape[1])
    if not torch.equal(real, (column >= start) & (column < start + real.sum(1, keepdim=True))):
        return "attention_mask hides tokens in the middle of a row"
    if position_ids is not None:
        steps = position_ids.diff(dim=1) == 1
        if not bool((steps | ~(real[:, 1:] & real[:, :-1])).all()):
            return "position_ids do not count through a row, as in batches without padding that hold several texts in one row"
    return None


def _first_real(real: Tensor) -> Tensor:
    """``LongTensor[B]``: the column of each row's first real token, 0 for a row without one."""
    return real.int().argmax(1)
