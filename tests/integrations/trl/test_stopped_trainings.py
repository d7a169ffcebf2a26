"""A training that stops inside an optimizer step and goes on learns what stock learns, and so does one with an evaluation in there."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

import prefix_grouper_plugins.integrations.trl.reuse as reuse_module
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer
from prefix_grouper_plugins.integrations.trl.windows import StepWindows, windows
from tests import tiny
from tests.integrations.trl.training import (
    largest_difference,
    logged,
    make_trainer,
    trained_weights,
    use_float64_head,
)

OPEN_PROMPT = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_generations": 8,
    "train_dataset": tiny.prompts(32, shortest=25, longest=25),
}
ROWS_AHEAD = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_generations": 8,
    "train_dataset": tiny.prompts(32, shortest=60, longest=60),
}
WHOLE_GROUPS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(autouse=True)
def one_kind_of_head(monkeypatch):
    use_float64_head(monkeypatch)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", True)  # else few rows go ahead


class Stop(Exception):
    pass


class After(TrainerCallback):
    """Does something once, after so many micro-batches, none of which is the last of its step."""

    def __init__(self, micro_batches, act):
        self.left, self.act = micro_batches, act

    def on_substep_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.act(control)


def raises(control):
    raise Stop


def says(name):
    return lambda control: setattr(control, name, True)


def train_with(path, act, *, shared, micro_batches=3, again=True, **settings):
    """Weights and trainer, of a training that goes on after it was stopped."""
    trainer = make_trainer(path, **{"max_steps": 2, **settings}, shared=shared)
    trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
    trainer.add_callback(After(micro_batches, act))
    torch.manual_seed(5)
    try:
        trainer.train()
    except Stop:
        assert again
    if again:
        trainer.train()
    return trained_weights(trainer), trainer


def differs_by(path, drive, **settings):
    """How far the weights of stock are from the shared ones, both after ``drive(trainer)``; and the trainer that shares."""
    weights = []
    for shared in (False, True):
        own = {**settings, "output_dir": settings["output_dir"] / str(shared)} if "output_dir" in settings else settings
        trainer = make_trainer(path, shared=shared, **own)
        torch.manual_seed(5)
        drive(trainer)
        weights.append(trained_weights(trainer))
    return largest_difference(*weights), trainer


def is_stopped(trainer, micro_batches):
    """Begin a training that is stopped after so many micro-batches."""
    trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
    trainer.add_callback(After(micro_batches, raises))
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize("act", [raises, says("should_training_stop")], ids=["error", "callback"])
@pytest.mark.parametrize("sizes", [OPEN_PROMPT, ROWS_AHEAD, WHOLE_GROUPS], ids=["open prompt", "rows ahead", "whole"])
def test_a_training_that_was_stopped_inside_a_step_goes_on_as_stock_does(path, sizes, act):
    stock, _ = train_with(path, act, shared=False, **sizes)
    shared, trainer = train_with(path, act, shared=True, **sizes)
    assert largest_difference(stock, shared) <= 1e-12
    assert not trainer.sharing.fallbacks
    ratios = logged(trainer, "prefix_grouper/token_ratio")
    assert len(ratios) == 2 and max(ratios) < 0.7, "steps begin inside a generation batch, and share all the same"


def test_a_checkpoint_is_resumed_by_the_trainer_that_was_stopped(path, tmp_path):
    def drive(trainer):
        is_stopped(trainer, 9)
        trainer.train(resume_from_checkpoint=True)

    saves = {"save_strategy": "steps", "save_steps": 1, "output_dir": tmp_path, "max_steps": 3}
    assert differs_by(path, drive, **OPEN_PROMPT, **saves)[0] <= 1e-12


EPOCHS = {
    **OPEN_PROMPT,
    "max_steps": -1,
    "num_train_epochs": 2,
    "train_dataset": tiny.prompts(2, shortest=25, longest=25),
}


def test_an_epoch_that_stops_inside_a_step_is_an_error_where_micro_batches_share(path):
    act = says("should_epoch_stop")
    with pytest.raises(
        RuntimeError, match=r"an epoch was stopped inside an optimizer step.*prefix_grouper_regroup='none'"
    ):
        train_with(path, act, shared=True, again=False, **EPOCHS)
    stock, _ = train_with(path, act, shared=False, again=False, **EPOCHS)
    shared, _ = train_with(path, act, shared=True, again=False, prefix_grouper_regroup="none", **EPOCHS)
    assert largest_difference(stock, shared) <= 1e-12


def test_the_last_epoch_may_stop_inside_a_step(path):
    """Which is then left out."""
    act, settings = says("should_epoch_stop"), {**EPOCHS, "num_train_epochs": 1, "micro_batches": 10}
    stock, _ = train_with(path, act, shared=False, again=False, **settings)
    shared, _ = train_with(path, act, shared=True, again=False, **settings)
    assert largest_difference(stock, shared) <= 1e-12


@pytest.mark.parametrize("sizes", [OPEN_PROMPT, WHOLE_GROUPS], ids=["open prompt", "whole"])
def test_after_a_stop_fewer_micro_batches_may_be_accumulated(path, sizes):
    """So that the next step begins where none would have begun before."""

    def drive(trainer):
        is_stopped(trainer, 4)
        trainer.args.gradient_accumulation_steps = 4
        trainer.train()

    assert differs_by(path, drive, **{**sizes, "gradient_accumulation_steps": 8, "max_steps": 2})[0] <= 1e-12


def test_more_may_be_accumulated_from_a_step_on_that_trainer_does_not_announce(path):
    """Trainer announces a step where the micro-batches of the epoch are a multiple of what is accumulated."""

    def drive(trainer):
        trainer.train()
        trainer.add_callback(AccumulatesMore(trainer))
        trainer.args.max_steps = 3
        trainer.train()

    settings = {**OPEN_PROMPT, "gradient_accumulation_steps": 4, "steps_per_generation": 8, "max_steps": 1}
    assert differs_by(path, drive, **settings)[0] <= 1e-12


class AccumulatesMore(TrainerCallback):
    def __init__(self, trainer):
        self.args = trainer.args

    def on_step_end(self, args, state, control, **kwargs):
        self.args.gradient_accumulation_steps = 8


class AccumulatesTwiceAsMuch(AccumulatesMore):
    def on_step_end(self, args, state, control, **kwargs):
        self.args.gradient_accumulation_steps = min(2 * self.args.gradient_accumulation_steps, 8)


@pytest.mark.parametrize("regroup", ["exact", "none"])
def test_micro_batches_of_a_step_that_trainer_divides_by_different_numbers_do_not_exchange_rows(path, regroup):
    """From 2 to 4 to 8: Trainer has begun with its four when the second step ends, and goes on with eight in the third."""

    def drive(trainer):
        trainer.add_callback(AccumulatesTwiceAsMuch(trainer))
        trainer.train()

    settings = {**OPEN_PROMPT, "gradient_accumulation_steps": 2, "steps_per_generation": 8, "max_steps": 4}
    if regroup == "none":
        assert differs_by(path, drive, prefix_grouper_regroup="none", **settings)[0] <= 1e-12
        return
    with pytest.raises(ValueError, match=r"would be divided by 4 and by 8.* prefix_grouper_regroup='none'"):
        differs_by(path, drive, **settings)


def test_a_subclass_may_change_the_rows_of_the_buffer(path):
    """They stay where they are, and go back from there after a stop."""
    weights = []
    for base in (GRPOTrainer, PrefixGrouperGRPOTrainer):

        class Scales(base):
            loss_is_sum_over_rows = True

            def _prepare_inputs(self, generation_batch):
                number = self._step % self.args.steps_per_generation
                inputs = super()._prepare_inputs(generation_batch)
                if number:
                    return inputs
                scaled = [{**batch, "advantages": 2 * batch["advantages"]} for batch in self._buffered_inputs]
                self._buffered_inputs = scaled
                return scaled[0]

        is_ours = base is PrefixGrouperGRPOTrainer
        found, _ = train_with(path, raises, shared=is_ours, trainer_class=Scales, **WHOLE_GROUPS)
        weights.append(found)
    assert largest_difference(*weights) <= 1e-12


def test_trainings_of_one_trainer_may_accumulate_differently(path):
    """The second one begins in the middle of a generation batch."""

    def drive(trainer):
        trainer.train()
        trainer.args.gradient_accumulation_steps = 8
        trainer.train()

    settings = {**OPEN_PROMPT, "gradient_accumulation_steps": 6, "steps_per_generation": 8, "max_steps": 2}
    difference, trainer = differs_by(path, drive, **settings)
    assert difference <= 1e-12
    assert trainer.step_windows.offset == 4


def test_a_step_that_ends_early_since_settings_have_changed_is_an_error(path):
    """Rows have been moved over its end."""

    def accumulates_less(control):
        trainer.args.gradient_accumulation_steps = 4

    trainer = make_trainer(path, shared=True, **WHOLE_GROUPS | {"gradient_accumulation_steps": 8, "max_steps": 2})
    trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
    trainer.add_callback(After(1, accumulates_less))
    with pytest.raises(
        ValueError, match=r"rows were regrouped over 8 micro-batches, and may exchange them only over 4 now"
    ):
        trainer.train()


@pytest.mark.parametrize("sizes", [OPEN_PROMPT, ROWS_AHEAD], ids=["open prompt", "rows ahead"])
def test_an_evaluation_inside_a_step_leaves_the_counts_of_the_update_alone(path, sizes):
    found = []
    for evaluates in (False, True):
        data = tiny.prompts(4, longest=6)
        trainer = make_trainer(path, shared=True, **sizes, max_steps=1, eval_dataset=data, per_device_eval_batch_size=8)
        if evaluates:
            trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
            trainer.add_callback(After(2, lambda control, trainer=trainer: trainer.evaluate()))
        torch.manual_seed(5)
        trainer.train()
        found.append(logged(trainer, "prefix_grouper/tokens_forwarded"))
        assert logged(trainer, "prefix_grouper/fallbacks") == [0]
    assert found[0] == found[1]


def test_windows_begin_where_steps_do():
    assert windows(8, 4) == [range(4), range(4, 8)]
    assert windows(8, 4, offset=3) == [range(3), range(3, 7), range(7, 8)]
    assert windows(4, 4, offset=8) == [range(4)]
    assert windows(3, 1, offset=2) == [range(1), range(1, 2), range(2, 3)]


def test_a_window_is_found_by_a_micro_batch_in_it():
    class Trainer:
        class args:
            gradient_accumulation_steps, steps_per_generation = 6, 12

        _step = 15

    found = StepWindows(Trainer)
    found.begin_epoch()
    assert [found.of(number) for number in (0, 2, 3, 8, 9)] == [
        range(3),
        range(3),
        range(3, 9),
        range(3, 9),
        range(9, 12),
    ]
    Trainer.args.gradient_accumulation_steps = 4
    assert found.of(3) == range(3, 7), "the epoch has begun with the number 3"
