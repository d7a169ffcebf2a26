"""Rows change their micro-batch only under a loss that is known to be a sum over rows, by the trainer that runs.

Weights are compared with those of the stock trainer of the same loss, in float64.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOConfig,
    PrefixGrouperGRPOTrainer,
    PrefixGrouperMixin,
    PrefixGrouperRLOOConfig,
    PrefixGrouperRLOOTrainer,
)
from prefix_grouper_plugins.integrations.trl.fused_head import MASKS_PADDING
from prefix_grouper_plugins.integrations.trl.losses import PARTS_OF_SCORING, SCORING, own_code, why_rows_stay
from tests import tiny
from tests.integrations.trl.training import (
    largest_difference,
    logged,
    make_trainer,
    skip_before,
    train,
    trained_weights,
    use_float64_head,
)

SCATTERED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "max_steps": 3,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("qwen"), "qwen3")


def token_mean(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A loss over the tokens of the micro-batch, as many scripts have it."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    scored = inputs["completion_mask"]
    logps = self._get_per_token_logps_and_entropies(model, ids, mask, scored.shape[1])[0]
    loss = -(torch.exp(logps - logps.detach()) * inputs["advantages"][:, None] * scored).sum() / scored.sum()
    return loss / self.current_gradient_accumulation_steps


class OwnLoss(GRPOTrainer):
    _compute_loss = token_mean


class OwnComputeLoss(GRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return token_mean(self, model, inputs)


class ChangedLossType(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_type = "bnpo"


class LossMixin:
    _compute_loss = token_mean


class MixedIn(LossMixin, GRPOTrainer):
    pass


class OnTheObject(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._compute_loss = types.MethodType(token_mean, self)


class Callable(GRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss = functools.partial(lambda model, inputs, **_: token_mean(self, model, inputs))


class OwnInputs(GRPOTrainer):
    """The loss is TRL's, what it is made of depends on the micro-batch."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        return {**inputs, "advantages": inputs["advantages"] - inputs["advantages"].mean()}


class OwnPart(GRPOTrainer):
    """A method that only some settings call."""

    @staticmethod
    def get_off_policy_mask(advantages, per_token_logps, mask, **_):
        mean = (per_token_logps * mask).sum() / mask.sum()
        return ((per_token_logps * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) > mean).to(mask)


def shared(base: type) -> type:
    return type(f"Shared{base.__name__}", (PrefixGrouperMixin, base), {})


KINDS = [OwnLoss, OwnComputeLoss, ChangedLossType, MixedIn, OnTheObject, Callable, OwnInputs]


@pytest.mark.parametrize("base", KINDS, ids=lambda cls: cls.__name__)
def test_a_loss_that_is_not_known_to_be_a_sum_over_rows_keeps_its_micro_batches(monkeypatch, caplog, qwen, base):
    use_float64_head(monkeypatch)
    stock, _ = train(qwen, shared=False, trainer_class=base, **SCATTERED)
    ours, trainer = train(qwen, shared=True, trainer_class=shared(base), **SCATTERED)
    assert largest_difference(stock, ours) <= 1e-12
    assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks
    told = [line for line in caplog.messages if "stay scattered over the 4 micro-batches" in line]
    assert len(told) == 1 and ("not TRL's own" in told[0] or "loss_type='bnpo'" in told[0])


class AveragesPadding(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_mask"].shape[1])[0]
        loss = -(torch.exp(logps - logps.detach()) * inputs["advantages"][:, None] + 0.1 * logps).mean()
        return loss / self.current_gradient_accumulation_steps


def test_a_loss_of_the_users_own_that_reads_log_probs_of_padding_learns_the_stock_weights_or_is_told_of(
    monkeypatch, caplog, qwen
):
    """Newer releases of TRL mask them; in older ones they are those of the padding token, which packed rows do not have."""
    use_float64_head(monkeypatch)
    stock, _ = train(qwen, shared=False, trainer_class=AveragesPadding, **SCATTERED)
    ours, _ = train(qwen, shared=True, trainer_class=shared(AveragesPadding), **SCATTERED)
    told = [line for line in caplog.messages if "multiply by completion_mask before you average them" in line]
    if MASKS_PADDING:
        assert largest_difference(stock, ours) <= 1e-12 and not told
    else:
        assert largest_difference(stock, ours) > 1e-12 and len(told) == 1
        assert "AveragesPadding._compute_loss is not TRL's own. Log-probs and" in told[0]


@pytest.mark.parametrize("base", [OwnLoss, ChangedLossType], ids=lambda cls: cls.__name__)
def test_moving_their_rows_would_change_the_weights(monkeypatch, qwen, base):
    """What the tests above are about: 'group' moves rows all the same."""
    use_float64_head(monkeypatch)
    stock, _ = train(qwen, shared=False, trainer_class=base, **SCATTERED)
    moved, _ = train(qwen, shared=True, trainer_class=shared(base), prefix_grouper_regroup="group", **SCATTERED)
    assert largest_difference(stock, moved) > 1e-4


def test_a_part_of_trls_loss_that_a_subclass_replaces_keeps_rows_where_they_are(qwen):
    trainer = make_trainer(qwen, shared=True, trainer_class=shared(OwnPart), **SCATTERED)
    assert why_rows_stay(trainer).startswith("OwnPart.get_off_policy_mask is not TRL's own")
    assert trainer._window() == 1


def test_a_loss_that_is_declared_a_sum_over_rows_is_regrouped(monkeypatch, qwen):
    class RowMean(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 2

    class Declared(PrefixGrouperMixin, RowMean):
        loss_is_sum_over_rows = True

    use_float64_head(monkeypatch)
    stock, _ = train(qwen, shared=False, trainer_class=RowMean, **SCATTERED)
    ours, trainer = train(qwen, shared=True, trainer_class=Declared, **SCATTERED)
    assert largest_difference(stock, ours) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4, 4, 4]


def test_gmpo_of_trl_stays_shared(monkeypatch, qwen):
    skip_before("1.9.2", "has no GMPO")
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    use_float64_head(monkeypatch)
    settings = {**SCATTERED, "config_class": GMPOConfig}
    stock, _ = train(qwen, shared=False, trainer_class=GMPOTrainer, **settings)
    ours, trainer = train(qwen, shared=True, trainer_class=shared(GMPOTrainer), **settings)
    assert largest_difference(stock, ours) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4, 4, 4]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(PrefixGrouperGRPOTrainer, PrefixGrouperGRPOConfig), (PrefixGrouperRLOOTrainer, PrefixGrouperRLOOConfig)],
)
def test_trls_own_trainers_are_known_in_every_release(qwen, trainer_class, config_class):
    trainer = make_trainer(qwen, shared=True, trainer_class=trainer_class, config_class=config_class, **SCATTERED)
    assert why_rows_stay(trainer) is None and trainer._window() == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"loss_type": "bnpo"}, "loss_type='bnpo'"),
        ({"loss_type": len}, "is not known to be a sum over rows"),
        ({"top_entropy_quantile": 0.5}, "quantile over a micro-batch"),
        ({"entropy_coef": 0.1}, "entropy bonus"),
    ],
)
def test_what_the_trainer_has_become_counts_not_what_its_arguments_were(qwen, change, why):
    trainer = make_trainer(qwen, shared=True, **SCATTERED)
    vars(trainer).update(change)
    assert why in why_rows_stay(trainer) and trainer._window() == 1


def test_a_method_of_trl_that_is_patched_or_wrapped_is_not_trls_any_more(monkeypatch, qwen):
    trainer = make_trainer(qwen, shared=True, **SCATTERED)
    own = GRPOTrainer._compute_loss

    @functools.wraps(own)
    def wrapped(self, model, inputs):
        return own(self, model, inputs) + 0 * inputs["advantages"].std()

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", wrapped)
    assert own_code(trainer, "_compute_loss") == "GRPOTrainer._compute_loss"
    assert trainer._window() == 1


def centered(own):
    """TRL's ``_prepare_inputs``, with advantages of the micro-batch."""

    def prepare(self, generation_batch):
        inputs = own(self, generation_batch)
        return {**inputs, "advantages": inputs["advantages"] - inputs["advantages"].mean()}

    return prepare


@pytest.mark.parametrize("name", ["_compute_loss", "_prepare_inputs"])
def test_a_method_that_a_script_sets_on_grpo_trainer_keeps_rows_where_the_launcher_has_put_our_class(
    monkeypatch, caplog, qwen, name
):
    """There `trl.GRPOTrainer` is our class, and so has the method what is no code of ours."""
    use_float64_head(monkeypatch)
    found = {}
    for cls, is_shared in ((GRPOTrainer, False), (PrefixGrouperGRPOTrainer, True)):
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, token_mean if name == "_compute_loss" else centered(cls._prepare_inputs))
            found[is_shared], trainer = train(qwen, shared=is_shared, **SCATTERED)
            assert not is_shared or own_code(trainer, name) == f"PrefixGrouperGRPOTrainer.{name}"
    assert largest_difference(*found.values()) <= 1e-9
    assert f"PrefixGrouperGRPOTrainer.{name} is not TRL's own" in caplog.text


class Declared(PrefixGrouperGRPOTrainer):
    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


class Below(Declared):
    _compute_loss = token_mean


class BelowAndDeclared(Below):
    loss_is_sum_over_rows = True


class BelowWithoutLoss(Declared):
    def log(self, *args, **kwargs):
        return super().log(*args, **kwargs)


def test_a_declaration_does_not_answer_for_the_loss_of_a_class_below(qwen):
    def why(cls):
        return why_rows_stay(make_trainer(qwen, shared=True, trainer_class=cls, **SCATTERED))

    assert why(Declared) is None and why(BelowAndDeclared) is None and why(BelowWithoutLoss) is None
    assert "Below._compute_loss may compute something" in why(Below) and "stands on Declared" in why(Below)
    trainer = make_trainer(qwen, shared=True, trainer_class=Below, **SCATTERED)
    trainer.loss_is_sum_over_rows = True  # of this one, whatever its classes
    assert why_rows_stay(trainer) is None


class Clips(TrainerCallback):
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clips_in_backward(trainer):
    backward = trainer.accelerator.backward

    def run(loss, **kwargs):
        backward(loss, **kwargs)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 0.1)

    trainer.accelerator.backward = run


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda trainer: trainer.add_callback(Clips()), "Clips.on_substep_end runs between micro-batches"),
        (clips_in_backward, "Accelerator.backward is not Accelerate's own"),
    ],
    ids=["callback", "backward"],
)
def test_code_that_gets_the_gradients_of_each_micro_batch_keeps_rows(monkeypatch, qwen, change, why):
    use_float64_head(monkeypatch)
    found = {}
    for is_shared in (False, True):
        trainer = make_trainer(qwen, shared=is_shared, **SCATTERED)
        change(trainer)
        torch.manual_seed(5)
        trainer.train()
        found[is_shared] = trained_weights(trainer)
    assert largest_difference(*found.values()) <= 1e-9 and why in why_rows_stay(trainer)
    trainer.loss_is_sum_over_rows = True
    assert why_rows_stay(trainer) is None


def test_scoring_of_ones_own_behind_the_mixin_is_not_passed_over_in_silence(qwen):
    class OwnScoring(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return (logps * 2, *rest)

    with pytest.raises(
        UnsupportedModelError, match=f"OwnScoring.{SCORING} is not TRL's own.* in a subclass of the shared"
    ):
        make_trainer(qwen, shared=True, trainer_class=shared(OwnScoring), **SCATTERED)
    settings = {**SCATTERED, "max_steps": 1, "prefix_grouper_on_unsupported": "fallback"}
    stock, _ = train(qwen, shared=False, trainer_class=OwnScoring, **settings)
    fallen, trainer = train(qwen, shared=True, trainer_class=shared(OwnScoring), **settings)
    assert largest_difference(stock, fallen) == 0 and logged(trainer, "prefix_grouper/fallbacks") == [1]


@pytest.mark.parametrize("name", PARTS_OF_SCORING)
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_a_part_of_scoring_that_is_replaced_is_not_passed_over_in_silence(monkeypatch, qwen, name, behind):
    monkeypatch.setattr(GRPOTrainer, name, getattr(GRPOTrainer, name, None), raising=False)  # TRL 1.14 has them
    bases = (GRPOTrainer,) if behind else (PrefixGrouperMixin, GRPOTrainer)
    own = type("OwnPart", bases, {name: lambda self, *args, **kwargs: None})
    with pytest.raises(
        UnsupportedModelError, match=f"OwnPart.{name} is not TRL's own, and the shared {SCORING} does not"
    ):
        make_trainer(qwen, shared=True, trainer_class=shared(own) if behind else own, **SCATTERED)


def test_a_subclass_in_front_may_add_to_the_shared_scores(monkeypatch, qwen):
    """Its rows stay, since it may read the micro-batch; its forwards are shared."""

    class Twice:
        def _get_per_token_logps_and_entropies(self, model, ids, mask, length, *args, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(model, ids, mask, length, *args, **kwargs)
            real = mask[:, -length:]  # what stands in the padding differs from one TRL to the next
            return (logps - (logps.detach() * real).sum() / real.sum(), *rest)

    stock_class = type("Stock", (Twice, GRPOTrainer), {})
    shared_class = type("Shared", (Twice, PrefixGrouperGRPOTrainer), {})
    use_float64_head(monkeypatch)
    settings = {**SCATTERED, "beta": 0.1, "max_steps": 2}
    stock, _ = train(qwen, shared=False, trainer_class=stock_class, **settings)
    ours, trainer = train(qwen, shared=True, trainer_class=shared_class, **settings)
    assert largest_difference(stock, ours) <= 1e-12
    assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks
