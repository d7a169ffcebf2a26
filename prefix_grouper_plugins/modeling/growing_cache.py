"""Keys and values of generation that are appended in place.

transformers' dynamic cache makes a new tensor of all keys and of all values for each token that is generated. With long
prompts that copy takes a good part of the time of a forward of one token for each row. Here a layer keeps room for more
tokens than it has, and hands out views of it: the same numbers, of the same shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """:class:`transformers.cache_utils.DynamicLayer` that copies what it has only when its room is used up.

    That is ``L / 32 + 64`` tokens where it has ``L``: 3 % of its memory, and a copy every so many tokens. Whatever else
    changes `keys` or `values` (cropping) is noticed, and new room is made.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, N, D]``, and return all keys and values, ``[B, H_kv, L, D]``."""
        if not self.is_initialized or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.keys = self._appended("keys", key_states)
        self.values = self._appended("values", value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Take the rows ``beam_idx [N]``, a row several times where it is named so, with room for more tokens."""
        if self.get_seq_length() == 0 or torch.is_grad_enabled():
            super().reorder_cache(beam_idx)
            return
        self.keys, self.values = (self._selected(name, beam_idx) for name in ("keys", "values"))

    def _selected(self, name: str, rows: Tensor) -> Tensor:
        old = getattr(self, name)
        room = _room(old, len(rows), old.shape[-2])
        view = room[..., : old.shape[-2], :]
        torch.index_select(old, 0, rows.to(old.device), out=view)  # where the next tokens go too, in one copy
        self._rooms()[name] = room, view
        return view

    def _appended(self, name: str, new: Tensor) -> Tensor:
        old = getattr(self, name)
        room, view = self._rooms().get(name, (old, None))
        before, total = old.shape[-2], old.shape[-2] + new.shape[-2]
        if view is not old or total > room.shape[-2]:
            room = _room(old, len(old), total)
            room[..., :before, :] = old
        room[..., before:total, :] = new
        view = room[..., :total, :]
        self._rooms()[name] = room, view
        return view

    def _rooms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of keys and of values: the room, and that part of it which was handed out last."""
        return self.__dict__.setdefault("_in_room", {})  # type: ignore[no-any-return]


def _room(like: Tensor, rows: int, tokens: int) -> Tensor:
    """Uninitialised, for ``rows`` of ``tokens``, and more."""
    return like.new_empty(rows, *like.shape[1:-2], tokens + tokens // 32 + _LEAST_ROOM, like.shape[-1])


def grow_in_place(cache: Any) -> None:
    """Let the dynamic layers of ``cache``, of full attention, append in place from now on."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
