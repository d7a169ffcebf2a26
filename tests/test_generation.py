"""Each distinct prompt is prefilled once, and generation samples the tokens that it samples otherwise."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig

from prefix_grouper_plugins.generation import shared_prefill
from tests.modeling import families, multimodal_families

# Full attention, windows, learned positions, latent attention, sinks, scans and short convolutions beside attention.
SHARED = ["qwen3", "mistral", "gemma3_text", "gpt2", "opt", "deepseek_v3", "gpt_oss", "qwen3_5_text", "bamba", "lfm2"]
ROW_BY_ROW = {
    "recurrent_gemma": "RecurrentGemmaForCausalLM keeps states in its layers instead of in its cache",
    "rwkv": "the forward makes its cache itself",
}
if Version(transformers.__version__) >= Version("5.24"):  # caches of recurrent layers alone are like the others
    SHARED += ["mamba", "mamba2"]
else:
    ROW_BY_ROW["mamba2"] = "`cache_params` is an input of the forward that is not known here"


def prompts():
    """Two prompts of other lengths, four rows each, not in order; a third one occurs once."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 24, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = ids[1, :5] = 0
    rows = torch.tensor([0, 1, 1, 0, 2, 0, 1, 0, 1])
    return {"input_ids": ids[rows], "attention_mask": mask[rows]}


def generate(model, inputs, **settings):
    torch.manual_seed(3)
    config = GenerationConfig(**{"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, **settings})
    config.eos_token_id = None
    return model.generate(**inputs, generation_config=config)


def compare(model, inputs, **settings):
    """Generate both ways; what was reported, and how many rows the model was given in each forward."""
    expected = generate(model, inputs, **settings)
    reported, rows = [], []
    with shared_prefill(model, reported.append):
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        found = generate(model, inputs, **settings)
        hook.remove()
    assert torch.equal(found, expected)
    assert torch.equal(generate(model, inputs, **settings), expected), "the context leaves the model as it was"
    return reported, rows


@pytest.mark.parametrize("model_type", SHARED)
def test_the_same_tokens_are_sampled_after_a_prefill_of_the_distinct_prompts(model_type):
    model = families.build(model_type).double().eval()
    (prefill,), rows = compare(model, prompts())
    assert prefill.reason is None
    assert rows == [3, *[9] * 7]
    assert (prefill.counts.tokens_forwarded, prefill.counts.row_tokens) == (14 + 9 + 14, 5 * 14 + 4 * 9)
    assert (prefill.counts.rows, prefill.counts.groups) == (9, 3)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"num_return_sequences": 2}, {"prefill_chunk_size": 5}], ids=str
)
def test_they_are_under_other_settings_of_generation(settings):
    (prefill,), rows = compare(families.build("qwen3").double().eval(), prompts(), **settings)
    assert prefill.reason is None
    assert rows[0] == 3


@pytest.mark.parametrize("model_type", ROW_BY_ROW)
def test_states_outside_of_a_cache_that_can_be_repeated_are_prefilled_row_by_row(model_type):
    (prefill,), rows = compare(families.build(model_type).double().eval(), prompts())
    assert prefill.reason == ROW_BY_ROW[model_type]
    assert rows[0] == 9
    assert prefill.counts.tokens_forwarded == prefill.counts.row_tokens


def test_so_are_static_caches_and_models_that_see_images():
    (prefill,), _ = compare(families.build("qwen3").double().eval(), prompts(), cache_implementation="static")
    assert prefill.reason == "a cache of StaticLayer cannot be repeated"
    (prefill,), _ = compare(multimodal_families.build("qwen2_5_vl"), prompts())
    assert prefill.reason == "a vision-language model keeps positions outside of its cache"


def test_padding_tells_prompts_apart_that_begin_with_the_padding_token():
    inputs = prompts()
    inputs["input_ids"][0, :5] = inputs["input_ids"][1, :5]
    inputs["input_ids"][0, 5:] = inputs["input_ids"][1, 5:]
    (prefill,), _ = compare(families.build("qwen3").double().eval(), inputs)
    assert prefill.counts.groups == 4


def test_distinct_prompts_and_forwards_that_are_no_prefill_run_as_they_are():
    model = families.build("qwen3").double().eval()
    inputs = {name: value[[0, 1, 4]] for name, value in prompts().items()}
    (prefill,), rows = compare(model, inputs)
    assert (prefill.reason, prefill.counts.token_ratio, rows[0]) == (None, 1.0, 3)
    with shared_prefill(model, pytest.fail):
        model(**prompts(), use_cache=False)
        model(input_ids=prompts()["input_ids"][:1])


def test_a_model_that_does_not_return_its_cache_is_an_error():
    model = families.build("qwen3").double().eval()

    def lose(module, args, output):
        output["cache" if "cache" in output else "past_key_values"] = None

    model.register_forward_hook(lose)
    with (
        pytest.raises(RuntimeError, match=r"was given a cache and does not return it.*prefix_grouper_generation=false"),
        shared_prefill(model),
    ):
        generate(model, prompts())
