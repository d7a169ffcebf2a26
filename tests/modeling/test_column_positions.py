"""Decoders that take no `position_ids` and count columns: packed tokens have the positions of their call."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins import (
    PrefixLayout,
    UnsupportedModelError,
    check_support,
    disable_prefix_grouper,
    enable_prefix_grouper,
    share_rows,
)
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from tests.modeling import families
from tests.modeling.test_families import BLOCKS, PROMPT_LENGTHS, ROWS, packed, single_rows


@pytest.fixture(scope="module")
def bart():
    return families.build("bart")


def test_a_left_padded_batch_is_what_it_is_in_the_ordinary_path(bart):
    """Which counts the padded columns too, as no row by itself does."""
    ids, mask = (torch.cat([BLOCKS[i], BLOCKS[i + 2]], dim=1) for i in (0, 1))
    batch, width = GroupedBatch(*BLOCKS, padded_positions=True), BLOCKS[0].shape[1]
    with torch.no_grad():
        logits = bart(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, width - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0] * BLOCKS[3]
        alone = single_rows(bart)[-1].log_softmax(-1).gather(-1, ROWS[-1][1:, None])[PROMPT_LENGTHS[-1] - 1 :, 0]
        enable_prefix_grouper(bart)
        logits = bart(**packed_inputs(batch.layout, batch.input_ids, batch.position_ids)).logits[0, batch.positions]
        disable_prefix_grouper(bart)
    got = batch.scatter(logits.log_softmax(-1).gather(-1, batch.labels[batch.positions][:, None])[:, 0])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    assert (alone - wanted[-1, : len(alone)]).abs().max() > 1e-2, "the padding made no difference"


def test_positions_of_the_call_reach_the_embedding(bart):
    layout = PrefixLayout.from_rows(ROWS)
    shifted = layout.position_ids + 2
    enable_prefix_grouper(bart)
    shown = []
    hook = bart.model.decoder.embed_positions.register_forward_hook(lambda module, args, output: shown.append(output))
    bart(**packed_inputs(layout, layout.pack(ROWS), shifted))
    hook.remove()
    disable_prefix_grouper(bart)
    weight = bart.model.decoder.embed_positions.weight
    assert torch.equal(shown[-1][0], weight[shifted + bart.model.decoder.embed_positions.offset])


def test_a_packed_call_without_positions_is_an_error(bart):
    layout = PrefixLayout.from_rows(ROWS)
    inputs = packed_inputs(layout, layout.pack(ROWS))
    del inputs["position_ids"]
    enable_prefix_grouper(bart)
    with pytest.raises(ValueError, match="has no `position_ids`"):
        bart(**inputs)
    with pytest.raises(ValueError, match="runs in a packed call without `position_ids`"):
        bart.model.decoder(**inputs)
    disable_prefix_grouper(bart)


def test_attention_to_an_encoder_is_an_error_in_a_packed_call(bart):
    layout = PrefixLayout.from_rows(ROWS)
    states = torch.zeros(1, 4, bart.config.d_model, dtype=torch.float64)
    enable_prefix_grouper(bart)
    with pytest.raises(UnsupportedModelError, match="is not causal"):
        bart(**packed_inputs(layout, layout.pack(ROWS)), encoder_hidden_states=states)
    disable_prefix_grouper(bart)
    bart(input_ids=ROWS[0][None], encoder_hidden_states=states)


def test_disabling_restores_the_embedding(bart):
    own = type(bart.model.decoder.embed_positions)
    enable_prefix_grouper(enable_prefix_grouper(bart))
    assert is_enabled(bart) and type(bart.model.decoder.embed_positions) is not own
    disable_prefix_grouper(bart)
    assert not is_enabled(bart) and type(bart.model.decoder.embed_positions) is own


def test_only_embeddings_whose_decoder_takes_no_positions_count_columns():
    for model_type, counts in {"bart": 1, "marian": 1, "roformer": 1, "whisper": 0, "opt": 0, "xglm": 0}.items():
        assert len(Anatomy(families.build(model_type)).column_positions) == counts, model_type


@pytest.mark.parametrize("left", [0, 3])
def test_share_rows_passes_positions_on(bart, left):
    ids = torch.nn.functional.pad(torch.stack([row[:11] for row in ROWS[:2]]), (left, 0))
    mask = (ids != 0).long()
    expected = bart(input_ids=ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
    with share_rows(bart, share="tree") as sharing:
        got = bart(input_ids=ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
    assert sharing.meter.packed == 1
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_an_embedding_that_still_counts_columns_is_noticed(bart, monkeypatch):
    monkeypatch.setattr(Anatomy, "column_positions", property(lambda self: [], lambda self, value: None), raising=False)
    expected = single_rows(bart)
    enable_prefix_grouper(bart, self_check=False)
    got = packed(bart)
    disable_prefix_grouper(bart)
    assert max((x - y).abs().max() for x, y in zip(got, expected, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("xlm", {"causal": False}, "xlm reads both ways"),
        ("xlnet", {"attn_type": "bi"}, 'xlnet with attn_type="bi" reads both ways'),
        ("xlnet", {"same_length": True}, "hides from each token all others"),
        ("xlnet", {"bi_data": True}, "reads half of the rows of a batch backwards"),
        ("trocr", {"use_learned_position_embeddings": False}, "only learned positions are supported"),
    ],
)
def test_other_settings_of_these_types_are_refused(model_type, changes, reason):
    with torch.device("meta"):
        assert reason in check_support(families.build(model_type, **changes)).reasons[0]
