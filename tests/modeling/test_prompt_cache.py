"""The parts of a group, run against a prompt that was forwarded once: outputs and gradients are those of single rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pad_sequence

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.recomputation import recomputable_layers
from prefix_grouper_plugins.modeling.reuse_conditions import why_not_reuse
from tests import tiny
from tests.modeling import families

PROMPT = 9
ROWS = tiny.rows({PROMPT: [4, 7, 1, 3, 6]})
WEIGHTS = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)  # of completion tokens, so that no two count alike


def batch_of(rows):
    completions = pad_sequence([row[PROMPT:] for row in rows], batch_first=True)
    prompts = torch.stack([row[:PROMPT] for row in rows])
    return GroupedBatch(prompts, torch.ones_like(prompts), completions, (completions != 0).long())


def loss_of(logits, batch):
    logps = logits[batch.positions].log_softmax(-1).gather(-1, batch.labels[batch.positions][:, None])[:, 0]
    return (logps * WEIGHTS[batch.columns].to(logps.dtype)).sum()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def single_rows(model):
    losses = []
    for row in ROWS:
        logits = model(input_ids=row[None], use_cache=False).logits[0, PROMPT - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, row[PROMPT:, None])[:, 0]
        losses.append((logps * WEIGHTS[: len(logps)].to(logps.dtype)).sum())
        losses[-1].backward()
    return torch.stack(losses).sum().detach(), gradients(model)


def in_parts(model, size, *, recomputes=False):
    """Each part forward and backward before the next one begins."""
    prompt = PrefixLayout.from_rows([ROWS[0][:PROMPT]])
    cache, total = PromptCache(), torch.zeros(())
    recompute = recomputable_layers(Anatomy(model)) if recomputes else ()
    assert bool(recompute) == recomputes
    cache.run(model, prompt, ROWS[0][: PROMPT - 1], recompute=recompute)
    assert cache.is_recomputed == recomputes
    for start in range(0, len(ROWS), size):
        part = batch_of(ROWS[start : start + size]).behind_prompt()
        cache.prepare(part.layout, last=start + size >= len(ROWS))
        loss = loss_of(model(**packed_inputs(part.layout, part.input_ids, part.position_ids)).logits[0], part)
        loss.backward()
        total = total + loss.detach()
        is_last = start + size >= len(ROWS)
        assert cache.is_closed or not is_last
    return total, gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_waits_through_a_whole_backward_for_the_second_half_of_its_gradient(checkpointing):
    """Layer by layer: a part's, and at once the prompt's. Only keys of the prompt's last layer are read."""
    model = tiny.model("qwen3", num_hidden_layers=3).train()
    enable_prefix_grouper(model, self_check=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    passed = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_full_backward_hook(lambda *_, number=number: passed.append(number))
    in_parts(model, len(ROWS))
    assert passed == [2, 1, 1, 0, 0]


def test_under_gradient_checkpointing_nobody_keeps_what_the_prompts_forward_computed(monkeypatch):
    """But the cache, one copy of it, until the backward of the last part has passed the layer."""
    model = tiny.model("qwen3").train()
    enable_prefix_grouper(model, self_check=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    taken, caches = [], []
    take = PromptCache._take

    def noted(cache, module, key, value):
        take(cache, module, key, value)
        if cache._runs:
            caches.append(cache)
            taken.extend(StorageWeakRef(x.untyped_storage()) for x in (key, value))

    monkeypatch.setattr(PromptCache, "_take", noted)
    held = []
    prepare = PromptCache.prepare
    monkeypatch.setattr(PromptCache, "prepare", lambda self, *a, **k: (held.append(alive()), prepare(self, *a, **k))[1])

    def alive():
        return sum(not storage.expired() for storage in taken)

    in_parts(model, 2)
    assert len(taken) == 2 * len(model.model.layers) and held == [len(taken), 0, 0]
    assert all(given._buffer.numel() == 0 for pair in caches[0]._layers.values() for given in pair)


def assert_parts_equal_rows(model, size, tolerance, *, recomputes=False):
    expected, wanted = single_rows(model)
    enable_prefix_grouper(model, self_check=False)
    assert why_not_reuse(model) is None
    got, found = in_parts(model, size, recomputes=recomputes)
    assert abs(got - expected) <= tolerance * abs(expected)
    assert found.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= tolerance * max(float(value.abs().max()), 1e-3 * largest), name


def double(model_type, **changes):
    model = tiny.model(model_type, **changes).double()
    tiny.compute_norms_in_input_dtype(model)
    return model


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("layers", ["kept", "checkpointed", "recomputed"])
@pytest.mark.parametrize(("model_type", "changes"), [("qwen3", {}), ("llama", {}), ("mistral", {"sliding_window": 6})])
def test_gradients_in_float64_equal_those_of_single_rows(model_type, changes, layers, size):
    model = double(model_type, **changes).train()
    if layers == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_parts_equal_rows(model, size, 1e-12, recomputes=layers == "recomputed")


# Rotary angles, norms, routers and scans of these compute in float32: gated delta nets, Mamba-2, short convolutions, softcap, sinks, windows, experts, layers that take the
# keys and values of another one, latent attention, learned positions.
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "model_type",
    "gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss qwen3_moe deepseek_v3 gpt2 "
    "qwen3_next falcon_h1 mamba2 lfm2 olmo_hybrid zamba2".split(),
)
def test_other_kinds_of_layers_equal_single_rows(model_type, recomputes):
    model = families.build(model_type)
    for module in model.modules():  # dropout would draw other masks for single rows
        module.training = recomputes and not isinstance(module, torch.nn.Dropout)
    assert_parts_equal_rows(model, 2, 1e-3, recomputes=recomputes)


def test_a_recurrent_layer_that_is_checkpointed_starts_from_the_prompt_too():
    model = families.build("qwen3_next").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_parts_equal_rows(model, 2, 1e-3)


def test_layers_in_front_of_the_first_adapter_have_nothing_to_send_back():
    model = double("qwen3")
    model.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_()
    model.model.layers[2].self_attn.v_proj.weight.requires_grad_()
    assert_parts_equal_rows(model, 2, 1e-12)


def test_a_checkpointed_prompt_is_run_again_with_the_dropout_mask_of_its_forward():
    """Rows of a group share one mask on their prompt, whose keys the parts have read before its layers run again."""
    found = {}
    for layers, seed in (("kept", 0), ("checkpointed", 0), ("recomputed", 0), ("checkpointed", 1)):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.5)
        torch.manual_seed(3)
        model = get_peft_model(double("llama"), adapter).double().train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero in a new adapter
                torch.nn.init.normal_(weight)
        if layers == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        enable_prefix_grouper(model, self_check=False)
        torch.manual_seed(seed)
        found[layers, seed] = in_parts(model, 2, recomputes=layers == "recomputed")[1]
    kept, *others, other_mask = found.values()
    assert (
        max(largest_difference(kept, other) for other in others) <= 1e-12 < 1e-2 < largest_difference(kept, other_mask)
    )


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_without_gradients_nothing_is_left_open():
    model = enable_prefix_grouper(double("llama"), self_check=False)
    whole = batch_of(ROWS)
    with torch.no_grad():
        expected = model(**packed_inputs(whole.layout, whole.input_ids)).logits[0][whole.positions]
        cache = PromptCache()
        cache.run(model, PrefixLayout.from_rows([ROWS[0][:PROMPT]]), ROWS[0][: PROMPT - 1])
        part = whole.behind_prompt()
        cache.prepare(part.layout, last=False)
        found = model(**packed_inputs(part.layout, part.input_ids)).logits[0][part.positions]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert cache.is_closed


def test_reentrant_checkpointing_is_refused_before_and_found_out_after():
    model = enable_prefix_grouper(double("qwen3"), self_check=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert "use_reentrant=False" in why_not_reuse(model)
    with pytest.raises(RuntimeError, match="lost the graph of its prompt"):
        in_parts(model, 2)


def test_a_recurrent_model_says_why_it_does_not_reuse_its_prompts():
    model = families.build("jamba")
    assert "past the attention interface" in why_not_reuse(model)
    enable_prefix_grouper(model, self_check=False)
    with pytest.raises(UnsupportedModelError, match="cannot start from the state of a prompt: its kind has no state"):
        in_parts(model, 2)


def test_a_part_of_another_prompt_is_refused():
    model = enable_prefix_grouper(double("llama"), self_check=False)
    cache = PromptCache()
    cache.run(model, PrefixLayout.from_rows([ROWS[0][:5]]), ROWS[0][:4])
    with pytest.raises(ValueError, match="8 given tokens and the prompt 4"):
        cache.prepare(batch_of(ROWS[:2]).behind_prompt().layout, last=True)
    part = batch_of(ROWS[:2]).behind_prompt()
    part.layout.cache = PromptCache()
    with pytest.raises(RuntimeError, match=r"did not run in PromptCache\.run"):
        model(**packed_inputs(part.layout, part.input_ids))


def test_a_cache_is_open_until_the_last_part_has_run_backward():
    model = enable_prefix_grouper(double("llama"), self_check=False)
    cache = PromptCache()
    cache.run(model, PrefixLayout.from_rows([ROWS[0][:PROMPT]]), ROWS[0][: PROMPT - 1])
    for last in (False, True):
        part = batch_of(ROWS[:2]).behind_prompt()
        cache.prepare(part.layout, last=last)
        loss = loss_of(model(**packed_inputs(part.layout, part.input_ids)).logits[0], part)
        assert not cache.is_closed
        loss.backward()
        assert cache.is_closed == last


@pytest.mark.parametrize("model_type", ["llama", "mamba2"], ids=["keys", "states"])
@pytest.mark.parametrize("part", [0, 1], ids=["a part", "the last part"])
def test_a_second_backward_through_a_part_is_an_error(model_type, part):
    """The sums of the prompt would hold the part twice, whether the first backward was a look or half of a loss."""
    model = enable_prefix_grouper(families.build(model_type).train(), self_check=False)
    cache = PromptCache()
    cache.run(model, PrefixLayout.from_rows([ROWS[0][:PROMPT]]), ROWS[0][: PROMPT - 1])
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        batch = batch_of(rows).behind_prompt()
        cache.prepare(batch.layout, last=number == 1)
        loss = model(**packed_inputs(batch.layout, batch.input_ids)).logits.square().mean()
        if number == part:
            (loss / 2).backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="a second backward goes through responses that share the forward"):
                (loss / 2).backward()
            return
        loss.backward()
