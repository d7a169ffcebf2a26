"""Masks that are not known here are refused."""

from __future__ import annotations

from prefix_grouper_plugins import check_support
from tests.modeling.unseen import unseen


def test_masks_that_nobody_knows_are_refused_before_any_self_check(monkeypatch):
    """A few short rows could not show what they do to long ones."""
    model = unseen()
    model.config.attention_chunk_size = 8192
    reason = "UnseenForCausalLM masks its attention in a way that is not known here: attention_chunk_size=8192"
    assert check_support(model).reasons == (reason,)
