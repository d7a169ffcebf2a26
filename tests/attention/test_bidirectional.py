"""Blocks of tokens that see each other in both directions, against dense attention over single rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prefix_grouper_plugins import PrefixLayout, shared_prefix_attention
from prefix_grouper_plugins.attention.bidirectional import blocks_of

# Two groups, whose prompts hold two blocks and one; a row that shares with nobody; a group without blocks.
PROMPTS = [[-1, 0, 0, 0, 0, -1, 1, 1, -1], [0, 0, 0, -1], [-1, 0, 0], [-1, -1, -1]]
RESPONSES = [[3, 1, 4], [2, 2], [3], [2, 5]]


def case():
    layout = PrefixLayout.from_groups([len(prompt) for prompt in PROMPTS], RESPONSES)
    ids = [
        torch.tensor(prompt + [-1] * length)
        for prompt, lengths in zip(PROMPTS, RESPONSES, strict=True)
        for length in lengths
    ]
    group = [torch.full_like(x, i) for i, x in zip([0, 0, 0, 1, 1, 2, 3, 3], ids, strict=True)]
    packed = layout.pack([x + 10 * g * (x >= 0) for x, g in zip(ids, group, strict=True)])
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(layout.num_tokens, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    return layout, packed, ids, qkv


def row_by_row(layout, ids, qkv, window, cut_by_window):
    outputs = []
    for i, blocks in enumerate(ids):
        q, k, v = (layout.unpack(x)[i].transpose(0, 1) for x in qkv)
        block, at = blocks[:-1], torch.arange(len(blocks) - 1)
        same = (block[:, None] == block) & (block >= 0)
        causal, near = at <= at[:, None], at[:, None] - at < (window or len(at))
        mask = ((causal | same) & near) if cut_by_window else ((causal & near) | same)
        out = scaled_dot_product_attention(q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), attn_mask=mask)
        outputs.append(out.transpose(0, 1))
    return outputs


@pytest.mark.parametrize("backend", ["auto", "blockwise", "dense"])
@pytest.mark.parametrize(("window", "cut_by_window"), [(None, True), (3, True), (3, False), (6, True)])
def test_blocks_give_what_single_rows_with_masks_give(backend, window, cut_by_window):
    layout, packed, ids, qkv = case()
    layout.blocks, layout.blocks_cut_by_window = blocks_of(packed, layout), cut_by_window
    got = layout.unpack(shared_prefix_attention(*qkv, layout, sliding_window=window, backend=backend))
    wanted = row_by_row(layout, ids, qkv, window, cut_by_window)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    weights = [torch.arange(x.numel(), dtype=x.dtype).view_as(x).sin() for x in wanted]
    losses = [sum((x * w).sum() for x, w in zip(rows, weights, strict=True)) for rows in (got, wanted)]
    for x, y in zip(*(torch.autograd.grad(loss, qkv) for loss in losses), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_options_that_do_not_go_with_blocks_are_errors():
    layout, packed, _, qkv = case()
    layout.blocks = blocks_of(packed, layout)
    with pytest.raises(ValueError, match=r"softcap=5\.0 and sinks=None do not go together with blocks"):
        shared_prefix_attention(*qkv, layout, softcap=5.0)


@pytest.mark.parametrize("moved", [lambda x: x.to("cpu"), lambda x: x.pad_to(x.num_tokens + 3)], ids=["to", "pad_to"])
@pytest.mark.parametrize("cut_by_window", [True, False])
def test_a_moved_or_padded_layout_keeps_its_blocks(moved, cut_by_window):
    layout, packed, ids, qkv = case()
    layout.blocks, layout.blocks_cut_by_window = blocks_of(packed, layout), cut_by_window
    assert layout.blocks.tolist()[:2] == [[1, 5], [6, 8]]
    layout = moved(layout)
    qkv = [torch.cat([x, x[: layout.num_padding]]) for x in qkv]
    got = layout.unpack(shared_prefix_attention(*qkv, layout, sliding_window=3))
    for x, y in zip(got, row_by_row(layout, ids, qkv, 3, cut_by_window), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_blocks_that_were_scored_first_serve_training():
    layout, packed, _, qkv = case()
    layout.blocks = blocks_of(packed, layout)
    with torch.inference_mode():
        scored = shared_prefix_attention(*qkv, layout)
    out = shared_prefix_attention(*qkv, layout)
    assert torch.equal(out, scored) and all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), qkv))


def test_rows_that_share_a_part_of_a_block_are_refused():
    layout = PrefixLayout.from_groups([4], [[3, 3]])
    with pytest.raises(
        ValueError, match=r"the block of tokens 1 to 4 goes past the end of its segment.*keys of their own"
    ):
        blocks_of(torch.tensor([-1, 0, 0, 0, 0, -1, -1, -1, -1]), layout)
