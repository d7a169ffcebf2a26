"""What a run says of itself: that sharing is on, whether its updates share, and what all processes have counted."""

from __future__ import annotations

import functools
import logging
import re
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl import GRPOTrainer

from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOTrainer,
    PrefixGrouperMixin,
    PrefixGrouperRLOOTrainer,
)
from tests import tiny
from tests.integrations.trl.test_losses import SCATTERED, token_mean
from tests.integrations.trl.training import (
    largest_difference,
    logged,
    make_trainer,
    run_python,
    train,
    use_float64_head,
)

GROUPED = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("qwen"), "qwen3")


# ------------------------------------------------------------------------------------------- past the shared forward


def own_forward(self, model, inputs):
    """The model is run in the loss itself."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    scored = inputs["completion_mask"]
    length = scored.shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0]
    return -(torch.exp(logps - logps.detach()) * inputs["advantages"][:, None] * scored).sum() / scored.sum()


class OwnForward(PrefixGrouperMixin, GRPOTrainer):
    _compute_loss = own_forward


class OwnForwardBehind(PrefixGrouperMixin, type("Behind", (GRPOTrainer,), {"_compute_loss": own_forward})):
    pass


class OwnForwardInComputeLoss(PrefixGrouperMixin, GRPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return own_forward(self, model, inputs)


class PatchedOnTheObject(PrefixGrouperGRPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        stock = GRPOTrainer._get_per_token_logps_and_entropies
        self._get_per_token_logps_and_entropies = types.MethodType(stock, self)


class OwnScoringInFront(PrefixGrouperGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)


WAYS_PAST = {
    OwnForward: r"OwnForward\._compute_loss forwards the model by itself: take log-probs from self\._get_per_token",
    OwnForwardBehind: r"Behind\._compute_loss forwards the model by itself",
    OwnForwardInComputeLoss: r"OwnForwardInComputeLoss\.compute_loss forwards the model by itself",
    PatchedOnTheObject: r"PatchedOnTheObject object replaces _get_per_token_logps_and_entropies",
    OwnScoringInFront: r"OwnScoringInFront replaces _get_per_token_logps_and_entropies .* call super\(\)",
}


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["alone", "beside a shared reference pass"])
@pytest.mark.parametrize("cls", WAYS_PAST, ids=lambda cls: cls.__name__)
def test_an_update_that_goes_past_the_shared_forward_is_told_and_counted(caplog, qwen, cls, beta):
    _, trainer = train(qwen, shared=True, trainer_class=cls, beta=beta, **GROUPED)
    told = [line for line in caplog.messages if line.startswith("prefix grouper: this forward runs without sharing: ")]
    assert len(told) == 1 and re.search(WAYS_PAST[cls], told[0])
    assert logged(trainer, "prefix_grouper/token_ratio") == [1.0, 1.0], "of the update"
    assert all(share > 0 for share in logged(trainer, "prefix_grouper/fallbacks"))
    reference = logged(trainer, "prefix_grouper/ref_log_prob_token_ratio")
    if beta and cls in (OwnForward, OwnForwardBehind, OwnForwardInComputeLoss):
        assert len(reference) == 2 and max(reference) < 0.9
    else:
        assert reference == []


def test_a_loss_of_ones_own_that_scores_by_the_shared_method_is_not_past_it(caplog, qwen):
    cls = type("Own", (PrefixGrouperMixin, type("Base", (GRPOTrainer,), {"_compute_loss": token_mean})), {})
    _, trainer = train(qwen, shared=True, trainer_class=cls, **GROUPED)
    # Older releases of TRL have log-probs of padding, of which such a loss is told.
    told = [line for line in caplog.messages if "Log-probs and entropies of padding are 0 with sharing" not in line]
    assert not trainer.sharing.fallbacks and told == []
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4, 4]


def test_the_wrong_order_of_base_classes_is_an_error_when_the_class_is_made():
    with pytest.raises(ValueError, match=r"GRPOTrainer comes before .* write class Wrong\(PrefixGrouperMixin, GRPO"):
        type("Wrong", (GRPOTrainer, PrefixGrouperMixin), {})
    own = type("Own", (GRPOTrainer,), {})
    with pytest.raises(ValueError, match=r"Own comes before PrefixGrouperMixin in Wrong"):
        type("Wrong", (own, PrefixGrouperMixin), {})
    right = type("Right", (PrefixGrouperGRPOTrainer, own), {})
    assert issubclass(type("Below", (right,), {}), PrefixGrouperRLOOTrainer.__mro__[1])


def test_equal_prompts_that_never_meet_are_told_after_the_first_update(caplog, qwen):
    class Different(PrefixGrouperGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            output["prompt_ids"][:, -1] = 3 + torch.arange(len(output["prompt_ids"])) % 20
            return output

    _, trainer = train(qwen, shared=True, trainer_class=Different, **GROUPED)
    (line,) = [line for line in caplog.messages if "no two rows of a micro-batch had equal prompts" in line]
    # They part at their last token, so that most of them is shared all the same, and the line says how much.
    ratio = logged(trainer, "prefix_grouper/token_ratio")[0]
    assert ratio < 0.9 and f"({ratio:.0%} of the tokens were forwarded)" in line


# -------------------------------------------------------------------------------------------------------- by pass


def test_the_metrics_tell_update_old_policy_and_reference_passes_apart(qwen):
    settings = {**GROUPED, "beta": 0.1, "num_iterations": 2, "lora": True}
    _, trainer = train(qwen, shared=True, **settings)
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    for name in ("", "old_log_prob_", "ref_log_prob_"):
        assert last[f"prefix_grouper/{name}rows_per_group"] == 4, name
        assert last[f"prefix_grouper/{name}token_ratio"] < 0.9, name
    passes = trainer.sharing.passes
    assert passes["update"].packed == 2 and passes["old_log_prob"].packed == passes["ref_log_prob"].packed == 1
    _, trainer = train(qwen, shared=True, **GROUPED, beta=0.1)  # a reference model of its own
    assert trainer.sharing.passes["ref_log_prob"].packed == 2 and not trainer.sharing.passes["old_log_prob"].packed


def test_evaluation_has_metrics_of_its_own(qwen):
    settings = {**GROUPED, "per_device_eval_batch_size": 8, "beta": 0.1}
    trainer = make_trainer(qwen, shared=True, **settings)
    metrics = trainer.evaluate(tiny.prompts(count=4))
    assert metrics or trainer.state.log_history
    evaluated = trainer.state.log_history[-1]
    assert evaluated["eval_prefix_grouper/rows_per_group"] == 4
    assert evaluated["eval_prefix_grouper/ref_log_prob_rows_per_group"] == 4
    assert evaluated["eval_prefix_grouper/fallbacks"] == 0


# ------------------------------------------------------------------------------------------ nothing to score, to train


def test_micro_batches_whose_completions_are_all_masked_give_the_stock_weights_and_entropy(monkeypatch, qwen):
    """Half of the micro-batches have nothing to score."""

    def masking(base):
        class Masking(base):
            def _generate_and_score_completions(self, inputs):
                output = super()._generate_and_score_completions(inputs)
                output["completion_mask"][: len(output["completion_mask"]) // 2] = 0
                return output

        return Masking

    use_float64_head(monkeypatch)
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_steps": 3,
    }
    settings |= {"loss_type": "grpo", "beta": 0.1}
    for cls in (GRPOTrainer, PrefixGrouperGRPOTrainer):
        monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
        weights, trainer = train(qwen, shared=cls is not GRPOTrainer, trainer_class=masking(cls), **settings)
        if cls is GRPOTrainer:
            stock, stock_trainer = weights, trainer
    assert largest_difference(stock, weights) <= 1e-12
    assert logged(trainer, "entropy") == pytest.approx(logged(stock_trainer, "entropy"), abs=1e-12)
    assert logged(trainer, "prefix_grouper/fallbacks") == [0, 0, 0] and trainer.sharing.packed > 0


@pytest.mark.parametrize("kind", ["adapter", "frozen"])
def test_a_model_that_cannot_learn_is_told_once(caplog, monkeypatch, tmp_path, kind):
    if kind == "adapter":  # TRL issue 6700
        base = tiny.model().float()
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
            tmp_path
        )
        model = PeftModel.from_pretrained(tiny.model().float(), tmp_path, is_trainable=False)
    else:
        model = tiny.model().float().requires_grad_(False)
    trainer = make_trainer(
        model, shared=True, dtype=torch.float32, model_init_kwargs=None, beta=0.1 * (kind == "adapter"), **GROUPED
    )
    model.enable_input_require_grads()
    trainer.train()
    told = [line for line in caplog.messages if "requires a gradient, so training changes nothing" in line]
    assert len(told) == 1 and "is_trainable=True" in told[0]


# ---------------------------------------------------------------------------------------------------- sharing is on


def test_one_line_says_that_sharing_is_on_and_stands_in_the_trainers_log(caplog, qwen):
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        _, trainer = train(qwen, shared=True, beta=0.1, **SCATTERED)
    (line,) = [message for message in caplog.messages if message.startswith("prefix grouper is on")]
    assert line == trainer.state.log_history[0]["prefix_grouper"]
    assert line == (
        "prefix grouper is on for Qwen3ForCausalLM (3 layers: merged_lse) and Qwen3ForCausalLM (3 layers: merged_lse): "
        "micro-batches of 4 rows hold up to 4 of the 4 rows of a prompt, rows are regrouped over 4 micro-batches"
    )


def test_the_line_says_what_limits_sharing(caplog, qwen):
    with caplog.at_level(logging.INFO, logger="prefix_grouper_plugins"):
        train(qwen, shared=True, loss_type="bnpo", **{**SCATTERED, "max_steps": 1})
    (line,) = [message for message in caplog.messages if message.startswith("prefix grouper is on")]
    assert "rows stay in their micro-batch; limited: rows of a prompt stay scattered over the 4 micro-batches" in line


SCRIPT = """
import sys, tempfile
sys.path.insert(0, {root!r})
from tests.integrations.trl.training import make_trainer
make_trainer({path!r}, shared=True, per_device_train_batch_size=4, num_generations=4, max_steps=1).train()
"""


def test_the_line_reaches_the_terminal_of_a_plain_script(tmp_path, qwen):
    root = str(__import__("pathlib").Path(__file__).parents[3])
    (tmp_path / "script.py").write_text(SCRIPT.format(root=root, path=qwen))
    done = run_python(tmp_path, "script.py", in_fork=True)
    assert done.stderr.count("prefix grouper is on for Qwen3ForCausalLM") == 1


# --------------------------------------------------------------------------------------------------- the logged means

# TRL averages these over the micro-batches of a step, as documented in docs/how-it-works.md.
MEANS_OVER_MICRO_BATCHES = re.compile(r"entropy$|kl$|clip_ratio/|cispo_clip_ratio$")


@functools.cache
def both_logs(path, loss_type):
    patch = pytest.MonkeyPatch()
    use_float64_head(patch)
    settings = {**SCATTERED, "loss_type": loss_type, "beta": 0.1, "num_iterations": 2, "max_steps": 4}
    logs = []
    for shared in (False, True):
        _, trainer = train(path, shared=shared, **settings)
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    patch.undo()
    return logs


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_only_means_over_micro_batches_differ_in_the_log_after_regrouping(qwen, loss_type):
    stock, ours = both_logs(qwen, loss_type)
    differing = set()
    for before, after in zip(stock, ours, strict=True):
        assert before.keys() <= after.keys()
        for name in before.keys() - {"step_time"}:
            if before[name] != pytest.approx(after[name], rel=1e-5, abs=1e-7):  # Trainer keeps the loss in float32
                differing.add(name)
    assert differing, "nothing was regrouped"
    assert all(MEANS_OVER_MICRO_BATCHES.match(name) for name in differing), sorted(differing)
