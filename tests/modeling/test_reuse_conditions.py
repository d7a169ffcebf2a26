"""What keeps prompts from being forwarded apart: code around the decoder, which they do not run through, and hooks on gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.modeling.reuse_conditions import why_not_reuse
from tests import tiny
from tests.modeling import families


class Scales(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        return super().forward(inputs_embeds=self.get_input_embeddings()(input_ids) * 1.7, **kwargs)


class AddsAMethod(LlamaForCausalLM):
    def name(self):
        return "mine"


def llama(cls=LlamaForCausalLM):
    return enable_prefix_grouper(cls(tiny.model("llama").config))


def adapted():
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))


def hook(*arguments):
    return None


def wrapped(forward):
    """As a decorator of the user's own, under the name of what it wraps."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("build", [llama, adapted, functools.partial(llama, AddsAMethod)])
def test_models_of_transformers_and_peft_and_their_own_hooks_do_not(build):
    model = build()
    assert why_not_reuse(model) is None
    model.enable_input_require_grads()  # a hook on the embeddings
    assert why_not_reuse(model) is None
    with torch.no_grad():
        assert why_not_reuse(nn.parallel.DataParallel(model) if torch.cuda.is_available() else model) is None


def test_a_forward_around_the_decoder_that_is_the_users_own():
    assert "the forward of Scales is not one of transformers or PEFT" in why_not_reuse(llama(Scales))
    model = llama()
    model.forward = wrapped(model.forward)
    assert "the forward of LlamaForCausalLM" in why_not_reuse(model)


@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("build", [llama, adapted])
def test_a_hook_around_the_decoder(build, register):
    model = build()
    handle = getattr(model, register)(hook)
    assert f"a hook on {type(model).__name__} (hook) would not see prompts" in why_not_reuse(model)
    handle.remove()
    assert why_not_reuse(model) is None


def test_a_backward_hook_within_the_decoder_where_there_are_gradients():
    model = llama()
    model.model.layers[-1].register_full_backward_hook(hook)
    assert "a backward hook on LlamaDecoderLayer (hook)" in why_not_reuse(model)
    with torch.no_grad():
        assert why_not_reuse(model) is None


def test_a_forward_hook_within_the_decoder_sees_prompts_too():
    model = llama()
    model.model.layers[0].register_forward_hook(hook)
    assert why_not_reuse(model) is None


@pytest.mark.parametrize("model_type", ["diffllama", "dory", "hrm_text"])
def test_attention_that_runs_twice_in_one_forward(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {model_type}")
    model = enable_prefix_grouper(families.build(model_type), self_check=False)
    assert why_not_reuse(model) == f"attention layers of {model_type} run twice in one forward"
