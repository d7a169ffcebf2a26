"""Limits are verl's by verl's names, groups that do not fit are told of, and all ranks agree."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

pytest.importorskip("verl")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prefix_grouper_plugins.integrations.verl.planning import (
    Limits,
    plan_on_all_ranks,
    rows_together,
    why_groups_are_cut,
    why_levels_are_repeated,
)
from prefix_grouper_plugins.micro_batches import RowSize

OPTION = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


def group(rows: int, prompt: int, response: int, name: str = "a") -> list[RowSize]:
    return [RowSize(name, prompt, response)] * rows


def planned(rank: int, meeting: str, folder: str, lengths: list[int], shares: list[bool]) -> None:
    """One of two ranks, each with one row."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    sizes = group(1, lengths[rank] - 4, 4) if shares[rank] else None
    try:
        found = str(plan_on_all_ranks(sizes, lengths[rank], Limits(OPTION, max_tokens=100, ranks=2), None))
    except ValueError as error:
        found = str(error)
    with open(f"{folder}/{rank}", "w") as file:
        file.write(found)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("lengths", "shares", "found"),
    [
        ([20, 101], [True, True], "[[0]]"),  # a packed row does without its last token
        ([20, 102], [True, True], f"{OPTION}=50 on each of 2 sequence-parallel ranks. Set it to at least 51"),
        ([101, 20], [False, True], f"{OPTION}=50 on each of 2 sequence-parallel ranks. Set it to at least 51"),
        ([20, 20], [False, True], "None"),
    ],
    ids=["fits", "too long", "too long for verl's own path", "one rank does not share"],
)
def test_both_ranks_find_the_same_where_one_of_them_cannot_go_on(lengths, shares, found, tmp_path):
    mp.start_processes(planned, (f"{tmp_path}/meeting", str(tmp_path), lengths, shares), nprocs=2, start_method="fork")
    for rank in range(2):
        assert found in (tmp_path / str(rank)).read_text()


# Rank 0 has a group of eight rows, rank 1 two of four; or both have one of two parts and one whole.
UNEQUAL = [group(8, 10, 3), group(4, 10, 3, "b") + group(4, 10, 3, "c")]
ONE_ROW = [(12, 1), (14, 1)]  # which may be longer on one rank than on the other
ALIKE = [group(4, 10, 30) + group(4, 10, 3, "b"), group(4, 10, 12, "c") + group(4, 10, 3, "d")]


def planned_parts(rank: int, meeting: str, folder: str, rows: list, limit: list, reuses: list[bool]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    longest = max(size.prompt + size.response for size in rows[rank])
    plan = plan_on_all_ranks(rows[rank], longest, Limits(OPTION, *limit[rank]), None, reuses=reuses[rank])
    Path(f"{folder}/{rank}").write_bytes(pickle.dumps((list(map(len, plan.micro_batches)), plan.runs, plan.ends)))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rows", "limit", "reuses", "found"),
    [
        (
            UNEQUAL,
            ONE_ROW,
            [True, True],
            [
                ([1] * 8, [(0, 8)], [{3, 7}, set(), set(), set(), {7}, set(), set(), set()]),
                ([1] * 8, [(0, 4), (4, 8)], [{3, 7}, set(), set(), set(), {7}, set(), set(), set()]),
            ],
        ),
        (
            ALIKE,
            [(70,), (70,)],
            [True, True],
            [([2, 2, 4], [(0, 2)], [{1}, set(), set()]), ([2, 2, 4], [(0, 2)], [{1}, set(), set()])],
        ),
        (UNEQUAL, ONE_ROW, [True, False], [([1] * 8, [], [set()] * 8)] * 2),
    ],
    ids=["unequal groups", "cut alike", "one rank does not reuse"],
)
def test_ranks_cut_their_groups_alike_and_know_when_others_forward_a_prompt(rows, limit, reuses, found, tmp_path):
    arguments = (f"{tmp_path}/meeting", str(tmp_path), rows, limit, reuses)
    mp.start_processes(planned_parts, arguments, nprocs=2, start_method="fork")
    assert [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)] == found


def planned_together(rank: int, meeting: str, folder: str, rows: list, limit: tuple) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    longest = max(size.prompt + size.response for size in rows[rank])
    plan = plan_on_all_ranks(rows[rank], longest, Limits(OPTION, *limit), None, reuses=True)
    Path(f"{folder}/{rank}").write_text(str(plan and (plan.micro_batches, plan.runs)))
    dist.destroy_process_group()


APART = [RowSize(name, 10, 3, ()) for name in "abcd"]


@pytest.mark.parametrize(
    ("rows", "limit", "found"),
    [
        ([APART, APART], (26, 2), ["None", "None"]),
        ([APART, APART], (26,), ["None", "None"]),
        ([APART, group(4, 10, 3)], (26, 2), ["([[0, 1], [2, 3]], [])", "([[0, 1], [2, 3]], [(0, 2)])"]),
        ([APART, APART], (12,), ["([[0], [1], [2], [3]], [])"] * 2),
        ([APART, group(4, 10, 3)], (12,), ["([[0], [1], [2], [3]], [])", "([[0], [1], [2], [3]], [(0, 4)])"]),
    ],
    ids=[
        "no rank shares",
        "no rank shares, dynamic",
        "a group is split, since the other rank has more micro-batches, and reuses its prompt",
        "rows that fit without their last tokens alone, which verl would refuse",
        "one rank shares",
    ],
)
def test_ranks_that_share_nothing_and_their_neighbours(rows, limit, found, tmp_path):
    mp.start_processes(
        planned_together, (f"{tmp_path}/meeting", str(tmp_path), rows, limit), nprocs=2, start_method="fork"
    )
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == found


@pytest.mark.parametrize(
    ("limits", "sizes", "told"),
    [
        (
            Limits("o", 13, rows=1),
            group(8, 10, 3),
            "o=1, up to 13 tokens: a group has up to 33 tokens, its prompt counted once, so it is cut and its prompt forwarded for "
            "each part; set 4 to share it whole",  # three rows do not divide eight
        ),
        (Limits("o", 13, rows=1), [*group(8, 10, 3), RowSize("b", 10, 3)], "set 3 to share it whole"),
        (Limits("o", 39, rows=3), group(8, 10, 3), None),
        (Limits("o", 13, rows=1), group(1, 10, 3) + group(1, 10, 3, "b"), None),
        (Limits("o", max_tokens=32), group(8, 10, 3), "o=32: a group has up to 33 tokens, its prompt counted once"),
        (Limits("o", max_tokens=32, ranks=2), group(8, 10, 3), "set 17 to share it whole"),
        (Limits("o", max_tokens=33), group(8, 10, 3), None),
    ],
)
def test_groups_that_a_micro_batch_cannot_hold_are_told_of_with_the_option(limits, sizes, told):
    notice = why_groups_are_cut(sizes, limits)
    assert notice is None if told is None else told in notice


@pytest.mark.parametrize(
    ("limits", "together", "told"),
    [
        (
            Limits("o", 26, rows=2),
            2,
            "o=2: a group has 8 rows, so its prompt is forwarded 4 times; set a multiple of 8",
        ),
        (Limits("o", 130, rows=10), 8, None),
        (Limits("o", 32), 7, "o=32: a group has up to 33 tokens"),
    ],
)
def test_rows_that_stay_in_the_micro_batches_of_verls_are_counted_by_rows_where_verl_counts_rows(
    limits, together, told
):
    rows = group(8, 10, 3)
    assert rows_together(rows, limits, stay=True) == (together, 8)
    notice = why_groups_are_cut(rows, limits, stay=True)
    assert notice is None if told is None else told in notice


def test_parts_of_a_group_that_repeat_a_level_say_how_much():
    """Four rows of one prompt of 10 tokens, whose responses of 8 begin alike with 6."""
    rows = [RowSize("a", 10, 8, (("prompt", 9), ("turn", 6)))] * 4
    assert why_levels_are_repeated(rows, Limits("o", 72, rows=4)) is None
    assert why_levels_are_repeated(group(4, 10, 8), Limits("o", 25)) is None, "nothing but the prompt is shared"
    line = str(why_levels_are_repeated(rows, Limits("o", 20)))
    apart, together = 9 + 2 * 6 + 4 * 2, 9 + 6 + 4 * 2
    assert f"batch {apart / 72:.1%} are forwarded, {together / 72:.1%} with whole groups" in line


ROWS = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"


@pytest.mark.parametrize(
    ("beside", "options", "limits"),
    [
        ({"use_dynamic_bsz": True}, "update", Limits(OPTION, 80, ranks=2)),
        (
            {"use_dynamic_bsz": True},
            "ref_log_prob",
            Limits("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu", 80, ranks=2),
        ),
        ({"use_dynamic_bsz": False}, "old_log_prob", Limits(ROWS, 7 + 9, rows=2, ranks=2)),
        ({"use_dynamic_bsz": False, "use_remove_padding": False}, "old_log_prob", Limits(ROWS, 2 * 9, rows=2, ranks=2)),
    ],
)
def test_limits_are_those_that_verl_put_beside_the_rows(beside, options, limits):
    """A limit of two rows is what the largest micro-batch of two holds in verl, of these rows: 4 + 8, 7 + 9 and 5."""
    from verl.utils import tensordict_utils as tu

    rows = torch.nested.as_nested_tensor([torch.zeros(n) for n in (4, 8, 7, 9, 5)], layout=torch.jagged)
    beside = {"max_token_len_per_gpu": 40, "micro_batch_size_per_gpu": 2, **beside}
    assert Limits.of(tu.get_tensordict({"input_ids": rows}, non_tensor_dict=beside), options, 2) == limits


def test_limits_say_what_verl_calls_them_and_which_value_would_do():
    assert str(Limits("o", 80, ranks=2)) == "o=40" and Limits("o", 80, ranks=2).value_for(81) == 41
    assert (
        str(Limits("o", 80, rows=4)) == "o=4, up to 80 tokens" and Limits("o", 80, rows=4).value_for(81, [20] * 16) == 8
    )
