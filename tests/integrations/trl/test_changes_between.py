"""A model that is changed between the micro-batches of one optimizer step, or between steps: stopped, or learned as stock does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback
from trl import GRPOTrainer

import prefix_grouper_plugins.integrations.trl.reuse as reuse_module
from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer, PrefixGrouperMixin
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse
from tests import tiny
from tests.integrations.trl.training import (
    largest_difference,
    logged,
    make_trainer,
    train,
    trained_weights,
    use_float64_head,
)

OPEN_PROMPT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_generations": 4}
ROWS_AHEAD = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "train_dataset": tiny.prompts(16, shortest=60, longest=60),
}


def rarely(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def one_kind_of_head(monkeypatch):
    use_float64_head(monkeypatch)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", True)  # else few rows go ahead


class ChangesAfterAStep(TrainerCallback):
    """Changes the model once."""

    def __init__(self, change):
        self.change = change

    def _change(self, args, state, control, model=None, **kwargs):
        if self.change is not None:
            self.change, change = None, self.change
            change(model)

    on_step_end = _change


class ChangesAfterAMicroBatch(ChangesAfterAStep):
    on_step_end = TrainerCallback.on_step_end
    on_substep_end = ChangesAfterAStep._change


def train_with(path, change, after="micro-batch", **options):
    """Trained weights, and the trainer."""
    trainer = make_trainer(path, **{"max_steps": 2, **options})
    if after == "step":
        trainer.add_callback(ChangesAfterAStep(change))
    else:
        trainer.loss_is_sum_over_rows = True  # such a callback keeps rows apart otherwise
        trainer.add_callback(ChangesAfterAMicroBatch(change))
    torch.manual_seed(5)
    trainer.train()
    return trained_weights(trainer), trainer


def a_weight(model):
    return next(p for n, p in model.named_parameters() if "layers.1.self_attn.q_proj" in n and p.dim() == 2)


def one_number_by_data(model):
    """Past the versions that autograd counts."""
    a_weight(model).data[0, 0] += 0.5


def a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)


def merged(model):
    model.merge_adapter()


def another_adapter(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")


@pytest.mark.parametrize(
    ("settings", "change", "lora", "reason"),
    [
        (OPEN_PROMPT, one_number_by_data, False, r"the weight \S*q_proj.weight has changed"),
        (ROWS_AHEAD, one_number_by_data, False, r"the weight \S*q_proj.weight has changed"),
        (OPEN_PROMPT, merged, True, "other adapters are active, adapters were merged, or a scaling has changed"),
        (ROWS_AHEAD, a_hook, False, "layers, hooks or code of the model have changed"),
    ],
)
def test_a_change_between_micro_batches_that_share_a_forward_stops_training(path, settings, change, lora, reason):
    with pytest.raises(RuntimeError, match=f"between them {reason}: .*prefix_grouper_regroup='none'"):
        train_with(path, change, shared=True, lora=lora, **settings)


@pytest.mark.parametrize(
    ("change", "lora"), [(one_number_by_data, False), rarely(a_hook, False), rarely(another_adapter, True)]
)
def test_with_the_remedy_the_stock_weights_are_learned(path, change, lora):
    settings = {**ROWS_AHEAD, "max_steps": 1, "lora": lora, "prefix_grouper_regroup": "none"}
    stock, _ = train_with(path, change, shared=False, **settings)
    shared, trainer = train_with(path, change, shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert not trainer.sharing.fallbacks


@pytest.mark.parametrize(
    ("change", "lora"), [rarely(one_number_by_data, False), (merged, True), rarely(another_adapter, True)]
)
def test_a_change_between_steps_is_learned_as_stock_does(path, change, lora):
    settings = {**ROWS_AHEAD, "lora": lora}
    stock, _ = train_with(path, change, "step", shared=False, **settings)
    shared, trainer = train_with(path, change, "step", shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4, 4]


def leak(model):
    def add_the_token_before(module, args, output):
        return output + 0.5 * F.pad(output, (0, 0, 1, 0))[..., :-1, :]

    model.model.layers[1].mlp.register_forward_hook(add_the_token_before)


CHANGED = "LlamaForCausalLM has changed since it was checked, and cannot be shared any longer: packed rows"


def test_a_change_between_steps_that_cannot_be_shared_takes_the_stock_path_where_that_was_asked_for(path, caplog):
    stock, _ = train_with(path, leak, "step", shared=False, **ROWS_AHEAD)
    settings = {**ROWS_AHEAD, "prefix_grouper_on_unsupported": "fallback"}
    shared, trainer = train_with(path, leak, "step", shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer.gate.reason.startswith(CHANGED)
    assert logged(trainer, "prefix_grouper/fallbacks") == [0, 1]
    assert sum(CHANGED in record.getMessage() for record in caplog.records) == 1


def test_a_change_between_steps_that_cannot_be_shared_is_an_error_with_both_remedies(path):
    with pytest.raises(UnsupportedModelError, match=rf"{CHANGED}.* prefix_grouper_on_unsupported='fallback'"):
        train_with(path, leak, "step", shared=True, **ROWS_AHEAD)


def test_a_fallback_amid_a_step_stops_where_micro_batches_wait_for_each_other(path):
    settings = {**ROWS_AHEAD, "prefix_grouper_on_unsupported": "fallback"}
    with pytest.raises(RuntimeError, match=rf"sharing has become impossible: {CHANGED}.*prefix_grouper_regroup='none'"):
        train_with(path, leak, shared=True, **settings)


class SkipsSome(PrefixGrouperGRPOTrainer):
    """Leaves out the micro-batches of some numbers, as losses do whose advantages are all zero."""

    loss_is_sum_over_rows = True
    skipped = (1,)

    def _compute_loss(self, model, inputs):
        if self._step % 4 in self.skipped:
            return next(model.parameters()).sum() * 0
        return super()._compute_loss(model, inputs)


def test_a_micro_batch_that_is_not_scored_gives_its_scores_to_no_other(monkeypatch, path):
    settings = {**ROWS_AHEAD, "gradient_accumulation_steps": 4, "num_generations": 8, "max_steps": 2}
    ahead, trainer = train(path, shared=True, trainer_class=SkipsSome, **settings)
    assert trainer.sharing.passes["update"].rows_per_group == 8
    monkeypatch.setattr(PromptReuse, "why_not_ahead", lambda *_, **__: "each micro-batch by itself, with the same rows")
    alone, trainer = train(path, shared=True, trainer_class=SkipsSome, **settings)
    assert trainer.sharing.passes["update"].rows_per_group == 2
    assert largest_difference(ahead, alone) <= 1e-12


class Fails(PrefixGrouperGRPOTrainer):
    """Goes on after a micro-batch that has failed, as after running out of memory."""

    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        if self._step == 1:
            raise torch.OutOfMemoryError
        return super()._compute_loss(model, inputs)

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            self._step += 1
            return torch.zeros(())


def test_no_optimizer_step_follows_where_a_failed_micro_batch_takes_the_gradient_of_others_with_it(path):
    trainer = make_trainer(path, shared=True, trainer_class=Fails, **{**ROWS_AHEAD, "max_steps": 1})
    before = trained_weights(trainer)
    with pytest.raises(
        RuntimeError, match=r"one of them has failed or was not scored: set prefix_grouper_regroup='none'"
    ):
        trainer.train()
    assert largest_difference(before, trained_weights(trainer)) == 0


class FailsAfterScoring(Fails):
    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        loss = PrefixGrouperGRPOTrainer._compute_loss(self, model, inputs)
        if self._step == 3:
            raise torch.OutOfMemoryError
        return loss


def test_no_optimizer_step_follows_where_the_last_micro_batch_of_a_prompt_fails_after_it_was_scored(path):
    settings = {**OPEN_PROMPT, "max_steps": 1, "gradient_checkpointing": True}
    trainer = make_trainer(path, shared=True, trainer_class=FailsAfterScoring, **settings)
    with pytest.raises(
        RuntimeError, match=r"one of them has failed or was not scored: set prefix_grouper_regroup='none'"
    ):
        trainer.train()


class SetsSomething(GRPOTrainer):
    """A loss within a setting of the model that is over when its backward comes."""

    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
        own = norms[0].variance_epsilon
        for norm in norms:
            norm.variance_epsilon = 0.5
        loss = super()._compute_loss(model, inputs)
        for norm in norms:
            norm.variance_epsilon = own
        return loss


def test_layers_do_not_run_again_outside_of_a_loss_of_the_users_own(path):
    settings = {**OPEN_PROMPT, "max_steps": 1, "gradient_checkpointing": False}
    settings["train_dataset"] = tiny.prompts(16, shortest=30, longest=30)
    stock, _ = train(path, shared=False, trainer_class=SetsSomething, **settings)
    shared = type("Shared", (PrefixGrouperMixin, SetsSomething), {"loss_is_sum_over_rows": True})
    found, trainer = train(path, shared=True, trainer_class=shared, **settings)
    assert largest_difference(stock, found) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4]


@pytest.mark.parametrize(("name", "value"), [("gradient_accumulation_steps", 1), ("loss_type", "bnpo")])
def test_settings_that_change_within_a_generation_batch_do_not_move_rows_to_another_step(path, name, value):
    """They go back to where TRL has put them."""
    weights = []
    for shared in (False, True):
        trainer = make_trainer(path, shared=shared, **ROWS_AHEAD, steps_per_generation=4, max_steps=4)

        def change(model, trainer=trainer):
            setattr(trainer.args if name == "gradient_accumulation_steps" else trainer, name, value)

        trainer.add_callback(ChangesAfterAStep(change))
        torch.manual_seed(5)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert largest_difference(*weights) <= 1e-12


def clip(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def clip_in_place(weight):
    weight.grad.copy_(clip(weight.grad))


@pytest.mark.parametrize(
    ("register", "hook"), [("register_hook", clip), ("register_post_accumulate_grad_hook", clip_in_place)]
)
def test_a_hook_on_a_gradient_keeps_rows_in_their_micro_batch(path, register, hook):
    """It clips the gradient of each micro-batch, which depends on the rows that are in it."""
    weights = []
    for shared in (False, True):
        trainer = make_trainer(
            path, shared=shared, **{**ROWS_AHEAD, "max_steps": 1, "learning_rate": 1e-2, "optim": "sgd"}
        )
        getattr(a_weight(trainer.model), register)(hook)
        torch.manual_seed(5)
        trainer.train()
        weights.append(trained_weights(trainer))
    assert largest_difference(*weights) <= 1e-12
    assert "q_proj.weight gets the gradient of each micro-batch" in trainer.limits()[0]


def test_an_optimizer_that_steps_in_the_backward_keeps_rows_in_their_micro_batch(path):
    trainer = make_trainer(path, shared=True, **ROWS_AHEAD)
    assert not trainer.limits()
    trainer.args.optim = "lomo"  # which is a package of its own
    assert "optim='lomo' makes an optimizer step in the backward of each micro-batch" in trainer.limits()[0]
