"""Keys and values of generation that are appended in place.

transformers' dynamic cache makes a new tensor of all keys and of all values for each token that is generated. With long
prompts that copy takes a good part of the time of a forward of one token for each row. Here a layer keeps room for more
tokens than it has, and hands out views of it: the same numbers, of the same shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """:class:`transformers.cache_utils.DynamicLayer` that copies what it has only when its room is used up.

    That is ``L / 32 + 64`` tokens where it has ``L``: 3 % of its memory, and a copy every so many tokens. Whatever else
    changes `keys` or `values` (reordering, cropping) is noticed, and new room is made.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H_kv, N, D]``, and return all keys and values, ``[B, H_kv, L, D]``."""
        if not self.is_initialized or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.keys = self._appended("keys", key_states)
        self.values = self._appended("values", value_states)
        return self.keys, self.values

    def _appended(self, name: str, new: Tensor) -> Tensor:
        old = getattr(self, name)
        rooms: dict[str, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_rooms", {})
        room, view = rooms.get(name, (old, None))
        before, total = old.shape[-2], old.shape[-2] + new.shape[-2]
        if view is not old or total > room.shape[-2]:
            room = old.new_empty(*old.shape[:-2], total + total // 32 + _LEAST_ROOM, old.shape[-1])
            room[..., :before, :] = old
        room[..., before:total, :] = new
        view = room[..., :total, :]
        rooms[name] = room, view
        return view


def grow_in_place(cache: Any) -> None:
    """Let the dynamic layers of ``cache``, of full attention, append in place from now on."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
