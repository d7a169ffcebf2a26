"""A cache that appends in place holds what transformers' own holds, whatever is done to it."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from prefix_grouper_plugins.modeling.growing_cache import GrowingLayer, grow_in_place


def state(length: int) -> torch.Tensor:
    return torch.randn(3, 2, length, 4)


def test_it_holds_what_a_dynamic_cache_holds_and_copies_rarely():
    ours, theirs = DynamicCache(), DynamicCache()
    prompt = state(40), state(40)
    for cache in (ours, theirs):
        cache.update(*prompt, 0)
    grow_in_place(ours)
    (layer,) = ours.layers
    assert type(layer) is GrowingLayer
    kept, storages = [], set()
    with torch.no_grad():
        for step in range(200):
            new = state(1 + step % 2), state(1 + step % 2)
            found, expected = ours.update(*new, 0), theirs.update(*new, 0)
            assert all(map(torch.equal, found, expected))
            kept.append((found, expected))
            storages.add(found[0].untyped_storage().data_ptr())
            if step == 50:  # as beams are reordered
                for cache in (ours, theirs):
                    cache.reorder_cache(torch.tensor([2, 0, 0]))
            if step == 120:  # as candidate tokens are taken back
                for cache in (ours, theirs):
                    cache.crop(-5)
            assert ours.get_seq_length() == theirs.get_seq_length()
    assert len(storages) < 12
    assert all(all(map(torch.equal, *pair)) for pair in kept), "what was handed out stays as it was"


def test_repeated_rows_have_room_at_once():
    cache, prompt = DynamicCache(), (state(40), state(40))
    cache.update(*prompt, 0)
    grow_in_place(cache)
    rows = torch.tensor([0, 0, 2, 1, 1])
    with torch.no_grad():
        cache.reorder_cache(rows)
        assert all(map(torch.equal, (cache.layers[0].keys, cache.layers[0].values), (x[rows] for x in prompt)))
        storage = cache.layers[0].keys.untyped_storage().data_ptr()
        new = torch.randn(5, 2, 1, 4)
        keys, values = cache.update(new, new, 0)
    assert keys.untyped_storage().data_ptr() == storage, "nothing was copied again"
    assert torch.equal(keys, torch.cat([prompt[0][rows], new], -2))
    assert torch.equal(values, torch.cat([prompt[1][rows], new], -2))


def test_with_gradients_it_makes_new_tensors():
    cache = DynamicCache()
    cache.update(state(4), state(4), 0)
    grow_in_place(cache)
    new = state(1).requires_grad_()
    keys, _ = cache.update(new, state(1), 0)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))
