"""The driver's view of a training batch: what rows share, by names and lengths (V1) or by tokens (V0)."""

from __future__ import annotations

import pytest

pytest.importorskip("verl")

import torch

from prefix_grouper_plugins.integrations.verl.batch_sizes import sizes_by_names, sizes_by_tokens
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.micro_batches import packed_tokens
from prefix_grouper_plugins.step_order import regrouped_order


def agent_loops(sessions=3, outputs=3, uids=2):
    """Rows of agent loops by key, each output's prompt being all that was there before and a tool's answer."""
    torch.manual_seed(0)
    rows, lengths = {}, {}
    for uid in range(uids):
        prompt = torch.randint(1, 50_000, (40 + uid,))
        for session in range(sessions):
            context = prompt
            for output in range(outputs):
                row = torch.cat([context, torch.randint(1, 50_000, (5 + session,))])
                key = f"u_{uid}_{session}_{output}"
                rows[key], lengths[key] = row, (len(context), len(row))
                context = torch.cat([row, torch.randint(1, 50_000, (9,))])
    keys = sorted(rows, key=lambda key: key[::-1])  # scattered
    return keys, [rows[key] for key in keys], [lengths[key] for key in keys]


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_names_and_lengths_tell_what_outputs_of_a_session_share(share):
    keys, rows, lengths = agent_loops(outputs=11)
    sizes = sizes_by_names(keys, lengths, share)
    layout = PrefixLayout.from_rows(
        rows, shareable=[prompt for prompt, _ in lengths], min_level=1 if share == "tree" else None
    )
    assert packed_tokens(sizes) == layout.num_tokens
    assert all(size.tokens == len(row) - 1 for size, row in zip(sizes, rows, strict=True))
    alone = [packed_tokens([size]) for size in sizes]
    assert alone == [len(row) - 1 for row in rows]


def test_a_context_that_was_cut_shares_the_prompt_alone():
    sizes = sizes_by_names(["u_0_0", "u_0_1", "u_1_0"], [(10, 20), (15, 18), (10, 12)], "tree")
    assert packed_tokens(sizes) == 9 + 10 + (17 - 9) + 2


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_tokens_tell_it_as_the_layout_does(share):
    keys, rows, lengths = agent_loops()
    width, response = max(p for p, _ in lengths), max(total - p for p, total in lengths)
    ids = torch.zeros(len(rows), width + response, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, (prompt, total)) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, width - prompt : width - prompt + total] = row
        mask[i, width - prompt : width - prompt + total] = 1
    uids = [key.rsplit("_", 2)[0] for key in keys]
    by_tokens, by_names = sizes_by_tokens(uids, ids, mask, width, share), sizes_by_names(keys, lengths, share)
    assert packed_tokens(by_tokens) == packed_tokens(by_names)
    for uid in set(uids):
        own = [i for i, of in enumerate(uids) if of == uid]
        assert packed_tokens(by_tokens[i] for i in own) == packed_tokens(by_names[i] for i in own)


def test_all_outputs_of_a_prompt_come_to_one_rank_in_the_order_of_their_tree():
    keys, _, lengths = agent_loops()
    sizes = sizes_by_names(keys, lengths, "tree")
    order = regrouped_order(sizes, ranks=2, steps=1)
    dealt = [[keys[i] for i in order[:9]], [keys[i] for i in order[9:]]]
    assert [len({key.rsplit("_", 2)[0] for key in rank}) for rank in dealt] == [1, 1]
    for rank in dealt:
        sessions = [key.rsplit("_", 1)[0] for key in rank]
        assert sessions == sorted(sessions, key=sessions.index), "outputs of a session lie side by side"
