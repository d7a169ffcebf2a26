"""SharingMeter: sharing is counted, and its absence is told once for each reason."""

from __future__ import annotations

import logging

import pytest

from prefix_grouper_plugins.metrics import SharingMeter


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.INFO, logger="prefix_grouper_plugins")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_packed_forwards_are_counted_and_their_ratios_are_over_all_of_them():
    meter = SharingMeter()
    first = meter.count_packed(tokens_forwarded=30, row_tokens=60, rows=8, groups=1)
    assert first == {
        "prefix_grouper/token_ratio": 0.5,
        "prefix_grouper/rows_per_group": 8.0,
        "prefix_grouper/fallbacks": 0.0,
    }
    second = meter.count_packed(tokens_forwarded=30, row_tokens=40, rows=4, groups=2)
    assert second["prefix_grouper/token_ratio"] == 0.75 and second["prefix_grouper/rows_per_group"] == 2.0
    assert (meter.packed, meter.tokens_forwarded, meter.row_tokens, meter.rows, meter.groups) == (2, 60, 100, 12, 3)
    assert meter.token_ratio == 0.6, "the mean of 0.5 and 0.75 would weight small batches like large ones"
    assert meter.rows_per_group == 4.0


def test_a_meter_that_saw_nothing_claims_nothing():
    meter = SharingMeter()
    assert meter.token_ratio == 1.0 and meter.rows_per_group == 0.0 and not meter.fallbacks


def test_each_reason_is_warned_of_once_and_counted_every_time(warnings):
    meter = SharingMeter()
    for reason in ("images in completions", "images in completions", "no completion", "images in completions"):
        assert meter.count_fallback(reason) == {"prefix_grouper/fallbacks": 1.0}
    assert meter.fallbacks == {"images in completions": 3, "no completion": 1}
    assert [message.rsplit(": ", 1)[-1] for message in warnings()] == ["images in completions", "no completion"]
    assert meter.packed == 0 and meter.token_ratio == 1.0, "a fallback is not a packed forward"


def test_a_quiet_meter_counts_without_warning(warnings):
    meter = SharingMeter(warn=False)
    meter.count_fallback("rank 1 is silent")
    assert meter.fallbacks == {"rank 1 is silent": 1}
    assert warnings() == []


def test_packed_forwards_warn_of_nothing(warnings):
    SharingMeter().count_packed(tokens_forwarded=1, row_tokens=2, rows=1, groups=1)
    assert warnings() == []
