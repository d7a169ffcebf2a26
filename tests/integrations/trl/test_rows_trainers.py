"""Trainers whose rows stay where TRL puts them learn the stock trainer's weights, and log the stock trainer's metrics."""

from __future__ import annotations

import copy
import importlib
import logging
import random
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.trainer import dpo_trainer

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations import trl as ours
from prefix_grouper_plugins.integrations.trl import rows_trainer
from prefix_grouper_plugins.integrations.trl.algorithms import modules_of
from tests import tiny
from tests.integrations.trl import vision
from tests.integrations.trl.training import TRL, largest_difference, skip_before, use_float64_head
from tests.modeling import multimodal_families

STEPS = 2


def words(source: random.Random, shortest: int, longest: int) -> str:
    return " ".join(source.choices(tiny.WORDS[3:], k=source.randint(shortest, longest)))


def pairs(*, alike: int = 0, reference: bool = False) -> Dataset:
    """``alike``: words with which the rejected completion begins as the chosen one does."""
    source, rows = random.Random(0), []
    for _ in range(24):
        chosen, rejected = words(source, 3, 9).split(), words(source, 3, 9).split()
        rejected[:alike] = chosen[:alike]
        row = {"prompt": words(source, 12, 20) + " ", "chosen": " ".join(chosen), "rejected": " ".join(rejected)}
        rows.append(row | ({"reference": words(source, 3, 9)} if reference else {}))
    return Dataset.from_list(rows)


def rated(completions: int = 4) -> Dataset:
    """Several rated completions of each prompt, one after the other."""
    source, rows = random.Random(0), []
    for _ in range(6):
        prompt = words(source, 12, 20) + " "
        rows += [{"prompt": prompt, "completion": words(source, 3, 9), "label": i % 2 == 0} for i in range(completions)]
    return Dataset.from_list(rows)


def prompts() -> Dataset:
    source = random.Random(0)
    return Dataset.from_list([{"prompt": words(source, 12, 20) + " "} for _ in range(24)])


def privileged() -> Dataset:
    return prompts().map(lambda row: {"privileged_context": "w1 w2"})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [(sum(map(ord, completion)) * 7919 % 13) / 10 for completion in completions]


# Data, arguments of the config, and what the trainer is built from.
SAMPLED = {"num_generations": 4, "max_completion_length": 6}
ONLINE = {"max_new_tokens": 6, "max_length": 64, "missing_eos_penalty": None}
SETUPS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "DPO": (pairs, {}, {}),
    "KTO": (rated, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}, {}),
    "Reward": (pairs, {}, {"head": AutoModelForSequenceClassification}),
    "ORPO": (pairs, {}, {}),
    "CPO": (pairs, {"loss_type": "simpo", "cpo_alpha": 0.5}, {}),
    "TPO": (lambda: pairs(reference=True), {}, {}),
    "OnlineDPO": (prompts, ONLINE, {"reward_funcs": reward}),
    "SDPO": (privileged, SAMPLED, {"reward_funcs": reward}),
    "SDFT": (privileged, {**SAMPLED, "distillation_topk": 8}, {}),
}
# Tokens forwarded over tokens of the rows; data without a reward of sharing would compare nothing.
AT_MOST = {"DPO": 0.7, "KTO": 0.5, "SDPO": 0.5, "SDFT": 0.5, "TPO": 0.55}


# Means and sums that the stock trainer takes over padding, too, where logits mean nothing.
OVER_PADDING = {
    "ORPO": ("logits/chosen", "logits/rejected"),
    "CPO": ("logits/chosen", "logits/rejected"),
    "OnlineDPO": ("objective/entropy", "objective/kl", "objective/non_score_reward", "objective/rlhf_reward"),
}
if Version("1.9.2") > TRL:
    OVER_PADDING["KTO"] = ("logits/chosen", "logits/rejected")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    use_float64_head(monkeypatch)
    load_reference = dpo_trainer.create_model_from_path  # TRL 0.29 does so also where log-probs are computed before

    def load_in_float64(*args: Any, **kwargs: Any) -> Any:
        model = load_reference(*args, **kwargs).double()
        tiny.compute_norms_in_input_dtype(model)
        return model

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", load_in_float64)
    # TRL keeps reference log-probs in files, where the second trainer would find those of the first.
    monkeypatch.setattr(Dataset, "_get_cache_file_path", lambda *_: f"{tempfile.mkdtemp()}/reference.arrow")


def load(path: str, head: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(3)
    model = head.from_pretrained(
        path,
        dtype=torch.float64,
        attn_implementation="sdpa",
        **({} if head is AutoModelForCausalLM else {"num_labels": 1}),
    )
    tiny.compute_norms_in_input_dtype(model)
    return model


def classes(algorithm: str, shared: bool) -> tuple[Any, Any]:
    """The trainer and its config."""
    if algorithm in ("TPO", "SDPO", "SDFT"):
        skip_before("1.9.2", f"has no {algorithm}Trainer")
    if shared:
        return tuple(getattr(ours, f"PrefixGrouper{algorithm}{kind}") for kind in ("Trainer", "Config"))  # type: ignore[return-value]
    found = []
    for kind in ("Trainer", "Config"):
        home = importlib.import_module(modules_of(algorithm, kind)[0])
        found.append(getattr(home, f"{algorithm}{kind}"))
    return tuple(found)  # type: ignore[return-value]


def build(algorithm: str, path: str, *, shared: bool, data: Any = None, lora: bool = False, **settings: Any) -> Any:
    make_data, defaults, built_from = SETUPS[algorithm]
    trainer_class, config_class = classes(algorithm, shared)
    if not shared:
        settings = {k: v for k, v in settings.items() if "prefix_grouper" not in k}
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
        **defaults,
        **settings,
    }
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    built_from = {"processing_class": tiny.tokenizer(), **built_from}
    built_from |= {name: arguments.pop(name) for name in ("ref_model", "processing_class") if name in arguments}
    model = arguments.pop("model", None)
    torch.manual_seed(0)
    return trainer_class(
        model=load(path, built_from.pop("head", AutoModelForCausalLM)) if model is None else model,
        args=config_class(**arguments),
        train_dataset=make_data() if data is None else data,
        **({"peft_config": adapter} if lora else {}),
        **built_from,
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def train(algorithm: str, path: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Trained weights by name, and the trainer."""
    trainer = build(algorithm, path, **options)
    for name in ("model", "ref_model", "teacher_model"):
        if (model := getattr(trainer, name, None)) is not None:
            model.to(torch.float64)
            tiny.compute_norms_in_input_dtype(model)
    initial = weights(trainer)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    trainer.train()
    assert largest_difference(weights(trainer), initial) > 1e-4, "nothing was trained"
    return weights(trainer), trainer


def metrics(trainer: Any) -> list[dict[str, float]]:
    """All that was logged of each step but times and counts of our own."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [
        {k: v for k, v in step.items() if isinstance(v, float) and "time" not in k and "prefix_grouper" not in k}
        for step in steps
    ]


def compare(algorithm: str, path: str, *, at_most: float | None = None, **options: Any) -> Any:
    """Train both ways; the shared trainer."""
    stock, stock_trainer = train(algorithm, path, shared=False, **options)
    shared, trainer = train(algorithm, path, shared=True, **options)
    assert largest_difference(stock, shared) <= 1e-12
    assert len(metrics(trainer)) == STEPS
    for wanted, got in zip(metrics(stock_trainer), metrics(trainer), strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if name not in OVER_PADDING.get(algorithm, ()):
                assert got[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.passes["update"].token_ratio <= (at_most or AT_MOST.get(algorithm, 0.7))
    return trainer


@pytest.mark.parametrize("algorithm", SETUPS)
def test_training_gives_the_stock_weights_and_metrics(algorithm, path):
    trainer = compare(algorithm, path)
    ratios = [entry["prefix_grouper/token_ratio"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ratios) == STEPS
    assert all(ratio < 0.8 for ratio in ratios)
    samples = {"OnlineDPO": 1 / 2, "SDPO": 1 / 4, "SDFT": 1 / 4}  # of the tokens of repeated prompts, one is prefilled
    prefilled = [entry.get("prefix_grouper/generation_token_ratio") for entry in trainer.state.log_history]
    assert {ratio for ratio in prefilled if ratio} == ({samples[algorithm]} if algorithm in samples else set())
    assert not trainer.generation.fallbacks


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, whose reference is the model without it": ("DPO", {"lora": True}),
    "two losses and checkpointing": (
        "DPO",
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.3], "gradient_checkpointing": True},
    ),
    "WPO, and a part of the completions alike": ("DPO", {"use_weighting": True, "ld_alpha": 0.5, "alike": 2}),
    "references computed before": ("DPO", {"precompute_ref_log_probs": True}),
    "prompts cut at their beginning": ("DPO", {"max_length": 18, "truncation_mode": "keep_end"}),
}


def seen_pairs() -> Dataset:
    """Prompts with one or two images, and two answers to each."""
    source = random.Random(0)

    def answer() -> list[dict[str, str]]:
        return [{"role": "assistant", "content": " " + " ".join(source.choices(vision.WORDS[12:], k=4))}]

    return Dataset.from_list([{**row, "chosen": answer(), "rejected": answer()} for row in vision.prompts(8)])


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_pairs_with_images_give_the_stock_weights(model_type):
    if not hasattr(dpo_trainer, "DataCollatorForVisionPreference"):
        pytest.skip(f"TRL {TRL} has no preference data with images")

    def trained(shared: bool) -> tuple[dict[str, torch.Tensor], Any]:
        model, reference = (multimodal_families.build(model_type) for _ in range(2))
        for one in (model, reference):
            tiny.compute_norms_in_input_dtype(one)
        trainer = build(
            "DPO",
            "",
            shared=shared,
            data=seen_pairs(),
            model=model,
            ref_model=reference,
            processing_class=vision.processor(model_type),
            max_length=None,
            gradient_accumulation_steps=1,
            optim="sgd",  # Adam divides gradients of 1e-17 by their own size: weights then differ by 1e-12
            learning_rate=0.1,
        )
        initial = weights(trainer)
        trainer.train()
        assert largest_difference(weights(trainer), initial) > 1e-4, "nothing was trained"
        return weights(trainer), trainer

    (stock, _), (got, trainer) = trained(False), trained(True)
    assert largest_difference(stock, got) <= 1e-12
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.passes["update"].token_ratio <= 0.7


def test_rewards_with_margins_give_the_stock_weights(path):
    """TRL hands the margins of the loss to the model, too."""
    data = pairs().map(lambda row, i: {"margin": i % 3 * 0.5}, with_indices=True)
    compare("Reward", path, data=data)


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
MORE_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "reentrant checkpointing with LoRA": (
        "DPO",
        {"lora": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "hinge": ("DPO", {"loss_type": "hinge"}),
    "completions cut at their end": ("DPO", {"max_length": 18}),
    "KTO with LoRA": ("KTO", {"lora": True}),
    "KTO, references computed before": ("KTO", {"precompute_ref_log_probs": True}),
    "KTO without a KL term": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "rewards centred": ("Reward", {"center_rewards_coefficient": 0.01, "lora": True}),
    "rewards under checkpointing": ("Reward", {"gradient_checkpointing": True}),
    "CPO": ("CPO", {"loss_type": "sigmoid"}),
    "ORPO with LoRA under checkpointing": ("ORPO", {"lora": True, "gradient_checkpointing": True}),
    "TPO without references": ("TPO", {"tpo_alpha": 0.0}),
    "OnlineDPO with LoRA": ("OnlineDPO", {"lora": True}),
    "SDFT with LoRA": ("SDFT", {"lora": True}),
    "KTO with weights": ("KTO", {"desirable_weight": 1.5, "undesirable_weight": 0.7, "pad_to_multiple_of": 8}),
    "KTO, a reference that follows": ("KTO", FOLLOWS),
    "DPO, a reference that follows": ("DPO", FOLLOWS),
    "robust": ("DPO", {"loss_type": "robust", "label_smoothing": 0.1}),
    "discopop": ("DPO", {"loss_type": "discopop", "pad_to_multiple_of": 16}),
    "references computed in small batches": (
        "DPO",
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2, "lora": True},
    ),
    "CPO, smoothed": ("CPO", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "CPO, hinge, cut": ("CPO", {"loss_type": "hinge", "max_length": 20}),
    "AlphaPO": ("CPO", {"loss_type": "alphapo", "cpo_alpha": 0.0}),
    "TPO, smoothed": ("TPO", {"label_smoothing": 0.1, **REENTRANT}),
    "TPO, IPO": ("TPO", {"loss_type": "ipo"}),
    "rewards centred, reentrant": ("Reward", {"center_rewards_coefficient": 0.01, **REENTRANT}),
    "ORPO, reentrant": ("ORPO", REENTRANT),
    "SDFT, reentrant": ("SDFT", REENTRANT),
    "SDPO with LoRA under checkpointing": ("SDPO", {"lora": True, "gradient_checkpointing": True}),
    "OnlineDPO, IPO under checkpointing": ("OnlineDPO", {"loss_type": "ipo", "gradient_checkpointing": True}),
}


def compare_settings(algorithm: str, path: str, settings: dict[str, Any]) -> Any:
    alike = settings.get("alike", 0)
    settings = {name: value for name, value in settings.items() if name != "alike"}
    return compare(algorithm, path, data=pairs(alike=alike) if alike else None, at_most=0.97, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_give_the_stock_weights_and_metrics(name, path):
    trainer = compare_settings(SETTINGS[name][0], path, SETTINGS[name][1])
    assert trainer.sharing.passes["ref_log_prob"].packed > 0, "the reference model shares, too"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE_SETTINGS)
def test_the_other_settings_of_the_other_trainers(name, path):
    compare_settings(MORE_SETTINGS[name][0], path, MORE_SETTINGS[name][1])


# ---------------------------------------------------------------------------------------------------- what is said


def test_the_start_says_what_will_be_shared_and_that_no_row_is_moved(path, caplog):
    with caplog.at_level(logging.INFO, "prefix_grouper_plugins"):
        settings = {"train_sampling_strategy": "random", "loss_type": "apo_zero_unpaired"}
        _, trainer = train("KTO", path, shared=True, data=rated(2), **settings)
    (line,) = [entry["prefix_grouper"] for entry in trainer.state.log_history if "prefix_grouper" in entry]
    assert line in caplog.text
    assert line.startswith("prefix grouper is on for Qwen3Model (1 layer: merged_lse) and Qwen3Model")
    assert "completions of one prompt" in line
    assert "8 examples in TRL's order (train_sampling_strategy='random'), no row is moved to another one" in line


def test_rows_that_never_begin_alike_are_reported_once(path, caplog):
    data = [{"prompt": f"w{i}", "chosen": f" w{i + 1} w1 w2", "rejected": f" w{i + 2} w1 w2"} for i in range(10)]
    _, trainer = train("DPO", path, shared=True, data=Dataset.from_list(data), max_steps=2)
    assert (trainer.sharing.packed, dict(trainer.sharing.fallbacks)) == (0, {})
    assert caplog.text.count("no two rows of a micro-batch began alike in the first update") == 1


def test_off_is_the_stock_trainer(path):
    stock, _ = train("DPO", path, shared=False)
    off, trainer = train("DPO", path, shared=True, use_prefix_grouper=False)
    assert largest_difference(stock, off) == 0
    assert trainer.sharing.row_tokens == 0
    assert not any("prefix_grouper" in name for entry in trainer.state.log_history for name in entry)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "noise on embeddings": ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5\.0"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel replaces layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_shared_are_named(name, monkeypatch, path):
    for module in ("transformers.training_args", "trl.trainer.dpo_trainer"):
        monkeypatch.setattr(f"{module}.is_liger_kernel_available", lambda: True, raising=False)
    monkeypatch.setattr(dpo_trainer, "LigerFusedLinearDPOLoss", lambda **_: None, raising=False)
    settings, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"{reason}.* prefix_grouper_on_unsupported='fallback'"):
        build("DPO", path, shared=True, **settings)


def test_a_refused_model_trains_as_ever_where_that_is_asked_for(path, caplog):
    settings = {"prefix_grouper_on_unsupported": "fallback", "neftune_noise_alpha": 5.0}
    stock, _ = train("DPO", path, shared=False, neftune_noise_alpha=5.0)
    shared, trainer = train("DPO", path, shared=True, **settings)
    assert largest_difference(stock, shared) == 0
    ((reason, times),) = trainer.sharing.fallbacks.items()
    assert "neftune_noise_alpha" in reason
    assert times == 4 * STEPS  # policy and reference, two micro-batches a step
    assert caplog.text.count("this forward runs without sharing: neftune_noise_alpha") == 1
    assert [e["prefix_grouper/fallbacks"] for e in trainer.state.log_history if "loss" in e] == [1.0] * STEPS


def test_several_trainers_of_one_model_train_in_turns_and_count_for_themselves(path):
    weights_of = []
    for shared in (False, True):
        first = build("KTO", path, shared=shared, max_steps=1)
        for model in (first.model, first.ref_model):
            model.double()
            tiny.compute_norms_in_input_dtype(model)
        second = type(first)(
            model=first.model,
            ref_model=first.ref_model,
            args=copy.deepcopy(first.args),
            train_dataset=rated(),
            processing_class=tiny.tokenizer(),
        )
        for trainer in (first, second, first):
            torch.manual_seed(5)
            trainer.train()
        weights_of.append(weights(first))
    assert largest_difference(*weights_of) <= 1e-12
    packed = [trainer.sharing.passes["update"].packed for trainer in (first, second)]
    assert packed[0] == 2 * packed[1] > 0
    assert not first.sharing.fallbacks and not second.sharing.fallbacks


def test_a_learned_prompt_is_refused(path):
    trainer_class, config_class = classes("DPO", True)
    with pytest.raises(UnsupportedModelError, match="learns a prompt"):
        trainer_class(
            model=load(path),
            args=config_class(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=pairs(),
            processing_class=tiny.tokenizer(),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )


def test_evaluation_scores_as_the_stock_trainer_does(path):
    found = []
    for shared in (False, True):
        trainer = build("Reward", path, shared=shared, per_device_eval_batch_size=8)
        trainer.model.double()
        found.append(trainer.evaluate(trainer.train_dataset))
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], abs=1e-9)
    assert trainer.state.log_history[-1]["eval_prefix_grouper/token_ratio"] < 0.7


def test_the_mixin_stands_in_front_or_says_so():
    (trainer_class, _) = classes("DPO", False)
    with pytest.raises(ValueError, match=r"write class Mine\(ShareRowsMixin, DPOTrainer\)"):
        type("Mine", (trainer_class, rows_trainer.ShareRowsMixin), {})


def test_a_loss_that_forwards_another_model_is_noticed(path, caplog):
    trainer_class, _ = classes("DPO", True)

    class Other(trainer_class):  # type: ignore[misc, valid-type]
        def compute_loss(self, model, inputs, *args, **kwargs):
            return sum(parameter.square().sum() for parameter in model.parameters())

    trainer = build("DPO", path, shared=True)
    trainer.__class__ = Other
    trainer.train()
    assert caplog.text.count("the decoder was not called in the first update") == 1


def test_a_reference_that_is_replaced_after_the_trainer_was_built_is_told(path, caplog):
    trainer = build("DPO", path, shared=True, max_steps=1)
    trainer.train()
    assert "after it was built" not in caplog.text
    trainer.ref_model = copy.deepcopy(trainer.ref_model)
    trainer.train()
    assert (
        "Qwen3ForCausalLM has become a model of this trainer after it was built, so its forwards are not shared"
        in caplog.text
    )


def test_an_option_that_this_trainer_does_not_have_is_named(monkeypatch, caplog):
    monkeypatch.setenv("PREFIX_GROUPER_REGROUP", "group")
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    config = classes("DPO", True)[1](output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False)
    assert config.prefix_grouper_backend == "blockwise"
    assert "prefix_grouper_regroup has no effect on DPO" in caplog.text
