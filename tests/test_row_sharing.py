"""`share_rows`: ordinary calls with padded rows give the ordinary numbers, and forward what rows have in common once."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from prefix_grouper_plugins import UnsupportedModelError, enable_prefix_grouper, share_rows
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling import decoder_of, is_enabled
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES
from tests import tiny
from tests.modeling import families
from tests.modeling.comparing import assert_same_gradients, gradients, lora
from tests.modeling.unseen import unseen
from tests.padded_batches import (
    IDS,
    MASK,
    ROWS,
    TOKENS,
    TRIE,
    assert_shared,
    logits_of,
    loss,
    padded,
    result_of,
    same,
    small,
)


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return small()


# ----------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("left", [0, 4])
def test_logits_and_gradients_are_those_of_the_ordinary_forward(qwen3, left):
    assert_shared(qwen3, *padded(left))


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
@pytest.mark.parametrize("left", [0, 4])
def test_learned_positions_are_those_of_the_ordinary_forward(model_type, left):
    """GPT-2 numbers padded columns, OPT skips padding."""
    assert_shared(families.build(model_type), *padded(left))


def test_positions_that_are_passed_hold():
    model = families.build("gpt2")
    positions = torch.arange(IDS.shape[1]).expand_as(IDS) + 3
    assert_shared(model, position_ids=positions)
    expected = logits_of(model)
    with share_rows(model, self_check=False):
        assert (logits_of(model, position_ids=positions) - expected).abs().max() > 1e-3, "positions made no difference"


def test_rows_with_other_padding_in_front_share_what_their_positions_allow():
    model = families.build("gpt2")
    left = pad_sequence(ROWS, batch_first=True, padding_side="left")
    mask = (left != 0).long()
    expected = logits_of(model, left, mask)
    numbers = (mask.cumsum(1) - 1).clamp(min=0)
    from_zero = logits_of(model, left, mask, position_ids=numbers)
    with share_rows(model, self_check=False) as sharing:
        assert torch.equal(logits_of(model, left, mask), expected)
        assert (sharing.meter.packed, sharing.meter.rows) == (0, len(ROWS))
        torch.testing.assert_close(
            logits_of(model, left, mask, position_ids=numbers), from_zero, rtol=1e-11, atol=1e-11
        )
        assert sharing.meter.packed == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model = lora(small()) if reentrant else small()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    assert_shared(model)


def test_lora_and_the_reference_without_it():
    model = lora(small())
    assert_shared(model)
    with model.disable_adapter():
        reference = logits_of(model)
        with share_rows(model, self_check=False) as sharing, torch.no_grad():
            torch.testing.assert_close(logits_of(model), reference, rtol=1e-11, atol=1e-11)
    assert sharing.meter.packed == 1
    assert (logits_of(model) - reference).abs().max() > 1e-3, "the adapter did nothing"


def test_any_head_stays_as_it_is():
    """The reward model reads the last real token of each row, which a forward for next tokens could leave out."""
    torch.manual_seed(0)
    config = tiny.model("qwen3", num_hidden_layers=2).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    tiny.compute_norms_in_input_dtype(model)

    def scores() -> tuple[Tensor, dict[str, Tensor]]:
        values = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        return values.detach(), gradients(model, values.square().sum())

    (expected, expected_gradients) = scores()
    with share_rows(model, share="tree") as sharing:
        (got, got_gradients) = scores()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert_same_gradients(got_gradients, expected_gradients, 1e-10)
    assert sharing.meter.tokens_forwarded == TRIE


def test_a_model_without_a_head(qwen3):
    expected = qwen3.model(input_ids=IDS, attention_mask=MASK).last_hidden_state * MASK[..., None]
    with share_rows(qwen3.model) as sharing:
        got = qwen3.model(IDS, MASK).last_hidden_state
        as_tuple = qwen3.model(IDS, MASK, use_cache=False, return_dict=False)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert not got[MASK == 0].any()
    assert torch.equal(as_tuple[0], got)
    assert len(as_tuple) == 1
    assert sharing.meter.packed == 2


def test_a_leak_between_rows_would_be_seen(qwen3, monkeypatch):
    """The comparison of these tests can fail: with a token that sees one of another row, it does."""
    made = PrefixLayout.from_rows

    def leaky(*args: Any, **kwargs: Any) -> PrefixLayout:
        layout = made(*args, **kwargs)
        last = layout.segments[-1].clone()
        layout.segments[-1] = torch.tensor([int(last[0]), int(last[1]), len(layout.segments) - 2, int(last[3])])
        layout.segments[-2, 3] = last[3]
        layout.subtree_end[int(layout.segments[-2, 0]) : int(layout.segments[-2, 1])] = int(last[3])
        return layout

    monkeypatch.setattr(PrefixLayout, "from_rows", leaky)
    with pytest.raises(AssertionError, match="not close"):
        assert_shared(qwen3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", sorted(VERIFIED_MODEL_TYPES))
def test_every_verified_type(model_type):
    if model_type not in families.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    model = families.build(model_type)
    try:
        finite = bool(logits_of(model).isfinite().all())
    except RuntimeError as error:  # xlnet
        pytest.skip(f"its own forward of a padded batch fails: {error}")
    if not finite:
        pytest.skip("its own forward of a padded batch gives NaN")
    assert_shared(model, tolerance=1e-3)


# -------------------------------------------------------------------------------------------------- the ordinary path

HEADED = "asks for one entry for each token of each row"
NOT_SHARED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": ({"output_hidden_states": True}, f"output_hidden_states=True {HEADED}"),
    "attentions": ({"output_attentions": True}, f"output_attentions=True {HEADED}"),
    "a cache": ({"use_cache": True}, r"use_cache=True"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(5, 20, 32).double()}, "given `inputs_embeds`"),
    "a 4-D mask": ({"attention_mask": torch.zeros(5, 1, 20, 20).double()}, "attention_mask has 4 dimensions"),
    "masks by kind": ({"attention_mask": {"full_attention": None}}, "attention_mask has type dict"),
    "holes": ({"attention_mask": MASK * (torch.arange(18) != 1)}, "hides tokens in the middle of a row"),
    "several texts in a row": (
        {"attention_mask": None, "position_ids": torch.tensor([[*range(9), *range(9)]])},
        "position_ids do not count through a row",
    ),
    "positions of images": ({"position_ids": torch.arange(18).expand(3, 5, 18)}, "position_ids has 3 dimensions"),
    "something else": ({"cu_seq_lens_q": torch.tensor([0, 18])}, "`cu_seq_lens_q` is an argument of the forward that"),
}


@pytest.mark.parametrize("name", NOT_SHARED)
def test_what_cannot_be_shared_runs_as_ever_and_says_why(qwen3, caplog, name):
    changes, reason = NOT_SHARED[name]
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False, **changes}
    if name == "positions of images":  # the ordinary forward takes none: what is asked for is not what fails
        inputs["position_ids"] = torch.arange(18).expand(1, 5, 18)
        reason = "position_ids has 3 dimensions"
    expected = result_of(qwen3, inputs)
    with share_rows(qwen3, self_check=False) as sharing, caplog.at_level(logging.WARNING):
        assert same(result_of(qwen3, inputs), expected)
        assert same(result_of(qwen3, inputs), expected)
    ((counted, times),) = sharing.meter.fallbacks.items()
    assert times == 2
    assert reason.replace("\\", "") in counted
    assert len([r for r in caplog.records if counted in r.getMessage()]) == 1, "logged once"
    assert sharing.meter.packed == 0


def test_the_config_may_ask_for_more_than_hidden_states(qwen3):
    qwen3.config.output_hidden_states = True
    try:
        with share_rows(qwen3, self_check=False) as sharing:
            assert len(qwen3(input_ids=IDS, attention_mask=MASK, use_cache=False).hidden_states) == 3
    finally:
        qwen3.config.output_hidden_states = False
    assert list(sharing.meter.fallbacks) == [f"output_hidden_states=True {HEADED}"]


def test_the_router_loss_is_that_of_the_ordinary_forward():
    model = families.build("mixtral", router_aux_loss_coef=0.1, output_router_logits=True)
    labels = IDS.masked_fill(MASK == 0, -100)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels, "use_cache": False}
    expected = model(**inputs).loss
    with share_rows(model, self_check=False) as sharing:
        assert torch.equal(model(**inputs).loss, expected)
        assert list(sharing.meter.fallbacks) == [f"output_router_logits=True {HEADED}"]
        model(**inputs, output_router_logits=False)
    assert sharing.meter.packed == 1


def test_rows_with_nothing_in_common_are_no_fallback(qwen3):
    ids = torch.arange(3, 11).view(2, 4)
    expected = qwen3(input_ids=ids, use_cache=False).logits
    with share_rows(qwen3, self_check=False) as sharing:
        assert torch.equal(qwen3(input_ids=ids, use_cache=False).logits, expected)
        qwen3(input_ids=ids[:1], use_cache=False)
    assert (sharing.meter.packed, dict(sharing.meter.fallbacks)) == (0, {})
    assert (sharing.meter.row_tokens, sharing.meter.token_ratio) == (12, 1.0)


def test_generation_gives_the_same_tokens(qwen3):
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids, mask = IDS[:3, :6], torch.ones(3, 6, dtype=torch.long)
    expected = qwen3.generate(input_ids=ids, attention_mask=mask, **settings)
    with share_rows(qwen3, self_check=False) as sharing:
        assert torch.equal(qwen3.generate(input_ids=ids, attention_mask=mask, **settings), expected)
        (reason,) = sharing.meter.fallbacks
        assert "as generation does" in reason
        before = sharing.meter.total
        with sharing.pause():
            qwen3.generate(input_ids=ids, attention_mask=mask, **settings)
        assert sharing.meter.total == before


def test_a_cache_that_was_not_kept_is_missed_aloud(qwen3):
    with share_rows(qwen3, self_check=False):
        cache = qwen3(input_ids=IDS, attention_mask=MASK).past_key_values
        with pytest.raises(AttributeError, match=r"kept no cache: call the model with use_cache=True"):
            qwen3(input_ids=IDS[:, -1:], past_key_values=cache)


def test_an_output_that_is_pooled_from_one_token_is_missed_aloud():
    """BigBird pools the first token, and its head does not read it."""
    model = families.build("big_bird")
    assert_shared(model)
    with share_rows(model, share="tree", self_check=False):
        pooled = model.bert(input_ids=IDS, attention_mask=MASK, use_cache=False).pooler_output
        _, also_pooled = model.bert(input_ids=IDS, attention_mask=MASK, use_cache=False, return_dict=False)
    for output in (pooled, also_pooled):
        with pytest.raises(AttributeError, match=r"of BigBirdModel is that of a packed row.* outside of share_rows"):
            output.mean()


# ------------------------------------------------------------------------------------------------------- on, off, errors


def test_the_model_is_what_it_was_afterwards(qwen3):
    expected = logits_of(qwen3)
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in qwen3.named_modules()}

    def fail() -> None:
        with share_rows(qwen3):
            assert is_enabled(qwen3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not is_enabled(qwen3)
    assert qwen3.config._attn_implementation == "sdpa"
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in qwen3.named_modules()}
    assert torch.equal(logits_of(qwen3), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_not_shared_and_can_be(qwen3, copied):
    model = type(qwen3)(qwen3.config)  # whose hidden states nobody has asked for: transformers' hooks cannot be pickled
    model.load_state_dict(qwen3.state_dict())
    expected = logits_of(model)
    with share_rows(model, self_check=False) as sharing:
        other = copied(model)
        torch.testing.assert_close(logits_of(other), expected, rtol=1e-6, atol=1e-6)
        assert sharing.meter.row_tokens == 0
        with share_rows(other, self_check=False) as others:
            logits_of(other)
        assert (sharing.meter.packed, others.meter.packed) == (0, 1)


def test_short_beginnings_do_not_pay(qwen3):
    expected = logits_of(qwen3)
    for share, tokens in (("tree", TRIE), ("auto", TOKENS - 2 * 11)):  # only the prompt of three rows is long enough
        with share_rows(qwen3, share=share, self_check=False) as sharing:
            torch.testing.assert_close(logits_of(qwen3), expected, rtol=1e-11, atol=1e-11)
        assert sharing.meter.tokens_forwarded == tokens
    with (
        pytest.raises(ValueError, match="share is 'prompt': choose 'auto' or 'tree'"),
        share_rows(qwen3, share="prompt"),
    ):
        pass


def test_two_at_once_are_an_error(qwen3):
    with share_rows(qwen3), pytest.raises(ValueError, match="Qwen3Model are being shared already"), share_rows(qwen3):
        pass
    with share_rows(qwen3):  # the one outside has been left
        pass


def test_a_backward_of_checkpointed_layers_outside_is_an_error():
    model = small()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with share_rows(model, self_check=False):
        value = loss(logits_of(model))
    with pytest.raises((RuntimeError, UnsupportedModelError)):
        value.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_dropout_gives_other_numbers_and_a_warning(dropout, caplog):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout)).train()
    with share_rows(model):
        pass
    enable_prefix_grouper(model)
    warned = [record.message for record in caplog.records if "share one dropout mask" in record.message]
    assert len(warned) == (2 if dropout else 0), "one of each"
    assert all("dropout of 0.25 is active" in line for line in warned)


def test_a_model_that_cannot_be_shared_is_refused_or_left_alone():
    model = small(attention_dropout=0.1)
    expected = logits_of(model)
    with pytest.raises(UnsupportedModelError, match=r"attention dropout is 0\.1"), share_rows(model):
        pass
    with share_rows(model, on_unsupported="fallback") as sharing:
        assert torch.equal(logits_of(model), expected)
    assert "attention dropout" in str(sharing.reason)
    assert list(sharing.meter.fallbacks) == [sharing.reason]


def test_a_model_that_fails_after_a_change_takes_the_ordinary_path_where_that_was_asked_for(qwen3):
    with share_rows(qwen3, on_unsupported="fallback") as sharing:
        logits_of(qwen3)
        hook = qwen3.model.layers[0].mlp.register_forward_hook(lambda module, args, x: x + x.roll(1, dims=-2))
        found = logits_of(qwen3)
        assert sharing.reason is not None and "has changed since it was checked" in sharing.reason
        assert (sharing.meter.packed, len(sharing.meter.fallbacks)) == (1, 1)
    assert torch.equal(found, logits_of(qwen3))
    hook.remove()


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nn.Linear(2, 2), "Linear contains no transformers model"), (unseen(), "has no decoder apart from its head")],
    ids=["no model", "no decoder"],
)
def test_what_has_no_decoder_is_refused(model, reason):
    with pytest.raises(UnsupportedModelError, match=reason), share_rows(model):
        pass
    with share_rows(model, on_unsupported="fallback"):
        pass


def test_a_learned_prompt_is_refused(qwen3):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="learns a prompt"), share_rows(model):
        pass


class Mixing(LlamaForCausalLM):
    """From ``limit`` tokens on, a forward of one row adds what comes before each token; the self-check is shorter."""

    def __init__(self, config: Any, limit: int) -> None:
        super().__init__(config)
        own = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            if output[0].shape[0] == 1 and output[0].shape[1] >= limit:
                output.last_hidden_state = output[0] + torch.roll(output[0], 1, 1)
            return output

        self.model.forward = forward


@pytest.mark.parametrize("limit", [480, 10_000])
def test_the_first_batch_of_a_class_that_no_test_has_compared_runs_both_ways(limit, caplog):
    model = Mixing(small("llama").config, limit).eval()
    model.model.__class__ = type("OwnModel", (type(model.model),), {})  # as code from outside of transformers is
    rows = [torch.cat([torch.arange(3, 23).repeat(24), torch.tensor([3 + i] * 4)]) for i in range(3)]
    ids = torch.stack(rows)
    expected = model(input_ids=ids, use_cache=False).logits
    with share_rows(model, on_unsupported="fallback") as sharing, caplog.at_level(logging.INFO):
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if limit == 480:
        assert "on the first batch outputs (log-probs) differ" in str(sharing.reason)
        assert sharing.meter.packed == 0
    else:
        assert sharing.meter.packed == 1
        assert "the first batch of OwnModel, ordinary and shared" in caplog.text


def test_a_model_whose_weights_come_later_is_checked_before_its_first_packed_forward(qwen3, caplog):
    with torch.device("meta"):
        model = type(qwen3)(qwen3.config)
    with share_rows(model) as sharing, caplog.at_level(logging.INFO):
        model.to_empty(device="cpu").load_state_dict(qwen3.state_dict())
        for empty, buffer in zip(
            model.buffers(), qwen3.buffers(), strict=True
        ):  # rotary frequencies are in no state dict
            empty.copy_(buffer)
        assert "self-check" not in caplog.text
        logits_of(model)
        logits_of(model)
    assert caplog.text.count("Qwen3Model passed the self-check") == 1
    assert sharing.meter.packed == 2


def test_the_decoder_of_a_model_is_found(qwen3):
    assert decoder_of(qwen3) is qwen3.model
    assert decoder_of(unseen()) is None
