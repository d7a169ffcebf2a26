"""Every model type that is called verified: packed logits and gradients are those of single rows."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import check_support, disable_prefix_grouper, enable_prefix_grouper, prefix_grouped_logps
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling import packed_inputs, row_positions
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES
from tests import tiny
from tests.modeling import families

PROMPT_LENGTHS, ROWS = [9, 9, 9, 3, 3], tiny.rows({9: [4, 7, 1], 3: [6, 2]})


def padded(tokens: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = pad_sequence(tokens, batch_first=True, padding_side=side)
    return ids, (ids != 0).long()  # no row holds the padding token


BLOCKS = (
    *padded([row[:n] for row, n in zip(ROWS, PROMPT_LENGTHS, strict=True)], "left"),
    *padded([row[n:] for row, n in zip(ROWS, PROMPT_LENGTHS, strict=True)], "right"),
)
BATCH = GroupedBatch(*BLOCKS)


def log_likelihood(logits: list[torch.Tensor]) -> torch.Tensor:
    """Sum over all rows; ``logits`` holds ``[L_i - 1, vocabulary]`` for each."""
    return sum(x.log_softmax(-1).gather(-1, row[1:, None]).sum() for x, row in zip(logits, ROWS, strict=True))  # type: ignore[return-value]


def single_rows(model):
    return [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]


def packed(model):
    """From a batch as trainers hold it: prompts padded on the left, responses on the right."""
    layout, ids = BATCH.layout, BATCH.input_ids
    return layout.unpack(model(**packed_inputs(layout, ids, row_positions(model, layout, ids))).logits[0])


def assert_log_probs_are_those_of(logits, model):
    """``prefix_grouped_logps`` finds the head of ``model``, scale and cap of its logits included."""
    with torch.no_grad():
        logps, _ = prefix_grouped_logps(model, *BLOCKS)
    for row, prompt, values, got in zip(ROWS, PROMPT_LENGTHS, logits, logps, strict=True):
        wanted = values.log_softmax(-1).gather(-1, row[1:, None])[prompt - 1 :, 0]
        torch.testing.assert_close(got[: len(wanted)], wanted.to(got.dtype), rtol=1e-4, atol=1e-4)
        assert not got[len(wanted) :].any()


def gradients(model, logits):
    model.zero_grad()
    log_likelihood(logits).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packed_equals(expected, expected_gradients, model, noise):
    """Logits within 1e-4, every gradient within 1e-3 of its largest entry, or of ``noise`` where that is larger."""
    logits = packed(model)
    for row, wanted in zip(logits, expected, strict=True):
        # Rotary angles, norms and routers of transformers compute in float32, whatever the model's dtype.
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)
    got = gradients(model, logits)
    assert got.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        assert (got[name] - wanted).abs().max() <= 1e-3 * wanted.abs().max().clamp(min=noise), name


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES))
def test_packed_logits_and_gradients_equal_those_of_single_rows(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = families.build(model_type)
    report = check_support(model)
    if not report.supported and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"refused with this transformers: {report.reasons}")  # which is safe, if not yet good
    assert report.supported, report.reasons
    expected = single_rows(model)
    expected_gradients = gradients(model, expected)

    enable_prefix_grouper(model, self_check=False)  # the self-check is this test, at length
    for before, after in zip(expected, single_rows(model), strict=True):
        assert torch.equal(before, after), "an ordinary forward changed"
    assert_log_probs_are_those_of(expected, model)
    noise = 1e-6
    if model_type in families.SINGLE_PRECISION:  # gradients that are zero, as those of key biases, come out as noise
        noise = 1e-3 * max(float(g.abs().max()) for g in expected_gradients.values())
    # Reentrant checkpointing loses what is tagged on tensors; mixers must not need it.
    modes = (None, False, True) if Anatomy(model).mixers else (None, False)
    for reentrant in modes:
        if reentrant is not None:
            if not model.supports_gradient_checkpointing:
                continue
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        assert_packed_equals(expected, expected_gradients, model, noise)

    model.eval()
    disable_prefix_grouper(model)
    for before, after in zip(expected, single_rows(model), strict=True):
        assert torch.equal(before, after), "disabling left something behind"
    assert all(":" not in str(config._attn_implementation) for config in [model.config])


@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES))
def test_in_float32_logits_and_gradients_stay_within_its_rounding(model_type):
    """The dtype in which people compare: logits within 1e-4, every gradient within 1e-3 of its largest entry."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = families.build(model_type).float()
    if not (report := check_support(model)).supported:
        pytest.skip(f"refused with this transformers: {report.reasons}")
    expected = single_rows(model)
    expected_gradients = gradients(model, expected)
    noise = 1e-3 * max(float(g.abs().max()) for g in expected_gradients.values())
    assert_packed_equals(expected, expected_gradients, enable_prefix_grouper(model, self_check=False), noise)
