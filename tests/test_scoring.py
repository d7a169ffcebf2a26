"""prefix_grouped_logps: the log-probabilities, entropies and gradients of forwards row by row, without their cost."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModel

from prefix_grouper_plugins import (
    UnsupportedModelError,
    enable_prefix_grouper,
    prefix_grouped_logps,
    scoring,
)
from prefix_grouper_plugins.batch import GroupedBatch
from tests import tiny
from tests.modeling import families
from tests.scoring import TOLERANCE, ComputeInFloat64, assert_close, batch_of, groups, values_and_gradients

# Unequal prompts, unequal completions, an empty one, and a prompt without siblings.
ROWS = groups({9: [4, 7, 1, 0], 3: [6, 2], 5: [3], 1: [2, 2]})
BATCH = batch_of(ROWS)


def row_by_row(model, batch, temperature: float = 1.0):
    """The reference: one forward for each row, without padding. A padded one would be wrong for learned positions."""
    prompt_ids, prompt_mask, completion_ids, completion_mask = batch
    blank = torch.zeros(completion_ids.shape, dtype=torch.float64)
    logps, entropies = [], []
    for i, row in enumerate(blank):
        prompt, completion = prompt_ids[i, prompt_mask[i] == 1], completion_ids[i, completion_mask[i] == 1]
        if not len(completion):
            logps.append(row), entropies.append(row)
            continue
        ids = torch.cat([prompt, completion])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        distribution = logits.log_softmax(-1)
        rest = (0, len(row) - len(completion))
        logps.append(nn.functional.pad(distribution.gather(-1, completion[:, None])[:, 0], rest))
        entropies.append(nn.functional.pad(-(distribution.exp() * distribution).sum(-1), rest))
    return torch.stack(logps), torch.stack(entropies)


def grouped(model, batch):
    return prefix_grouped_logps(model, *batch, compute_entropy=True)


def assert_equals_row_by_row(model, batch=BATCH, temperature: float = 1.0, tolerance: float = TOLERANCE):
    with ComputeInFloat64():
        expected = values_and_gradients(model, lambda m, b: row_by_row(m, b, temperature), batch)
        enable_prefix_grouper(model)
        got = values_and_gradients(
            model, lambda m, b: prefix_grouped_logps(m, *b, temperature=temperature, compute_entropy=True), batch
        )
    assert_close(got, expected, tolerance)
    return got


# --- equal to forwards row by row ------------------------------------------------------------------------------------


def test_the_reference_is_what_it_should_be():
    """The batch has what these tests are about, and its prompts share although its rows are shuffled."""
    lengths = BATCH[3].sum(1)
    assert 0 in lengths and 1 in lengths and len(set(lengths.tolist())) > 4
    assert [p for p, _ in ROWS] != sorted([p for p, _ in ROWS], key=len)
    batch = GroupedBatch(*BATCH)
    assert batch.num_groups == 4
    assert batch.layout.num_tokens == (8 + 12) + (2 + 8) + (4 + 3) + (0 + 4)


CHANGES: dict[str, Any] = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen3": {"tie_word_embeddings": True},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "hyperclovax": {"logits_scaling": 0.25},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "xlstm": {"output_logit_soft_cap": 3.0},
}
FAMILIES = """
qwen3 llama gemma2 cohere granite gpt2 opt gpt_oss stablelm nanochat mixtral olmo3
bert electra falcon_h1 hyperclovax llama4_text modernbert-decoder recurrent_gemma roberta xlstm
"""


@pytest.mark.parametrize("model_type", FAMILIES.split())
def test_logps_entropies_and_gradients_equal_those_of_single_rows(model_type):
    if model_type == "hyperclovax" and model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no HyperCLOVA X")
    model = families.build(model_type)
    for name, value in CHANGES.get(model_type, {}).items():
        assert hasattr(model.config, name), name
        setattr(model.config, name, value)
        for module in (model, model.base_model):  # cohere and others read it once
            if hasattr(module, name):
                setattr(module, name, value)
    if model.config.tie_word_embeddings:
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # A recurrence multiplies rounding.
    assert_equals_row_by_row(model, tolerance=1e-6 if model_type == "recurrent_gemma" else TOLERANCE)


def test_tied_embeddings_get_the_gradient_of_both_their_uses():
    model = tiny.model("qwen3", tie_word_embeddings=True).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, gradients = assert_equals_row_by_row(model)
    assert "model.embed_tokens.weight" in gradients and "lm_head.weight" not in gradients


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["q_proj", "lm_head"]], ids=str)
def test_lora_gradients_equal_those_of_single_rows(targets):
    torch.manual_seed(0)
    model = get_peft_model(families.build("llama"), LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, 0, 0.3)
    _, gradients = assert_equals_row_by_row(model.double().eval())
    assert gradients and all("lora_" in name for name in gradients)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_temperature_divides_the_logits_after_the_final_softcap(temperature):
    model = families.build("gemma2")
    model.config.final_logit_softcapping = 3.0
    assert_equals_row_by_row(model, temperature=temperature)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = enable_prefix_grouper(families.build("qwen3")).train()
    expected = values_and_gradients(model, grouped, BATCH)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(values_and_gradients(model, grouped, BATCH), expected, 1e-12)


def test_rows_that_sampled_the_same_completion_each_count():
    rows = [([3, 4, 5], [6, 7, 8])] * 3 + [([3, 4, 5], [6, 7, 9])]
    assert_equals_row_by_row(families.build("llama"), batch_of(rows))


def test_the_order_of_rows_does_not_matter():
    model = enable_prefix_grouper(families.build("llama"))
    logps, _ = grouped(model, BATCH)
    order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(3))
    shuffled, _ = grouped(model, tuple(x[order] for x in BATCH))
    # float32 norms of the model: other sums round otherwise
    torch.testing.assert_close(shuffled, logps[order], rtol=1e-5, atol=1e-5)


def test_prompts_with_a_common_system_prompt_share_it(monkeypatch):
    system, one, two = list(range(3, 15)), [15, 16], [17, 18, 19]
    rows = [(system + one, [5, 6]), (system + two, [7]), (system + one, [8, 9, 5]), (system + two, [6, 6])]
    expected_tokens = (12 - 1) + (2 + 2 + 3) + (3 + 1 + 2)
    batches = []

    class Watched(GroupedBatch):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            batches.append(self)

    monkeypatch.setattr(scoring, "GroupedBatch", Watched)
    model = families.build("qwen3")
    assert_equals_row_by_row(model, batch_of(rows))
    (batch,) = batches
    assert batch.layout.num_tokens == expected_tokens
    assert batch.num_groups == 2

    forwarded = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: forwarded.append(args[0]))
    grouped(model, batch_of(rows))  # with a hook that is new, so the model is checked again
    forwarded.clear()
    grouped(model, batch_of(rows))
    hook.remove()
    assert [ids.numel() for ids in forwarded] == [expected_tokens], "the model ran on other tokens, or twice"


# --- the shape of the result -----------------------------------------------------------------------------------------


def test_what_is_masked_is_zero_and_the_shape_is_that_of_the_completions():
    model = enable_prefix_grouper(tiny.model())
    logps, entropy = grouped(model, BATCH)
    assert logps.shape == entropy.shape == BATCH[2].shape
    assert logps.dtype == entropy.dtype == torch.float32
    for values in (logps, entropy):
        assert (values[BATCH[3] == 0] == 0).all()
        assert (values[BATCH[3] == 1] != 0).all()
    assert (logps <= 0).all() and (entropy >= 0).all()


def test_entropy_is_computed_only_when_asked_for():
    model = enable_prefix_grouper(tiny.model())
    logps, entropy = prefix_grouped_logps(model, *BATCH)
    assert entropy is None
    assert torch.equal(logps, grouped(model, BATCH)[0])


def test_a_batch_without_any_completion_gives_zeros():
    model = enable_prefix_grouper(tiny.model())
    empty = (*BATCH[:3], torch.zeros_like(BATCH[3]))
    logps, entropy = grouped(model, empty)
    assert logps.shape == entropy.shape == BATCH[2].shape
    assert not logps.any() and not entropy.any()
    assert prefix_grouped_logps(model, *empty)[1] is None
    logps.sum().backward()  # a rank whose rows are all empty still takes part in the backward pass


def test_a_bfloat16_model_is_scored_in_float32():
    model = enable_prefix_grouper(tiny.model().bfloat16())
    logps, entropy = grouped(model, BATCH)
    assert logps.dtype == entropy.dtype == torch.float32
    reference, _ = row_by_row(tiny.model(), BATCH)
    # Errors of bfloat16 itself, far below what a wrong context costs.
    assert (logps - reference).abs().mean() < 0.05


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_size_of_chunks_does_not_change_the_result(monkeypatch, chunk):
    with ComputeInFloat64():
        model = enable_prefix_grouper(families.build("qwen3"))
        expected = values_and_gradients(model, grouped, BATCH)
        monkeypatch.setattr(scoring, "CHUNK_SIZE", chunk)
        assert_close(values_and_gradients(model, grouped, BATCH), expected, 1e-12)


class LogitsWatch(TorchDispatchMode):
    """Keeps the largest number of vocabulary rows that any operation gave out, in forward and backward."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.vocabulary, self.weight_shape, self.most = vocabulary, (hidden, vocabulary), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # the head's transposed weight, and its gradient, are not logits
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.vocabulary,) and x.shape != self.weight_shape:
                self.most = max(self.most, x.numel() // self.vocabulary)
        return out


def test_logits_of_the_whole_batch_never_exist(monkeypatch):
    chunk, vocabulary = 4, 97
    monkeypatch.setattr(scoring, "CHUNK_SIZE", chunk)
    model = enable_prefix_grouper(tiny.model("qwen3", vocab_size=vocabulary))
    batch = batch_of(groups({9: [4, 7, 1], 3: [6, 2], 5: [20]}, vocabulary=vocabulary))
    with LogitsWatch(vocabulary, model.config.hidden_size) as watch:
        logps, entropy = grouped(model, batch)
        (logps.sum() + entropy.sum()).backward()
    assert watch.most == chunk, f"{watch.most} rows of logits existed at once, of {int(batch[3].sum())} tokens"

    with LogitsWatch(vocabulary, model.config.hidden_size) as watch:  # the watch can see them
        row_by_row(model, batch)
    assert watch.most == 5 + 20


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_enabled_is_refused():
    with pytest.raises(ValueError, match=r"call enable_prefix_grouper\(model\) first"):
        prefix_grouped_logps(tiny.model(), *BATCH)


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}: it must be positive"):
        prefix_grouped_logps(enable_prefix_grouper(tiny.model()), *BATCH, temperature=temperature)


def test_a_model_without_a_head_is_refused():
    model = enable_prefix_grouper(AutoModel.from_config(tiny.model().config))
    with pytest.raises(ValueError, match="Qwen3Model has no language-model head"):
        prefix_grouped_logps(model, *BATCH)


@pytest.mark.parametrize(
    ("name", "value"), [("final_logit_softcapping", 0.5), ("logit_scale", 0.5), ("logits_scaling", 8.0)]
)
def test_a_head_that_is_not_understood_is_refused(name, value):
    """A config names something that the model does not do, or does otherwise."""
    model = enable_prefix_grouper(tiny.model())
    setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match="computes its logits from the hidden states in a way that is not"):
        prefix_grouped_logps(model, *BATCH)


def _scales_its_config(model, monkeypatch):
    model.config.logit_scale = 0.5


def _has_another_forward(model, monkeypatch):
    own = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: _doubled(own(self, *a, **k)))


def _has_a_hook(model, monkeypatch):
    model.register_forward_hook(lambda module, args, output: _doubled(output))


def _doubled(output):
    output.logits = output.logits * 2
    return output


@pytest.mark.parametrize("change", [_scales_its_config, _has_another_forward, _has_a_hook])
def test_a_head_is_checked_once_and_again_when_what_it_depends_on_has_changed(change, monkeypatch):
    """Each check reads the device, so it is no part of every micro-batch."""
    model = enable_prefix_grouper(tiny.model(), self_check=False)
    monkeypatch.setattr("prefix_grouper_plugins.modeling.self_check.changes.has_changed", lambda base: False)
    compared = []
    own = scoring._Head.__call__
    monkeypatch.setattr(
        scoring._Head, "__call__", lambda head, x: compared.append(torch.is_grad_enabled()) or own(head, x)
    )
    for checks in (1, 0):
        compared.clear()
        prefix_grouped_logps(model, *BATCH)
        assert compared.count(False) == checks  # tokens are scored with gradients
    change(model, monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"its own differ by \d"):
        prefix_grouped_logps(model, *BATCH)


def test_a_scored_model_is_not_kept_alive():
    model = enable_prefix_grouper(tiny.model(), self_check=False)
    prefix_grouped_logps(model, *BATCH)
    assert model in scoring._CHECKED
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_that_does_more_to_its_logits_is_refused(monkeypatch):
    model = enable_prefix_grouper(tiny.model())
    own = type(model).forward

    def forward(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UnsupportedModelError, match=r"its own differ by \d"):
        prefix_grouped_logps(model, *BATCH)


def test_what_else_runs_on_hidden_states_is_not_the_head(monkeypatch):
    """A value head, say, in front of the language-model head and behind it."""
    model = tiny.model().double()
    enable_prefix_grouper(model)
    expected, _ = prefix_grouped_logps(model, *BATCH)
    model.value_head = nn.Linear(model.config.hidden_size, 1).double()
    for where in (model.model.register_forward_hook, model.lm_head.register_forward_hook):
        handle = where(lambda module, args, output: model.value_head(torch.zeros(1, 1, 32).double()) and None)
        logps, _ = prefix_grouped_logps(model, *BATCH)
        handle.remove()
        assert torch.equal(logps, expected)


def test_a_batch_padded_on_the_wrong_side_is_refused():
    prompt_ids, prompt_mask, completion_ids, completion_mask = BATCH
    with pytest.raises(ValueError, match=r"prompt_mask of row .* has padding other than on the left"):
        prefix_grouped_logps(
            enable_prefix_grouper(tiny.model()), prompt_ids, prompt_mask.flip(1), completion_ids, completion_mask
        )


# --- faults that these tests must be able to see ---------------------------------------------------------------------


def test_a_first_response_token_that_is_lost_or_doubled_would_be_seen(monkeypatch):
    """The branch point is where others lost a loss term; its gradient weighs far more than the tolerance."""
    with ComputeInFloat64():
        model = enable_prefix_grouper(families.build("llama"))
        expected = values_and_gradients(model, grouped, BATCH)

        def lost(m, batch):
            logps, entropy = grouped(m, batch)
            keep = torch.ones_like(logps)
            keep[:, 0] = 0
            return logps * keep, entropy

        wrong = values_and_gradients(model, lost, BATCH)
    with pytest.raises(AssertionError, match="logps is off"):
        assert_close(wrong, expected)
    with pytest.raises(AssertionError, match="the gradient of"):
        assert_close((expected[0], wrong[1]), expected)


def test_a_config_that_asks_for_router_logits_changes_nothing():
    """The model's own router loss would weigh a shared token once; nobody reads it here."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rows = tiny.rows({6: [4, 4]})
    ids, real = torch.stack(rows), torch.ones(2, 10, dtype=torch.long)
    models = [tiny.model("mixtral", output_router_logits=asked, **experts) for asked in (False, True)]
    for model in models:
        model.set_experts_implementation("eager")  # the grouped matrix product of torch 2.8 does not run on a CPU
    scores = [
        prefix_grouped_logps(
            enable_prefix_grouper(model),
            ids[:, :6], real[:, :6], ids[:, 6:], real[:, 6:],
        )[0]
        for model in models
    ]  # fmt: skip
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2)])
def test_ids_of_any_integer_dtype_give_the_same(dtype: torch.dtype, blocks: tuple[int, ...]) -> None:
    model = enable_prefix_grouper(tiny.model())
    narrow = [block.to(dtype) if i in blocks else block for i, block in enumerate(BATCH)]
    assert torch.equal(prefix_grouped_logps(model, *narrow)[0], prefix_grouped_logps(model, *BATCH)[0])


def test_blocks_that_are_no_batch_are_refused_with_the_block_and_the_remedy() -> None:
    model = enable_prefix_grouper(tiny.model())
    ids, mask, completion_ids, completion_mask = BATCH

    def refused(*blocks: Any) -> str:
        with pytest.raises(ValueError, match=r"_(ids|mask) (is|has) ") as error:
            prefix_grouped_logps(model, *blocks)
        return str(error.value)

    nan = completion_mask.float()
    nan[0, 0] = torch.nan
    assert "completion_mask has NaN in it" in refused(ids, mask, completion_ids, nan)
    assert "prompt_ids is on the meta device" in refused(*(block.to("meta") for block in BATCH))
    assert "completion_mask is on the meta device" in refused(ids, mask, completion_ids, completion_mask.to("meta"))
    assert "prompt_ids is of torch.float32" in refused(ids.float(), mask, completion_ids, completion_mask)
    assert "prompt_ids has type list" in refused(ids.tolist(), mask, completion_ids, completion_mask)
    assert "completion_ids has shape (1, " in refused(ids, mask, completion_ids[None], completion_mask)
