"""What check_support reports: how layers are run, and what is noted."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins import check_support
from prefix_grouper_plugins.modeling.support import report as support
from tests import tiny
from tests.modeling import families
from tests.modeling.comparing import lora
from tests.modeling.support.test_reasons import unbuilt


def test_the_report_says_how_each_layer_is_run():
    def layers(model_type):
        report = check_support(families.build(model_type))
        assert report.supported and report.reasons == () and report.notes == ()
        return [(layer.attention, layer.backend) for layer in report.layers]

    assert layers("llama") == [("causal", "merged_lse")] * 3
    assert layers("mistral") == [("sliding window of 5", "blockwise")] * 3
    assert layers("gemma2") == [
        ("sliding window of 5, softcap 50.0", "blockwise"),
        ("causal, softcap 50.0", "blockwise"),
        ("sliding window of 5, softcap 50.0", "blockwise"),
    ]
    assert layers("gpt_oss") == [
        ("sliding window of 5, sinks", "blockwise"),
        ("causal, sinks", "merged_lse"),
        ("sliding window of 5, sinks", "blockwise"),
    ]


@pytest.mark.parametrize(
    ("model_type", "dtype", "has_gpu", "expected"),
    [
        # multi-head latent attention: 128 + 64 for query and key, 128 for value
        ("deepseek_v3", torch.float32, True, ("cuda", torch.bfloat16, 192, 128)),
        ("llama", torch.float16, True, ("cuda", torch.float16, 128, 128)),
        ("llama", torch.float32, False, ("cpu", torch.float32, 128, 128)),
    ],
)
def test_the_report_asks_for_the_device_the_dtype_and_the_head_dims(monkeypatch, model_type, dtype, has_gpu, expected):
    """Models without weights, as `doctor` builds them, are described for this machine's GPU if it has one."""
    asked = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        support,
        "auto_backend",
        lambda device, dtype, head_dim, *, value_dim, **_: asked.add((device.type, dtype, head_dim, value_dim)),
    )
    check_support(unbuilt(model_type, num_hidden_layers=2).to(dtype))
    assert asked == {expected}


def test_the_report_names_the_layers_of_a_wrapped_model_too():
    names = [layer.name for layer in check_support(lora(tiny.model())).layers]
    assert names == [f"base_model.model.model.layers.{i}.self_attn" for i in range(3)]


@pytest.mark.parametrize(
    ("model_type", "changes", "rate"),
    [
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.15, "embd_pdrop": 0.0}, 0.15),
        ("opt", {"dropout": 0.15}, 0.15),  # opt and the next two keep a number and call the function
        ("starcoder2", {"residual_dropout": 0.15, "embedding_dropout": 0.0}, 0.15),
        ("seed_oss", {"residual_dropout": 0.15, "attention_dropout": 0.0}, 0.15),
    ],
)
def test_other_dropout_is_allowed_and_noted(model_type, changes, rate):
    report = check_support(unbuilt(model_type, **changes))
    assert report.supported
    assert len(report.notes) == 1 and report.notes[0].startswith(f"dropout of {rate} is active")


def test_lora_dropout_is_noted():
    (note,) = check_support(lora(tiny.model(), lora_dropout=0.05)).notes
    assert note.startswith("dropout of 0.05 is active") and "lora_dropout" in note
