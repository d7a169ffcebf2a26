"""Settings of verified types other than those that test_families.py builds: exact as well, or refused.

What a config can ask for is found by reading the modeling files; each case here is one that decides what a token sees, at
which position, or how states run.
"""

from __future__ import annotations

import pytest

from prefix_grouper_plugins import UnsupportedModelError, check_support, enable_prefix_grouper
from prefix_grouper_plugins.modeling.masks import mask_functions
from tests.modeling import families
from tests.modeling.unseen import UnseenForCausalLM, unseen

ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        # The window stands in the mask alone, as attention does not hand it on.
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 3, "layer_types": ALTERNATING},
            "Qwen2MoeAttention masks with sliding_window=3 but calls its attention function with None",
        ),
        (
            "smollm3",
            {"use_sliding_window": False, "sliding_window": 3, "layer_types": ALTERNATING},
            "SmolLM3Attention masks with sliding_window=3 but calls its attention function with None",
        ),
        # And the other way round: kernels without a mask would hide what the model's mask shows.
        ("olmoe", {"sliding_window": 3}, "OlmoeAttention masks with sliding_window=None but calls .* with 3"),
        # transformers then makes masks for reading both ways.
        ("llama", {"is_causal": False}, "attention is not causal"),
        ("falcon", {"is_causal": False}, "attention is not causal"),
    ],
)
def test_what_a_mask_alone_would_say_is_refused(model_type, changes, reason):
    model = families.build(model_type, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        enable_prefix_grouper(model, prove=False)


def test_a_window_that_is_changed_in_the_config_of_a_built_model_is_refused():
    """Masks follow the config, attention keeps what it read when it was built."""
    model = families.build("gemma2")
    assert check_support(model).supported
    model.config.sliding_window = 2
    assert "masks with sliding_window=2 but calls its attention function with 5" in str(check_support(model).reasons)


def test_a_mask_that_is_made_in_a_lambda_is_seen():
    """So transformers does where it makes only the masks that the layers ask for."""

    class Lazy(UnseenForCausalLM):
        def forward(self, *args, **kwargs):
            masks = {"chunked_attention": lambda: create_chunked_causal_mask(self.config)}  # noqa: F821
            return super().forward(*args, **kwargs) if masks else None

    model = unseen()
    model.__class__ = Lazy
    assert mask_functions(model) == {"create_chunked_causal_mask"}
    assert "not known here: create_chunked_causal_mask" in str(check_support(model).reasons)
