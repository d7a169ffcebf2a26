"""Packed and rows: the rows of a layout as an ordinary right-padded batch, and the way back."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout


class Rows:
    """The rows of a layout as a right-padded batch, ``B`` rows of ``L`` transitions; padding of the layout is a row too.

    Attributes:
        index (`LongTensor[B, L]`): the packed position of each place; 0 where a row is padded.
        home (`LongTensor[T]`): the place, ``row * L + column``, from which each packed position takes its value.
    """

    def __init__(self, layout: PrefixLayout) -> None:
        lengths = [length - 1 for length in layout.row_lengths if length > 1]
        positions = list(layout.row_index.split(lengths))
        if layout.num_padding:
            tail = torch.arange(layout.num_tokens, device=layout.row_index.device)[-layout.num_padding :]
            positions.append(tail)
        self.index = nn.utils.rnn.pad_sequence(positions, batch_first=True)
        longest = self.index.shape[1]
        column = torch.arange(longest, device=self.index.device)
        real = column < torch.tensor([len(p) for p in positions], device=column.device)[:, None]
        place = torch.arange(self.index.numel(), device=column.device).view_as(self.index)
        home = torch.full((layout.num_tokens,), self.index.numel(), device=column.device)
        # The first row that holds a position, whatever the order in which a device would write.
        self.home = home.scatter_reduce(0, self.index[real], place[real], "amin")

    def check(self, x: Tensor) -> None:
        """Raise a ValueError if ``x`` is not packed."""
        if x.shape[:2] != (1, len(self.home)):
            raise ValueError(
                f"got {x.shape[0]} row(s) of {x.shape[1]} tokens with a layout of {len(self.home)} tokens: a packed batch "
                "is one row, and nothing may be cached, padded or cut on the way"
            )

    def expand(self, x: Tensor) -> Tensor:
        """Packed ``[1, T, ...]`` to rows ``[B, L, ...]``."""
        self.check(x)
        return x[0][self.index]

    def collapse(self, x: Tensor) -> Tensor:
        """Rows ``[B, L, ...]`` to packed ``[1, T, ...]``."""
        return x.flatten(0, 1)[self.home].unsqueeze(0)


_ROWS: weakref.WeakKeyDictionary[PrefixLayout, Rows] = weakref.WeakKeyDictionary()


def rows_of(layout: PrefixLayout) -> Rows:
    """The batch of rows of ``layout``, worked out once for each layout."""
    if layout not in _ROWS:
        with torch.inference_mode(False):  # a later training step may use it as well
            _ROWS[layout] = Rows(layout)
    return _ROWS[layout]
