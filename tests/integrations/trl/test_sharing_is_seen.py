"""Never silently wrong, never silently off: what is logged, what is warned of, what is refused."""

from __future__ import annotations

import inspect
import tempfile

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from trl.trainer import utils as trl_utils

from prefix_grouper_plugins import UnsupportedModelError, enable_prefix_grouper
from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOConfig,
    PrefixGrouperGRPOTrainer,
    PrefixGrouperMixin,
    PrefixGrouperRLOOTrainer,
)
from prefix_grouper_plugins.integrations.trl import trainer as trainer_module
from prefix_grouper_plugins.integrations.trl.forward import ScoringCall
from prefix_grouper_plugins.modeling import is_enabled
from tests import tiny
from tests.integrations.trl.training import (
    largest_difference,
    logged,
    make_trainer,
    reward,
    train,
    trained_weights,
    use_float64_head,
)
from tests.modeling import families

GROUPED = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 8, "max_steps": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def unsupported(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("dropout"), "llama", attention_dropout=0.1)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "prefix_grouper_plugins"]


def test_sharing_stands_in_the_trainers_own_logs(llama):
    _, trainer = train(llama, shared=True, **GROUPED)
    assert logged(trainer, "prefix_grouper/rows_per_group") == [8, 8]
    assert logged(trainer, "prefix_grouper/fallbacks") == [0, 0]
    ratios = logged(trainer, "prefix_grouper/token_ratio")
    assert all(0.1 < ratio < 0.9 for ratio in ratios)


def test_the_token_ratio_is_tokens_forwarded_over_tokens_of_the_rows(llama):
    trainer = make_trainer(llama, shared=True, **GROUPED)
    prompt, completion = torch.full((8, 5), 7), torch.randint(3, 20, (8, 3))
    ids = torch.cat([prompt, completion], dim=1)
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
    assert trainer.sharing.token_ratio == (5 - 1 + 8 * 3) / (8 * (5 + 3))
    assert trainer.sharing.rows_per_group == 8


def test_nothing_changes_when_the_flag_is_off(monkeypatch, llama):
    use_float64_head(monkeypatch)
    stock, _ = train(llama, shared=False, **GROUPED)
    off, trainer = train(llama, shared=True, use_prefix_grouper=False, **GROUPED)
    assert largest_difference(stock, off) == 0
    assert not is_enabled(trainer.model)
    assert not logged(trainer, "prefix_grouper/token_ratio")
    assert not trainer.sharing.fallbacks


def test_a_stock_config_shares_with_default_settings(llama):
    _, trainer = train(llama, shared=True, config_class=GRPOConfig, **GROUPED)
    assert trainer.sharing.rows_per_group == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "loss_type": "bnpo"},
            "nothing is shared in the update",
        ),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "loss_type": "bnpo"},
            "only 4 of 8 rows share a prompt",
        ),
        ({"loss_type": "bnpo"}, "prefix_grouper_regroup='group' moves them anyway"),
        ({"prefix_grouper_regroup": "none"}, "stay scattered over the 2 micro-batches"),
    ],
)
def test_one_line_says_what_keeps_rows_from_sharing_and_what_to_do(caplog, llama, settings, message):
    make_trainer(llama, shared=True, **{**GROUPED, **settings})
    assert len(warnings(caplog)) == 1
    assert message in warnings(caplog)[0]


def test_a_subclass_that_scores_by_itself_is_told_that_nothing_is_shared(caplog, llama):
    class Own(PrefixGrouperGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)

    make_trainer(llama, shared=True, trainer_class=Own, **GROUPED)
    assert "Own overrides _get_per_token_logps_and_entropies" in warnings(caplog)[0]


def test_nothing_is_warned_of_when_all_is_well(caplog, llama):
    train(llama, shared=True, **GROUPED)
    assert warnings(caplog) == []


def test_lora_dropout_is_told_once(caplog, llama):
    trainer = PrefixGrouperGRPOTrainer(
        model=llama,
        reward_funcs=reward,
        args=PrefixGrouperGRPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[]),
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(lora_dropout=0.05),
    )
    assert is_enabled(trainer.model)
    assert [line for line in warnings(caplog) if "share one dropout mask" in line and "lora_dropout" in line]


def test_an_unsupported_model_is_an_error_that_names_reason_and_remedy(unsupported):
    with pytest.raises(
        UnsupportedModelError, match=r"attention dropout is 0\.1.* prefix_grouper_on_unsupported='fallback'"
    ):
        make_trainer(unsupported, shared=True, **GROUPED)


def test_noise_on_embeddings_is_refused_although_the_trainer_adds_it_later(llama):
    with pytest.raises(UnsupportedModelError, match=r"neftune_noise_alpha=5.0 adds noise .*: unset it"):
        make_trainer(llama, shared=True, neftune_noise_alpha=5.0, **GROUPED)


def test_an_unsupported_model_can_fall_back_and_is_counted_with_its_reason(caplog, monkeypatch, unsupported):
    use_float64_head(monkeypatch)
    stock, _ = train(unsupported, shared=False, **GROUPED)
    fallen, trainer = train(unsupported, shared=True, prefix_grouper_on_unsupported="fallback", **GROUPED)
    assert largest_difference(stock, fallen) == 0
    assert logged(trainer, "prefix_grouper/fallbacks") == [1, 1]
    assert len(warnings(caplog)) == 1
    assert "runs without sharing: attention dropout is 0.1" in warnings(caplog)[0]


@pytest.mark.parametrize(("limit", "packed"), [(64, "all"), (19, "some"), (8, "none")])
def test_batches_that_reach_the_limit_of_longrope_go_the_stock_way(caplog, monkeypatch, tmp_path, limit, packed):
    """Padded columns count: the stock path numbers them, and one column too many turns the whole batch."""
    use_float64_head(monkeypatch)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e2,
        "factor": 4.0,
        "original_max_position_embeddings": limit,
        "short_factor": [1.0, 1.3, 1.6, 2.0],
        "long_factor": [2.0, 3.0, 4.0, 6.0],
    }
    path = tiny.saved_model(tmp_path, "llama", rope_parameters=rope)
    settings = {**GROUPED, "max_steps": 4}
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert largest_difference(stock, shared) < 1e-11
    assert (trainer.sharing.packed > 0, sum(trainer.sharing.fallbacks.values()) > 0) == {
        "all": (True, False),
        "some": (True, True),
        "none": (False, True),
    }[packed]
    told = [
        line
        for line in warnings(caplog)
        if f"from {limit} on rope_type 'longrope' changes the angles of the whole batch" in line
    ]
    assert bool(told) == (packed != "all")


def test_modules_are_walked_for_that_limit_once_for_each_model(monkeypatch, llama):
    asked = []
    monkeypatch.setattr(trainer_module, "row_limit", lambda model: asked.append(model))
    trainer = make_trainer(llama, shared=True, **GROUPED)
    ids, other = torch.randint(3, 20, (8, 8)), enable_prefix_grouper(tiny.model(), self_check=False)
    with torch.no_grad():
        for _ in range(3):
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
    call = ScoringCall(other, ids, torch.ones_like(ids), 3, None, False, {})
    assert trainer._why_not_share(call) is None
    assert trainer.sharing.packed == 3 and len(asked) == 2 and asked[0] is trainer.model and asked[1] is other


def test_prompt_learning_adapters_are_refused(llama):
    with pytest.raises(UnsupportedModelError, match="learns a prompt"):
        PrefixGrouperGRPOTrainer(
            model=llama,
            reward_funcs=reward,
            args=PrefixGrouperGRPOConfig(output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=tiny.prompts(),
            processing_class=tiny.tokenizer(),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )


def test_a_micro_batch_without_completions_forwards_one_token_and_counts_no_fallback(llama):
    settings = {
        "prefix_grouper_self_check": False,
        "prefix_grouper_share": "prompt",
    }  # the self-check would be seen, too
    trainer = make_trainer(llama, shared=True, **settings, **GROUPED)
    forwarded = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ids = torch.full((4, 6), 7)
    mask = torch.ones_like(ids)
    mask[:2, 3:] = 0
    logps, entropies = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, 3, batch_size=2, compute_entropy=True
    )[:2]
    assert logps.shape == entropies.shape == (4, 3)
    assert (logps[:2] == 0).all() and (logps[2:] != 0).all() and (entropies[:2] == 0).all()
    assert forwarded == [1, 2 + 2 * 3] and not trainer.sharing.fallbacks and trainer.sharing.packed == 2
    logps[:2].sum().backward()
    gradients = [parameter.grad for parameter in trainer.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients), "every parameter is reached"


class Teacher(GRPOTrainer):
    """Scores its rows with a model of its own, which nobody has enabled."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        scored = inputs["completion_mask"]
        with torch.no_grad():
            theirs = self._get_per_token_logps_and_entropies(self.teacher, ids, mask, scored.shape[1])[0]
        ours = self._get_per_token_logps_and_entropies(model, ids, mask, scored.shape[1])[0]
        return ((ours - theirs).square() * scored).sum() / 20


@pytest.mark.parametrize("model_type", ["qwen3", "mamba2"])
def test_a_model_that_nobody_has_enabled_takes_the_stock_path(caplog, monkeypatch, llama, model_type):
    """Recurrent layers would read the packed row as one text, and attention would stop somewhere inside of itself."""
    use_float64_head(monkeypatch)
    found = {}
    for shared in (False, True):
        trainer_class = type("T", (PrefixGrouperMixin, Teacher), {}) if shared else Teacher
        trainer = make_trainer(llama, shared=shared, trainer_class=trainer_class, max_steps=2)
        trainer.teacher = families.build(model_type, vocab_size=trainer.model.config.vocab_size).eval()
        if hasattr(trl_utils, "add_fused_lm_head"):
            trl_utils.add_fused_lm_head(trainer.teacher, trainer.temperature)
        torch.manual_seed(5)
        trainer.train()
        found[shared] = trained_weights(trainer)
    assert largest_difference(*found.values()) <= 1e-9
    (reason,) = trainer.sharing.fallbacks
    assert reason.endswith("would read the packed row as one text: call enable_prefix_grouper(model) first")
    assert reason in caplog.text and all(ratio < 1 for ratio in logged(trainer, "prefix_grouper/token_ratio"))


class Holes(GRPOTrainer):
    """Leaves tokens in the middle of completions out of everything."""

    def _generate_and_score_completions(self, inputs):
        found = super()._generate_and_score_completions(inputs)
        found["completion_mask"][:, 1] = 0
        return found


class ScoresFew(GRPOTrainer):
    """Scores the last tokens of completions alone."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, 3)[0]
        return (logps * inputs["completion_mask"][:, -3:] * inputs["advantages"][:, None]).sum() / 20


@pytest.mark.parametrize(
    ("base", "reason"), [(Holes, "completion_mask has padding"), (ScoresFew, "prompt_mask has padding")]
)
def test_masks_that_packed_rows_cannot_follow_take_the_stock_path(monkeypatch, llama, base, reason):
    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_steps": 2,
    }
    stock, _ = train(llama, shared=False, trainer_class=base, **settings)
    found, trainer = train(llama, shared=True, trainer_class=type("T", (PrefixGrouperMixin, base), {}), **settings)
    assert largest_difference(stock, found) <= 1e-9
    assert any(reason in known for known in trainer.sharing.fallbacks)


class OwnStep(GRPOTrainer):
    """A training step of the user's own, which computes the loss by TRL's method."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()


class SharedOwnStep(PrefixGrouperGRPOTrainer):
    training_step = OwnStep.training_step


def test_a_training_step_of_ones_own_is_no_fallback_where_its_loss_shares(monkeypatch, llama):
    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_steps": 2,
    }
    stock, _ = train(llama, shared=False, trainer_class=OwnStep, **settings)
    found, trainer = train(llama, shared=True, trainer_class=SharedOwnStep, **settings)
    assert largest_difference(stock, found) <= 1e-9 and not trainer.sharing.fallbacks
    assert all(ratio < 1 for ratio in logged(trainer, "prefix_grouper/token_ratio"))


def test_scripts_that_ask_for_the_arguments_of_the_trainer_get_trls():
    for ours, stock in ((PrefixGrouperGRPOTrainer, GRPOTrainer), (PrefixGrouperRLOOTrainer, RLOOTrainer)):
        for name in ("__call__", "__init__"):
            found = [inspect.signature(cls if name == "__call__" else cls.__init__) for cls in (ours, stock)]
            assert found[0] == found[1]

    class Own(PrefixGrouperGRPOTrainer):
        def __init__(self, mine, **kwargs):
            super().__init__(**kwargs)

    assert list(inspect.signature(Own).parameters) == ["mine", "kwargs"]


def test_generation_sees_the_models_own_attention(monkeypatch, llama):
    trainer = make_trainer(llama, shared=True, **GROUPED)
    seen = []
    generate = type(trainer.model).generate

    def spy(self, *args, **kwargs):
        seen.append(self.config._attn_implementation)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "generate", spy)
    trainer.train()
    assert set(seen) == {"sdpa"}
    assert is_enabled(trainer.model)
