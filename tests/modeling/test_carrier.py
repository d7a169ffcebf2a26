"""How the layout travels: by the keyword, by the tag on the mask, through checkpointing and torch.compile."""

from __future__ import annotations

import pytest
import torch

from prefix_grouper_plugins import PrefixLayout, UnsupportedModelError, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, LAYOUT_TAG
from tests import tiny
from tests.modeling import families
from tests.modeling.comparing import IDS, LAYOUT, assert_same_gradients, gradients, loss, packed


@pytest.mark.parametrize("model_type", ["qwen3", "stablelm", "nemotron"])
def test_the_tag_on_the_mask_suffices_also_where_keywords_are_dropped(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    inputs = packed_inputs(LAYOUT, IDS)
    both = model(**inputs).logits
    inputs.pop(LAYOUT_KWARG)
    assert torch.equal(model(**inputs).logits, both)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_the_keyword_suffices_where_the_mask_is_copied_on_the_way(model_type):
    model = enable_prefix_grouper(families.build(model_type))
    inputs = packed_inputs(LAYOUT, IDS)
    both = model(**inputs).logits
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    assert not hasattr(inputs["attention_mask"], LAYOUT_TAG)
    assert torch.equal(model(**inputs).logits, both)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["qwen3", "stablelm", "gemma2", "gpt_oss"])
def test_gradient_checkpointing_changes_no_gradient(model_type, reentrant):
    # Without the self-check, whose forwards the hook below would count: it runs again once the model has changed.
    model = enable_prefix_grouper(families.build(model_type), self_check=False).train()
    expected = gradients(model, loss(LAYOUT.unpack(packed(model))))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
    calls = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(model, loss(LAYOUT.unpack(packed(model))))
    hook.remove()
    assert len(calls) == 2, "nothing was recomputed, so this test says nothing"
    assert_same_gradients(got, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "stablelm"])
def test_a_compiled_model_gives_the_same_logits_and_gradients(model_type):
    torch._dynamo.reset()
    model = enable_prefix_grouper(families.build(model_type, num_hidden_layers=2))
    eager = packed(model)
    expected = gradients(model, loss(LAYOUT.unpack(eager)))
    # One graph, but on torch 2.8, where transformers breaks that of the ordinary model too.
    whole = torch.__version__ >= torch.torch_version.TorchVersion("2.9")
    compiled = packed(torch.compile(model, backend="aot_eager", fullgraph=whole))
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(model, loss(LAYOUT.unpack(compiled))), expected, 1e-12)
    # The second layout of another shape must not run with what was compiled for the first.
    rows = tiny.rows({5: [2, 3], 8: [1, 4, 4]}, seed=1)
    layout = PrefixLayout.from_rows(rows)
    inputs = packed_inputs(layout, layout.pack(rows))
    again = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(again, model(**inputs).logits, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_no_call_of_an_enabled_model_breaks_the_graph_in_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and ordinary ones; transformers itself breaks some. Nor does Dynamo warn of a cache that it ignores."""
    warnings: list[str] = []
    monkeypatch.setattr("torch._dynamo.utils.warn_once", lambda message, *rest: warnings.append(message), raising=False)
    model = enable_prefix_grouper(families.build("qwen3", num_hidden_layers=1))
    for inputs in (packed_inputs(LAYOUT, IDS), {"input_ids": IDS[None], "use_cache": False}):
        torch._dynamo.reset()
        reasons = torch._dynamo.explain(model)(**inputs).break_reasons
        frames = [frame.filename for reason in reasons for frame in reason.user_stack]
        assert not [name for name in frames if "prefix_grouper_plugins" in name], reasons
    assert not [message for message in warnings if "prefix_grouper_plugins" in message]
    torch._dynamo.reset()


def test_a_model_that_has_changed_is_checked_when_it_is_compiled() -> None:
    """In the frame that cannot be compiled for the check; a compilation that must be one graph says what to do instead."""
    torch._dynamo.reset()
    model = enable_prefix_grouper(families.build("qwen3", num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: (output[0].flip(1), *output[1:]))
    with pytest.raises(Exception, match=r"changed since it was checked: run one packed forward without torch\.compile"):
        packed(torch.compile(model, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    with pytest.raises(
        UnsupportedModelError, match="has changed since it was checked, and cannot be shared any longer"
    ):
        packed(torch.compile(model, backend="eager"))
    torch._dynamo.reset()
