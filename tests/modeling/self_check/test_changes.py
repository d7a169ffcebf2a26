"""A model that has changed since it was checked is checked again before its next packed forward, or refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LilyConfig, LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3

from prefix_grouper_plugins import (
    PrefixLayout,
    UnsupportedModelError,
    disable_prefix_grouper,
    enable_prefix_grouper,
    prefix_grouped_logps,
)
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.self_check.changes import fingerprint
from tests import tiny

ROWS = tiny.rows({9: [4, 7, 2], 3: [6, 2]})
LAYOUT = PrefixLayout.from_rows(ROWS)


def packed(model: Any) -> Tensor:
    return model(**packed_inputs(LAYOUT, LAYOUT.pack(ROWS))).logits[0]


def leak(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.5 * F.pad(output, (0, 0, 1, 0))[..., :-1, :]


class LeakingMLP(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return leak(self, (), self.mlp(x))


def a_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(leak)


def another_layer(model: Any) -> None:
    model.model.layers[1].mlp = LeakingMLP(model.model.layers[1].mlp)


def another_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: leak(mlp, (), own(x))


def a_pre_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (leak(module, (), args[0]),))


@pytest.mark.parametrize("change", [a_hook, another_layer, another_forward, a_pre_hook])
def test_what_leaks_since_the_self_check_is_refused(change):
    model = enable_prefix_grouper(tiny.model())
    packed(model)
    change(model)
    for _ in range(2):
        with pytest.raises(
            UnsupportedModelError, match=r"has changed since it was checked.* depends on tokens of other"
        ):
            packed(model)
    with pytest.raises(UnsupportedModelError, match="a row depends on tokens of other rows"):
        enable_prefix_grouper(disable_prefix_grouper(model))


def a_forward_of_a_class(model: Any, monkeypatch: Any) -> None:
    own = modeling_qwen3.Qwen3MLP.forward
    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", lambda self, x: leak(self, (), own(self, x)))


def a_decorated_forward_of_a_class(model: Any, monkeypatch: Any) -> None:
    own = modeling_qwen3.Qwen3MLP.forward
    decorated = functools.wraps(own)(lambda self, x: leak(self, (), own(self, x)))
    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", decorated)


def a_function_of_the_modeling_file(model: Any, monkeypatch: Any) -> None:
    own = modeling_qwen3.apply_rotary_pos_emb

    def patched(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key = own(query, key, *args, **kwargs)
        return query, leak(model, (), key)

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", patched)


def a_call_of_a_class(model: Any, monkeypatch: Any) -> None:
    own = modeling_qwen3.Qwen3MLP.__call__
    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "__call__", lambda self, x: leak(self, (), own(self, x)))


def a_hook_of_all_modules(model: Any, monkeypatch: Any) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return leak(module, args, output) if isinstance(module, modeling_qwen3.Qwen3MLP) else None

    monkeypatch.setitem(nn.modules.module._global_forward_hooks, -1, hook)


@pytest.mark.parametrize(
    "change",
    [
        a_forward_of_a_class,
        a_decorated_forward_of_a_class,
        a_function_of_the_modeling_file,
        a_call_of_a_class,
        a_hook_of_all_modules,
    ],
)
def test_code_that_was_patched_since_the_self_check_is_noticed(monkeypatch, change):
    model = enable_prefix_grouper(tiny.model())
    packed(model)
    change(model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"has changed since it was checked.* depends on tokens of other"):
        packed(model)
    monkeypatch.undo()
    packed(model)


def test_an_attention_function_that_is_registered_anew_is_compared_with(monkeypatch):
    """Packed rows are computed by ours, and single rows by the one that the model asks for."""
    model = enable_prefix_grouper(tiny.model())
    packed(model)
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def louder(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, query * 1.5, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", louder)
    with pytest.raises(UnsupportedModelError, match=r"has changed since it was checked"):
        packed(model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LilyConfig(r=4, target_modules=["q_proj"]), "mixes its experts by a mean over all tokens"),
        (LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "aLoRA"),
    ],
)
def test_an_adapter_that_came_afterwards_and_cannot_be_shared_is_refused(config, reason):
    model = enable_prefix_grouper(tiny.model())
    adapted = get_peft_model(model, config)
    with pytest.raises(UnsupportedModelError, match=reason):
        packed(adapted)


def test_scoring_refuses_a_prompt_that_is_learned_since():
    """PEFT puts it in front of the call, before the model sees it."""
    model = get_peft_model(
        enable_prefix_grouper(tiny.model()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    ids = torch.full((2, 5), 4)
    with pytest.raises(UnsupportedModelError, match=r"adapter 'default' learns a prompt \(PROMPT_TUNING\)"):
        prefix_grouped_logps(model, ids, torch.ones_like(ids), ids, torch.ones_like(ids))


def test_what_is_right_is_checked_once_and_then_shared(monkeypatch):
    model = enable_prefix_grouper(tiny.model())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    calls: list[int] = []
    adapted.base_model.model.model.register_forward_hook(lambda *_: calls.append(1))
    found = packed(adapted)
    assert len(calls) > 1, "it was not checked again"
    calls.clear()
    torch.testing.assert_close(packed(adapted), found, rtol=0, atol=0)
    assert len(calls) == 1, "it is checked once only"
    alone = [adapted(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS]
    for mine, own in zip(LAYOUT.unpack(found), alone, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["half", "autocast"])
def test_other_kernels_than_were_checked_are_checked_too(change):
    """Here a layer that mixes tokens in half precision alone, as a kernel for it might."""
    model = enable_prefix_grouper(tiny.model())
    mlp = model.model.layers[1].mlp.down_proj
    mlp.register_forward_hook(lambda _, args, out: leak(mlp, args, out) if out.dtype == torch.bfloat16 else out)
    packed(model)
    context = torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast")
    if change == "half":
        model.to(torch.bfloat16)
    with context, pytest.raises(UnsupportedModelError, match="depends on tokens of other rows"):
        packed(model)


def test_scoring_and_ordinary_forwards_change_nothing():
    model = enable_prefix_grouper(tiny.model("mamba2", num_heads=4, head_dim=16, n_groups=2, state_size=8, expand=2))
    before = fingerprint(model)
    prompts, completions = torch.full((2, 5), 4), torch.full((2, 3), 5)
    prefix_grouped_logps(model, prompts, torch.ones_like(prompts), completions, torch.ones_like(completions))
    model.train()
    model(input_ids=ROWS[0][None])
    assert fingerprint(model) == before


def test_gradient_checkpointing_that_is_switched_on_again_and_again_changes_nothing():
    """TRL does so after each generation, and transformers adds a hook each time: the model was checked in every step."""
    model = tiny.model("llama")
    before = fingerprint(model)
    for _ in range(2):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        assert fingerprint(model) == before
        model.gradient_checkpointing_disable()


def test_without_the_self_check_an_unsupported_change_is_refused_all_the_same():
    model = enable_prefix_grouper(tiny.model(), self_check=False)
    adapted = get_peft_model(model, LilyConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="has changed since it was checked"):
        packed(adapted)
