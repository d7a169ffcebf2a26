"""The self-check on first use: what is right passes, each kind of fault is caught, and the model is left as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from prefix_grouper_plugins import (
    PrefixLayout,
    UnsupportedModelError,
    check_support,
    disable_prefix_grouper,
    enable_prefix_grouper,
    self_check,
)
from prefix_grouper_plugins.modeling import attention as interface
from prefix_grouper_plugins.modeling import is_enabled, packed_inputs
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG
from prefix_grouper_plugins.modeling.mixers import on_rows as mixers
from prefix_grouper_plugins.sharing import SharingGate, self_check_pending
from tests import tiny
from tests.modeling import families
from tests.modeling.unseen import unseen

ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)
DTYPES = [torch.float32, torch.bfloat16]
FAULTS = ["mask ignored", "state leaked", "kwarg dropped", "wrong position"]


def packed(model: Any) -> list[torch.Tensor]:
    return LAYOUT.unpack(model(**packed_inputs(LAYOUT, LAYOUT.pack(ROWS))).logits[0])


def largest_error(model: Any) -> float:
    """Of the packed forward against single rows, with whatever is wrong with it."""
    alone = [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]
    return max(float((a - b).detach().abs().max()) for a, b in zip(packed(model), alone, strict=True))


# --- what is right passes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt2", "mamba2", "falcon"])
def test_a_model_that_is_right_passes_in_every_dtype(model_type, dtype):
    model = enable_prefix_grouper(
        tiny.model(model_type).to(dtype) if model_type == "qwen3" else built(model_type, dtype)
    )
    result = self_check(model)
    assert result.passed and result.reason is None
    assert 0 < result.tokens < 0.6 * result.row_tokens and result.seconds > 0
    assert result.gradient < (1e-5 if dtype.itemsize >= 4 else 0.1)


def built(model_type: str, dtype: torch.dtype) -> Any:
    """With weights of a usual size: large ones turn rounding in half precision into chaos."""
    model = families.build(model_type)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_class_that_nobody_has_seen_is_let_in_because_it_is_right(dtype):
    model = unseen(dtype=dtype)
    report = check_support(model)
    assert report.supported and report.unverified == (
        "UnseenForCausalLM is code from outside of transformers, which no test has compared with single rows",
    )
    enable_prefix_grouper(model)
    assert is_enabled(model) and self_check(model).passed
    assert largest_error(model) < (1e-5 if dtype is torch.float32 else 0.1)


def test_without_the_self_check_an_unseen_class_is_refused():
    with pytest.raises(UnsupportedModelError, match="UnseenForCausalLM is code from outside of transformers"):
        enable_prefix_grouper(unseen(), self_check=False)


def test_a_type_of_transformers_that_no_test_has_compared_is_decided_by_the_self_check(monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(type(model.config), "model_type", "qwen99")
    with pytest.raises(UnsupportedModelError, match="model type 'qwen99' has not been verified"):
        enable_prefix_grouper(model, self_check=False)
    assert is_enabled(enable_prefix_grouper(model))


def test_frozen_weights_and_adapters_are_checked_by_what_they_compute():
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert self_check(enable_prefix_grouper(model)).passed
    frozen = tiny.model().requires_grad_(False)
    assert self_check(enable_prefix_grouper(frozen)).gradient > 0


def test_adapters_are_judged_by_the_dtype_that_they_compute_in():
    """TRL gives the adapters of a quantised model bfloat16 weights, also where the model itself is in float32."""
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter.data
    assert model.dtype == torch.float32
    result = self_check(enable_prefix_grouper(model))
    assert result.passed
    assert result.gradient > 1e-3  # more than float32 explains


def test_a_model_without_a_language_head_is_checked_by_its_hidden_states():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("qwen3", **tiny.SIZES, num_labels=1))
    assert self_check(enable_prefix_grouper(model.eval())).passed


# --- what is wrong is caught -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_unseen_class_is_refused_because_it_is_wrong(fault, dtype):
    model = unseen(fault, dtype)
    with pytest.raises(
        UnsupportedModelError, match=r"packed rows of UnseenForCausalLM are not its rows: .*(differ|depends)"
    ):
        enable_prefix_grouper(model)
    assert not is_enabled(model)
    assert not any(hasattr(p, "grad") and p.grad is not None for p in model.parameters())


def ignore_the_mask(model: Any, patch: pytest.MonkeyPatch) -> None:
    """One layer attends to everything."""
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("prefix_layout", None) is not None:
            length = kwargs["hidden_states"].shape[1]
            kwargs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
        return own(*args, **kwargs)

    patch.setattr(attention, "forward", forward)


def drop_the_keyword(model: Any, patch: pytest.MonkeyPatch) -> None:
    """The layout does not reach one layer, which takes the packed row for one long text."""
    attention = model.model.layers[1].self_attn
    own = attention.forward
    patch.setattr(attention, "forward", lambda *a, **k: own(*a, **{**k, "attention_mask": None, "prefix_layout": None}))


def count_packed_positions(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = model.model.rotary_emb.forward
    patch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: own(x, torch.arange(x.shape[1])[None]))


def leak_the_state(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Mixers run on over the packed row, from one response into the next."""

    def straight_on(module: Any, run: Any, layout: Any, args: Any, kwargs: Any) -> Any:
        return run(*args, **{**kwargs, **{name: None for name in kwargs if "mask" in name}})

    patch.setattr(mixers, "run_packed", straight_on)


PLANTED: dict[str, tuple[str, Callable[[Any, pytest.MonkeyPatch], None]]] = {
    "mask ignored": ("qwen3", ignore_the_mask),
    "kwarg dropped": ("qwen3", drop_the_keyword),
    "wrong position": ("qwen3", count_packed_positions),
    "state leaked: Mamba-2": ("mamba2", leak_the_state),
    "state leaked: gated delta net": ("qwen3_5_text", leak_the_state),
    "state leaked: convolution": ("lfm2", leak_the_state),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_a_verified_model_is_caught(monkeypatch, fault, dtype):
    model_type, plant = PLANTED[fault]
    model = built(model_type, dtype)
    plant(model, monkeypatch)
    enable_prefix_grouper(model, self_check=False)  # what a table of types says
    assert largest_error(model) > 0.05, "without the self-check it is silently wrong"
    assert self_check(model).reason is not None
    with pytest.raises(UnsupportedModelError, match=f"packed rows of {type(model).__name__} are not its rows"):
        enable_prefix_grouper(model)
    assert not is_enabled(model)


def test_a_layer_that_was_switched_back_is_caught():
    """Foreign code that resets an implementation after it was set."""
    model = enable_prefix_grouper(tiny.model("llama"), self_check=False)
    layer = model.model.layers[2].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation = "sdpa"
    assert "the packed forward failed with RuntimeError: The size of tensor" in str(self_check(model).reason)


def test_a_kernel_that_loses_a_gradient_is_caught(monkeypatch):
    """Outputs are right, and what flows back to keys is not."""
    own = interface.shared_prefix_attention
    monkeypatch.setattr(
        interface, "shared_prefix_attention", lambda query, key, *a, **k: own(query, key.detach(), *a, **k)
    )
    for dtype in DTYPES:
        with pytest.raises(UnsupportedModelError, match=r"gradients .*differ by"):
            enable_prefix_grouper(tiny.model().to(dtype))


def test_a_packed_forward_that_fails_is_a_reason(monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(interface, "shared_prefix_attention", broken)
    with pytest.raises(UnsupportedModelError, match="the packed forward failed with RuntimeError: no kernel image"):
        enable_prefix_grouper(tiny.model())


def test_a_layer_that_makes_a_mask_of_its_own_is_refused():
    model = enable_prefix_grouper(tiny.model())
    attention = model.model.layers[0].self_attn
    own, length = attention.forward, LAYOUT.num_tokens
    attention.forward = lambda *a, **k: own(*a, **{**k, "attention_mask": torch.zeros(1, 1, length, length)})
    with pytest.raises(UnsupportedModelError, match=r"got a mask of \(1, 1, \d+, \d+\) of the model's own making"):
        packed(model)


def test_a_placeholder_without_its_layout_is_an_error():
    model = enable_prefix_grouper(tiny.model())
    inputs = packed_inputs(LAYOUT, LAYOUT.pack(ROWS))
    inputs.pop(LAYOUT_KWARG)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    with pytest.raises(RuntimeError, match="Qwen3Attention runs in a packed forward, but the layout was lost"):
        model(**inputs)


# --- nothing is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "mamba2", "mixtral"])
def test_the_model_and_the_random_state_are_what_they_were(model_type):
    model = families.build(model_type).float().train()
    model.model.layers[1].eval() if model_type == "qwen3" else None
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    enable_prefix_grouper(model, self_check=False)
    before = state_of(model)
    assert self_check(model).passed
    assert_same_state(state_of(model), before)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "random": torch.get_rng_state().clone(),
        "modes": [module.training for module in model.modules()],
        "tensors": {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {name: p.grad.clone() for name, p in model.named_parameters()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


def assert_same_state(after: dict[str, Any], before: dict[str, Any]) -> None:
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_statistics_that_a_forward_would_gather_are_put_back():
    def count(module: Any, args: Any, output: Any) -> None:
        module.seen += 1

    model = enable_prefix_grouper(tiny.model(), self_check=False)
    model.model.register_buffer("seen", torch.zeros(()))
    model.model.register_forward_hook(count)
    assert self_check(model).passed
    assert model.model.seen == 0


def test_it_works_in_inference_mode_and_without_gradients():
    for context in (torch.no_grad, torch.inference_mode):
        model = tiny.model()
        with context():
            assert self_check(enable_prefix_grouper(model, self_check=False)).passed


def test_a_model_is_checked_once_for_each_backend(monkeypatch):
    calls: list[int] = []
    model = tiny.model()
    model.register_forward_hook(lambda *_: calls.append(1))
    first = self_check(enable_prefix_grouper(model))
    cost = len(calls)
    # Five rows and the packed one in training mode and in evaluation mode, and the packed one with other rows changed.
    assert cost <= 13 and self_check(enable_prefix_grouper(model)) is first and len(calls) == cost
    enable_prefix_grouper(model, backend="blockwise")
    assert len(calls) == 2 * cost
    with pytest.raises(ValueError, match="call enable_prefix_grouper"):
        self_check(disable_prefix_grouper(model))


# --- when ------------------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_checked_before_its_first_packed_forward(caplog):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **tiny.SIZES))
    enable_prefix_grouper(model)
    assert self_check_pending(model)
    assert "has not been loaded" in str(self_check(model)) or "have not been loaded" in str(self_check(model))
    model.load_state_dict(tiny.model().state_dict(), assign=True)
    model.model.rotary_emb = tiny.model().model.rotary_emb
    model(input_ids=ROWS[0][None])
    assert self_check_pending(model), "an ordinary forward needs none"
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        packed(model)
        packed(model)
    assert not self_check_pending(model)
    (message,) = caplog.messages
    assert message.startswith("prefix grouper: Qwen3ForCausalLM passed the self-check in ")


def test_a_wrong_model_is_stopped_at_its_first_packed_forward():
    model = enable_prefix_grouper(unseen("wrong position"), self_check="later")
    copied = copy.deepcopy(model)
    for one in (model, copied):
        with pytest.raises(UnsupportedModelError, match="are not its rows"):
            packed(one)
    assert not is_enabled(model) and not self_check_pending(model), "it is not offered again"


def test_what_was_not_covered_is_said():
    result = self_check(enable_prefix_grouper(tiny.model("mistral", sliding_window=4096)))
    assert result.passed and str(result).endswith(
        "not covered: the sliding window of 4096, which is longer than these rows"
    )
    short = self_check(enable_prefix_grouper(tiny.model("mistral", sliding_window=20)))
    assert short.passed and short.not_covered is None and short.tokens > result.tokens


def test_an_ordinary_forward_that_fails_shows_nothing_and_refuses_only_what_needs_the_check(monkeypatch):
    class OwnLlama(LlamaForCausalLM):
        pass

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("FlashAttention only supports fp16 and bf16")

    for cls, refused in ((LlamaForCausalLM, False), (OwnLlama, True)):
        model = cls(tiny.model("llama").config)
        monkeypatch.setattr(model.model.embed_tokens, "forward", broken)
        if refused:
            with pytest.raises(
                UnsupportedModelError, match=r"OwnLlama could not be self-checked: the ordinary forward failed"
            ):
                enable_prefix_grouper(model)
        else:
            assert not self_check(enable_prefix_grouper(model)).passed


def test_an_ordinary_forward_that_fails_in_evaluation_mode_is_named_as_not_covered(monkeypatch):
    """As that of a tiny model in 4 bits on a CPU; a trainer that never evaluates trains it all the same."""
    model = enable_prefix_grouper(tiny.model(), self_check="later")
    forward = type(model).forward

    def fails(self, *args, **kwargs):
        if not self.training:
            raise RuntimeError("no kernel for that")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", fails)
    result = self_check(model)
    assert result.passed
    assert "evaluation mode, in which the ordinary forward failed with RuntimeError: no kernel for that" in str(result)


def test_a_padded_batch_of_nan_is_named():
    """transformers' eager attention in float64: from the second layer on, rows with padding in front of them are NaN."""
    model = families.build("qwen3")
    model.set_attn_implementation("eager")
    gate = SharingGate()
    gate.enable([model.double()], left_padding=True)
    with pytest.raises(UnsupportedModelError, match=r"padded on the left returns NaN in torch.float64: .*='sdpa'"):
        gate.self_check(model)
