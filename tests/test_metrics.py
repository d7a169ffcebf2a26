"""The one counter: sharing is counted by pass, adds up over processes, and its absence is told once for each reason."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from prefix_grouper_plugins.metrics import (
    METRICS,
    OLD_LOG_PROB,
    PASSES,
    REF_LOG_PROB,
    Counts,
    ReasonCounter,
    SharingMeter,
)


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="prefix_grouper_plugins")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_packed_forwards_are_counted_and_their_ratios_are_over_all_of_them():
    meter = SharingMeter()
    meter.count_packed(Counts(tokens_forwarded=30, row_tokens=60, rows=8, groups=1))
    assert meter.take().metrics() == {
        "prefix_grouper/token_ratio": 0.5,
        "prefix_grouper/rows_per_group": 8.0,
        "prefix_grouper/fallbacks": 0.0,
        "prefix_grouper/tokens_forwarded": 30.0,
        "prefix_grouper/row_tokens": 60.0,
        "prefix_grouper/shared_at_level_1": 0.0,
        "prefix_grouper/shared_at_level_2": 0.0,
        "prefix_grouper/shared_at_level_3": 0.0,
    }
    meter.count_packed(Counts(tokens_forwarded=30, row_tokens=40, rows=4, groups=2))
    second = meter.take().metrics()
    assert second["prefix_grouper/token_ratio"] == 0.75 and second["prefix_grouper/rows_per_group"] == 2.0
    assert (meter.packed, meter.tokens_forwarded, meter.row_tokens, meter.rows, meter.groups) == (2, 60, 100, 12, 3)
    assert meter.token_ratio == 0.6, "the mean of 0.5 and 0.75 would weight small batches like large ones"
    assert meter.rows_per_group == 4.0


def test_tokens_that_rows_share_are_counted_by_the_level_of_their_tree():
    meter = SharingMeter()
    for shared in ([30, 5, 2, 1], [10]):
        meter.count_packed(Counts(tokens_forwarded=20, row_tokens=50, rows=2, groups=1) + Counts.of_levels(shared))
    metrics = meter.take().metrics()
    assert [metrics[f"prefix_grouper/shared_at_level_{level}"] for level in (1, 2, 3)] == [0.4, 0.05, 0.03]
    assert (metrics["prefix_grouper/tokens_forwarded"], metrics["prefix_grouper/row_tokens"]) == (40.0, 100.0)


def test_a_meter_that_saw_nothing_claims_nothing():
    meter = SharingMeter()
    assert meter.token_ratio == 1.0 and meter.rows_per_group == 0.0 and not meter.fallbacks


def test_each_reason_is_warned_of_once_and_counted_every_time(warnings):
    meter = SharingMeter()
    for reason in ("images in completions", "images in completions", "no completion", "images in completions"):
        meter.count_fallback(reason)
        assert meter.take().metrics()["prefix_grouper/fallbacks"] == 1.0
    assert meter.fallbacks == {"images in completions": 3, "no completion": 1}
    assert [message.rsplit(": ", 1)[-1] for message in warnings()] == ["images in completions", "no completion"]
    assert meter.packed == 0 and meter.token_ratio == 1.0, "a fallback is not a packed forward"


def test_a_quiet_meter_counts_without_warning(warnings):
    meter = SharingMeter(warn=False)
    meter.count_fallback("rank 1 is silent")
    assert meter.fallbacks == {"rank 1 is silent": 1}
    assert warnings() == []


def test_packed_forwards_warn_of_nothing(warnings):
    SharingMeter().count_packed(Counts(tokens_forwarded=1, row_tokens=2, rows=1, groups=1))
    assert warnings() == []


def test_a_shared_reference_pass_does_not_hide_an_update_that_is_not_shared():
    meter = SharingMeter(warn=False)
    meter.count_packed(Counts(tokens_forwarded=20, row_tokens=80, rows=8, groups=1), during=REF_LOG_PROB)
    meter.count_fallback("images in completions", [10] * 8)
    metrics = meter.take().metrics(share=True)
    assert metrics["prefix_grouper/token_ratio"] == 1.0 and metrics["prefix_grouper/rows_per_group"] == 1.0
    assert metrics["prefix_grouper/fallbacks"] == 0.5
    assert metrics["prefix_grouper/ref_log_prob_token_ratio"] == 0.25
    assert metrics["prefix_grouper/ref_log_prob_rows_per_group"] == 8.0
    assert not any("old_log_prob" in name for name in metrics)


def test_the_names_of_the_metrics_are_those_that_are_logged():
    meter = SharingMeter()
    for name in PASSES:
        meter.count_packed(Counts(tokens_forwarded=1, row_tokens=2, rows=1, groups=1), during=name)
    assert set(meter.take().metrics()) == set(METRICS)


def test_rows_of_an_ordinary_forward_count_their_squares_as_verls_estimate_of_flops_does():
    counts = Counts.of_rows([3, 4])
    assert (counts.tokens_forwarded, counts.row_tokens, counts.squares, counts.row_squares) == (7, 7, 25, 25)
    assert (counts.rows, counts.groups, counts.packed, counts.fallbacks) == (2, 2, 0, 0)


def test_a_reason_is_told_by_its_counter_once_in_its_own_words(warnings):
    counter = ReasonCounter("prefix grouper: the slow kernel runs: %s")
    for reason in ("no compiler", "no compiler"):
        counter.count(reason)
    assert counter == {"no compiler": 2} and warnings() == ["prefix grouper: the slow kernel runs: no compiler"]


def _count_and_add_up(group: Any) -> tuple[dict[str, float], dict[str, int], list[str]]:
    rank = torch.distributed.get_rank(group)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("prefix_grouper_plugins").addHandler(handler)
    meter = SharingMeter(warn=rank == 0)
    if rank == 0:
        meter.count_packed(Counts(tokens_forwarded=10, row_tokens=40, rows=4, groups=1))
    else:
        meter.count_fallback("images in completions", [20, 20])
    meter.count_packed(Counts(tokens_forwarded=5, row_tokens=10, rows=2, groups=1), during=OLD_LOG_PROB)
    everywhere = meter.take().summed("cpu", group)
    for _ in range(2):
        meter.warn_of(everywhere)
    logging.getLogger("prefix_grouper_plugins").removeHandler(handler)
    return everywhere.metrics(share=True), everywhere.fallbacks, said


@pytest.mark.slow
def test_counts_add_up_over_processes_and_a_reason_on_any_of_them_is_told_once(processes):
    results = processes.run(2, _count_and_add_up)
    for metrics, fallbacks, _ in results:
        assert metrics["prefix_grouper/token_ratio"] == 50 / 80
        assert metrics["prefix_grouper/fallbacks"] == 0.25
        assert metrics["prefix_grouper/old_log_prob_token_ratio"] == 0.5
        assert fallbacks == {"images in completions": 1}
    assert results[0][2] == ["prefix grouper: forwards of another process run without sharing: images in completions"]
    assert results[1][2] == []


def test_the_counter_and_the_settings_are_read_without_torch():
    code = (
        "import sys, prefix_grouper_plugins.metrics, prefix_grouper_plugins.settings\n"
        "assert not {'torch', 'transformers', 'trl', 'verl'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
