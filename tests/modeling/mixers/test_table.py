"""The table of mixers: their masks and biases, which classes are in it, and that a wrong entry is noticed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig
from transformers.models.falcon.modeling_falcon import FalconFlashAttention2

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.modeling.mixers import on_rows as mixers
from prefix_grouper_plugins.modeling.mixers import table as known_mixers
from tests.modeling import test_families
from tests.modeling.mixers.test_on_rows import assert_packed_is_exact
from tests.modeling.test_families import ROWS, packed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{"alibi": True}, {"alibi": True, "multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}],
)
def test_every_kind_of_falcon_is_exact(changes, attention):
    config = FalconConfig(vocab_size=24, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    assert_packed_is_exact(enable_prefix_grouper(model))


def test_left_padded_rows_of_bloom_are_as_without_padding():
    config = BloomConfig(vocab_size=24, hidden_size=32, n_head=4, n_layer=2, hidden_dropout=0.0, attention_dropout=0.0)
    model = enable_prefix_grouper(AutoModelForCausalLM.from_config(config).eval())
    padded = torch.cat([torch.zeros(4, dtype=torch.int64), ROWS[0]])
    mask = torch.tensor([0] * 4 + [1] * len(ROWS[0]))
    ordinary = model(input_ids=padded[None], attention_mask=mask[None]).logits[0, 4:-1]
    torch.testing.assert_close(packed(model)[0], ordinary, rtol=1e-4, atol=1e-4)


def test_a_subclass_of_a_known_mixer_is_not_known():
    """FlashAttention variants of old families take other masks than the class that they derive from."""
    with torch.device("meta"):
        assert mixers.mixer_of(FalconFlashAttention2(FalconConfig(), layer_idx=0)) is None


def test_a_dropped_mask_is_noticed(monkeypatch):
    without = {**known_mixers._MIXERS, "rembert.RemBertSelfAttention": known_mixers.Mixer("without a mask")}
    monkeypatch.setattr(known_mixers, "_MIXERS", without)
    with pytest.raises(AssertionError, match="not close"):
        test_families.test_packed_logits_and_gradients_equal_those_of_single_rows("rembert")
