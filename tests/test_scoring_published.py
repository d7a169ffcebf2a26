"""The attention and the log-probabilities of the published package `prefix-grouper`, and their gradients, are ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper, prefix_grouped_logps, shared_prefix_attention
from tests import tiny
from tests.scoring import ComputeInFloat64, assert_close, batch_of, groups, values_and_gradients


def dense_causal(module, query, key, value, mask, scaling=None, **_: Any):
    """Attention for the published package: ``[b, H, T_q, D]`` and keys whose last ``T_q`` are the queries' own.

    ``mask [b, T_kv]`` is 1 on real keys. Padded queries may see nothing, and see everything instead of giving NaN.
    """
    queries, keys = query.shape[2], key.shape[2]
    behind = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries
    visible = behind[None] & mask[:, None].bool()
    visible |= ~visible.any(-1, keepdim=True)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, visible[:, None], scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def test_attention_and_its_gradients_equal_the_published_package():
    published = pytest.importorskip("prefix_grouper")
    sizes = [[5, 3, 1, 4], [2, 2, 6]]  # prompt, then its responses
    heads = {"query": 4, "key": 2, "value": 2}
    generator = torch.Generator().manual_seed(0)

    def leaf(tokens, count):
        return torch.randn(tokens, count, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    # One leaf for each prompt and each response, so that both sides give gradients of the same things.
    leaves = {name: [[leaf(n, count) for n in group] for group in sizes] for name, count in heads.items()}
    rows = {name: [torch.cat([g[0], r]) for g in groups_ for r in g[1:]] for name, groups_ in leaves.items()}
    weights = [torch.randn(len(row) - 1, 4, 8, generator=generator, dtype=torch.float64) for row in rows["query"]]

    def gradients(outputs):
        flat = [x for groups_ in leaves.values() for group in groups_ for x in group]
        value = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        return torch.autograd.grad(value, flat)

    layout = PrefixLayout.from_groups([g[0] for g in sizes], [g[1:] for g in sizes])
    ours = layout.unpack(shared_prefix_attention(*(layout.pack(rows[name]) for name in heads), layout))

    grouper = published.PrefixGrouper(sizes)
    padded = {
        name: nn.utils.rnn.pad_sequence([torch.cat(group) for group in groups_], batch_first=True).transpose(1, 2)
        for name, groups_ in leaves.items()
    }
    out = grouper.forward(lambda q, k, v, mask: dense_causal(None, q, k, v, mask)[0], *padded.values())
    parts = [out[i, : sum(group)].split(group) for i, group in enumerate(sizes)]
    theirs = [torch.cat([group[0], response])[:-1] for group in parts for response in group[1:]]

    for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda text, row=row: f"row {row}: {text}")
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def published(monkeypatch):
    """The published package's hook for transformers, with an attention function that runs anywhere."""
    package = pytest.importorskip("prefix_grouper")
    from prefix_grouper.utils.register_transformers import register_attention

    for name in ("prefix_grouper_attention", "dense_causal"):  # forgotten again after the test
        monkeypatch.setitem(AttentionInterface._global_mapping, name, dense_causal)
    register_attention()
    return package.PrefixGrouper


def by_published_package(grouper_class, model, rows, sizes):
    """Log-probabilities as its README computes them; ``rows`` lie group by group."""
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch_of(rows)
    prompt_ids, prompt_mask = prompt_ids[first], prompt_mask[first]
    grouper = grouper_class.from_ungrouped_masks(prompt_mask, completion_mask, sizes, padding_mode="right")
    input_ids = grouper.concat_input(prompt_ids, prompt_mask, completion_ids, completion_mask)
    position_ids = torch.zeros_like(input_ids)
    for i, info in enumerate(grouper.group_info):
        spans = [torch.arange(info.prefix_len)] + [torch.arange(n) + info.prefix_len for n in info.suffix_lens]
        position_ids[i, : info.total_len] = torch.cat(spans)
    logits = model(
        input_ids=input_ids,
        attention_mask=grouper.padding_mask,
        position_ids=position_ids,
        use_cache=False,
        prefix_grouper=grouper,
        prefix_grouper_attn_func="dense_causal",
    ).logits
    _, _, suffix, mask = grouper.split_output(logits, include_prefix_last=1)
    distribution = suffix[:, :-1].log_softmax(-1)
    return distribution.gather(-1, completion_ids[..., None])[..., 0] * mask[:, 1:]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_whole_model_and_its_gradients_equal_the_published_package(published, model_type):
    sizes = [3, 2]
    rows = sorted(groups({9: [4, 7, 1], 3: [6, 2]}), key=lambda row: -len(row[0]))
    model = tiny.model(model_type).double()
    own = model.config._attn_implementation
    with ComputeInFloat64():
        model.config._attn_implementation = "prefix_grouper_attention"
        theirs = values_and_gradients(model, lambda m, _: [by_published_package(published, m, rows, sizes)], None)
        model.config._attn_implementation = own
        enable_prefix_grouper(model)
        ours = values_and_gradients(model, lambda m, b: prefix_grouped_logps(m, *b), batch_of(rows))
    assert_close(ours, theirs)
