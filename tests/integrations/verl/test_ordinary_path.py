"""Micro-batches whose rows have next to nothing in common are left to verl, and counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import torch
import verl.workers.engine.fsdp.transformer_impl as fsdp
from verl.utils import tensordict_utils as tu

import prefix_grouper_plugins.integrations.verl.engine as engine_module
from prefix_grouper_plugins.integrations.verl.micro_batch import PackedMicroBatch
from prefix_grouper_plugins.metrics import SharingMeter
from prefix_grouper_plugins.sharing import SharingGate
from tests.integrations.verl.cases import Case, make_batch, make_rows
from tests.integrations.verl.test_engine import bare_engine
from tests.integrations.verl.test_equality import assert_equal

REMARK = (
    "forwards of the first update took the ordinary path, which is no fallback: packing their rows would have saved"
)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_an_update_that_shares_nothing_is_verls(results, size):
    case = Case(rows_per_group=1, prompt_tokens=40, dynamic=False, micro_batch_size=size)
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert result["gradient"] < 1e-6  # rows and micro-batches are added up in another order
    counts = result["forwarded"]
    assert (counts["ordinary"], counts["packed"], counts["fallbacks"]) == (3 // size, 0, 0)
    assert counts["tokens_forwarded"] == counts["row_tokens"] > 0
    assert result["metrics"]["prefix_grouper/token_ratio"] == 1
    assert any(f"{3 // size} of {3 // size} {REMARK}" in line for line in result["said"]), result["said"]


@pytest.mark.slow
def test_padding_that_packing_saves_is_saved_without_groups(results):
    """Rows of 9 to 30 tokens, which verl pads where it does not remove padding."""
    case = Case(rows_per_group=1, dynamic=False, micro_batch_size=3, remove_padding=False)
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert (result["forwarded"]["ordinary"], result["forwarded"]["packed"]) == (0, 1)


@pytest.mark.slow
def test_a_verification_packs_what_training_does_not(results):
    case = Case(rows_per_group=1, prompt_tokens=40, dynamic=False, micro_batch_size=3, options={"verify": "first"})
    (result,) = results([case], 1)
    assert_equal(case, result)
    assert result["forwarded"]["ordinary"] == 1
    verified = [line for line in result["said"] if "verified: the gradients of update 0" in line]
    assert verified and "differ by 0.0e+00" not in verified[0], "equal to the last bit: it compared nothing"


@pytest.mark.slow
def test_two_ranks_of_which_one_packs_and_the_other_does_not(results):
    case = Case(members=[1, 1, 1, 1, 4], dynamic=False, micro_batch_size=4)
    (result,) = results([case], 2)
    assert_equal(case, result)
    counts = result["forwarded"]
    assert (counts["ordinary"], counts["packed"], counts["fallbacks"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("case", "apart", "laid_out"),
    [
        (Case(groups=1, rows_per_group=1, prompt_tokens=60), False, False),
        (Case(groups=3, rows_per_group=1, prompt_tokens=60), True, False),
        (Case(groups=3, rows_per_group=1, prompt_tokens=60), False, True),
        (Case(groups=3, rows_per_group=1, remove_padding=False), True, True),
    ],
    ids=["one row", "rows that share nothing", "rows of which that is not known", "rows whose padding is saved"],
)
@pytest.mark.parametrize("compares", [False, True], ids=["in training", "in a comparison"])
def test_rows_that_are_known_to_share_nothing_are_not_laid_out(monkeypatch, case, apart, laid_out, compares):
    """In a model of a few layers, reading short rows a second time would take a tenth of their log-prob pass."""
    read: list[int] = []

    class Noted(PackedMicroBatch):
        def __init__(self, micro_batch, *rest, **options):
            super().__init__(micro_batch, *rest, **options)
            read.append(len(micro_batch))
            self.reason_not_to_share = "the test ends here"

    monkeypatch.setattr(engine_module, "PackedMicroBatch", Noted)
    monkeypatch.setattr(fsdp.FSDPEngineWithLMHead, "prepare_model_inputs", lambda self, rows: ({}, {}))
    rows = make_rows(case)
    micro_batch = make_batch(case, rows, len(rows))
    tu.assign_non_tensor(micro_batch, use_remove_padding=case.remove_padding)
    attributes = {"_rows_apart": apart, "_reuse": None, "_max_tokens": None, "_compares": compares, "_placeholders": ()}
    attributes |= {"_pass": "update", "_model_type": "qwen3", "use_ulysses_sp": False}
    engine = bare_engine(gate=SharingGate(), sharing=SharingMeter(warn=False), **attributes)
    engine.gate.min_level = lambda *_: None
    engine.gate.anatomies = [SimpleNamespace(mixers=[], row_limits=[])]
    engine.options = type("Options", (), {"share": "prompts"})
    engine.prepare_model_inputs(micro_batch)
    assert read == ([len(rows)] if laid_out or compares else [])
    counts = engine.sharing.take().total
    assert (counts.ordinary, counts.fallbacks) == ((0, 1) if laid_out or compares else (1, 0))
    assert (
        counts.row_tokens
        == counts.tokens_forwarded
        == int(torch.tensor([len(row["prompt"]) + len(row["response"]) for row in rows]).sum())
    )


def test_rows_that_would_exceed_the_limit_as_verl_lays_them_out_are_packed(monkeypatch):
    """A packed row leaves the last token of each row out, and all padding."""
    monkeypatch.setattr(fsdp.FSDPEngineWithLMHead, "prepare_model_inputs", lambda self, rows: ({}, {}))
    rows = make_rows(Case(groups=3, rows_per_group=1, prompt_tokens=60))
    lengths = [len(row["prompt"]) + len(row["response"]) for row in rows]
    engine = bare_engine(gate=SharingGate(), _compares=False, _reuse=None, use_ulysses_sp=False)
    engine.gate.anatomies = [SimpleNamespace(mixers=[], row_limits=[])]
    for padding, tokens in ((False, sum(lengths)), (True, 3 * max(lengths))):
        micro_batch = make_batch(Case(), rows, len(rows))
        tu.assign_non_tensor(micro_batch, use_remove_padding=not padding)
        engine._max_tokens = tokens
        assert not engine._packs_all(lengths, micro_batch)
        engine._max_tokens = tokens - 1
        assert engine._packs_all(lengths, micro_batch)
        engine._max_tokens = None  # verl's own micro-batches
        assert not engine._packs_all(lengths, micro_batch)


def test_rows_are_packed_where_verls_states_leak_from_one_row_to_the_next():
    rows = make_rows(Case(groups=3, rows_per_group=1, prompt_tokens=60))
    engine = bare_engine(gate=SharingGate(), _compares=False, _reuse=None, use_ulysses_sp=False, _max_tokens=None)
    engine.gate.anatomies = [SimpleNamespace(mixers=["a gated delta net"], row_limits=[])]
    micro_batch = make_batch(Case(), rows, len(rows))
    for padding, lengths, packs in ((False, [61, 62], True), (True, [61, 62], False), (False, [61], False)):
        tu.assign_non_tensor(micro_batch, use_remove_padding=not padding)
        assert engine._packs_all(lengths, micro_batch) == packs
