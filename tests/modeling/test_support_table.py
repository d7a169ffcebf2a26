"""docs/models.md is what its file says, and the file is what the code says, as far as that can be asked in seconds."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.harness import read_csv, read_facts
from prefix_grouper_plugins import check_support
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES, VERIFIED_MULTIMODAL_TYPES
from tests.modeling import support_table

ROWS = {row["model_type"]: row for row in read_csv(support_table.FILE)}
FACTS = read_facts(support_table.FILE)
# What a type is may change with transformers; what we say of the types in our lists may not.
SAME_TRANSFORMERS = FACTS["transformers"] == transformers.__version__
other_transformers = pytest.mark.skipif(
    not SAME_TRANSFORMERS,
    reason=f"the file is of transformers {FACTS['transformers']}, here {transformers.__version__}",
)


def test_the_page_is_made_from_the_file():
    text = support_table.PAGE.read_text(encoding="utf-8")
    assert text == support_table.page(text, list(ROWS.values()), FACTS), "run `make support-table`"


def test_the_exact_types_are_the_verified_ones():
    exact = {name for name, row in ROWS.items() if row["verdict"] == "exact"}
    verified = VERIFIED_MODEL_TYPES | VERIFIED_MULTIMODAL_TYPES
    assert exact <= verified
    missing = verified - exact
    if not SAME_TRANSFORMERS:  # types that its transformers does not have
        missing &= ROWS.keys()
    assert not {name for name in missing if name in CONFIG_MAPPING}, "run `make support-table`"


@other_transformers
def test_every_type_of_the_mapping_has_a_line():
    assert list(ROWS) == support_table.types()


def test_no_difference_is_larger_than_the_claim_allows():
    for name, row in ROWS.items():
        if row["verdict"] in support_table.SHARED:
            assert float(row["logits_difference"]) <= support_table.LOGITS, name
            assert float(row["gradient_difference"]) <= support_table.GRADIENTS, name
            assert 0 < float(row["token_ratio"]) < 0.25, name
            assert float(row["update_ratio"]) > 0, name


def test_whatever_is_not_shared_has_a_reason():
    for name, row in ROWS.items():
        assert row["verdict"] in support_table.VERDICTS and row["verdict"] != "differs", name
        if row["verdict"] not in support_table.SHARED:
            assert row["reason"], name


@other_transformers
@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3",
        "gemma2",
        "mamba2",
        "gpt_neo",
        "rwkv",
        "deepseek_v32",
        "phimoe",
        "blt",
        "deepseek_v4",
        "xlm",
        "big_bird",
        "fuyu",
    ],
)
def test_verdict_layers_and_reason_are_those_of_check_support(model_type):
    row, report = ROWS[model_type], check_support(support_table.build(model_type))
    shared = "self-checked on first use" if report.unverified else "exact"
    assert row["verdict"] == (shared if report.supported else "refused")
    assert row["reason"] == "; ".join(report.reasons)
    if report.supported:
        assert row["layers"] == support_table.layers_in_words(report)
        assert row["in_trl"] == ("; ".join(report.left_padding_reasons) or "yes")


def test_a_type_that_is_listed_but_differs_is_not_called_exact(monkeypatch):
    def off(model):
        return [logits + 1e-3 for logits in packed(model)]

    packed = support_table.test_families.packed
    monkeypatch.setattr(support_table.test_families, "packed", off)
    row = support_table.examine("llama")
    assert (row["verdict"], row["update_ratio"]) == ("differs", "")


def test_tokens_are_counted_where_they_are_embedded():
    model = support_table.build("llama")
    assert support_table.tokens_of(model, lambda: model(input_ids=torch.zeros(2, 7, dtype=torch.long))) == 14
