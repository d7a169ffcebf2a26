"""The prompt once per optimizer step: groups larger than a micro-batch learn the stock weights, at whole groups' cost."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch.distributed.fsdp import FSDPModule
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

import prefix_grouper_plugins.integrations.trl.reuse as reuse_module
from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOTrainer,
    PrefixGrouperRLOOConfig,
    PrefixGrouperRLOOTrainer,
)
from prefix_grouper_plugins.integrations.trl.forward import PackedForward
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from tests import tiny
from tests.integrations.trl.stub_trainer import enabled_model, one_group, stub_trainer
from tests.integrations.trl.training import (
    HAS_ROUTER_LOSS,
    largest_difference,
    logged,
    make_trainer,
    skip_before,
    train,
    trained_weights,
    use_float64_head,
)

MODELS = {"qwen3": {}, "llama": {}, "mistral": {"sliding_window": 7}}
# per_device_train_batch_size, gradient_accumulation_steps, num_generations; in (4, 3, 6) one holds two groups' ends
GEOMETRIES = [(1, 8, 8), (2, 8, 8), (1, 4, 4), (4, 8, 16), (3, 4, 6), (8, 4, 8), (4, 3, 6)]
LOSSES = ["grpo", "dapo", "dr_grpo", "cispo", "gspo"]
FULL_GRID = list(product(GEOMETRIES, LOSSES, MODELS, (False, True), (False, True)))


def covering_cases():
    """Every geometry, with two losses each; model, LoRA and checkpointing take turns."""
    kinds = list(product(MODELS, (False, True), (False, True)))
    for i, geometry in enumerate(GEOMETRIES):
        for j in range(2):
            yield geometry, LOSSES[(2 * i + j) % 5], *kinds[(5 * (2 * i + j)) % len(kinds)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return {name: tiny.saved_model(tmp_path_factory.mktemp(name), name, **more) for name, more in MODELS.items()}


def geometry_of(rows, accumulation, group):
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "num_generations": group,
    }


def compare(monkeypatch, path, geometry, loss, tolerance=1e-12, of_metrics=1e-3, **more):
    use_float64_head(monkeypatch)
    settings = {**geometry_of(*geometry), "beta": 0.04, "loss_type": loss, **more}
    if loss == "gspo":
        settings |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    stock, stock_trainer = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert logged(trainer, "reward") == logged(stock_trainer, "reward")
    assert largest_difference(stock, shared) <= tolerance
    for name in ("loss", "grad_norm", "num_tokens", "completions/mean_length"):
        assert logged(trainer, name) == pytest.approx(logged(stock_trainer, name), rel=of_metrics, abs=1e-6), name
    assert not trainer.sharing.fallbacks
    return trainer


@pytest.mark.parametrize(("geometry", "loss", "model", "lora", "checkpointing"), covering_cases())
def test_groups_over_several_micro_batches_learn_the_stock_weights(
    monkeypatch, paths, geometry, loss, model, lora, checkpointing
):
    trainer = compare(monkeypatch, paths[model], geometry, loss, lora=lora, gradient_checkpointing=checkpointing)
    group = geometry[2]
    assert logged(trainer, "prefix_grouper/rows_per_group") == [group] * 6
    assert logged(trainer, "prefix_grouper/ref_log_prob_rows_per_group") == [group] * 6
    assert not trainer.limits()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("geometry", "loss", "model", "lora", "checkpointing"), FULL_GRID)
def test_the_full_grid(monkeypatch, paths, geometry, loss, model, lora, checkpointing):
    compare(monkeypatch, paths[model], geometry, loss, lora=lora, gradient_checkpointing=checkpointing)


# Kernels and routers of these compute in float32, so the weights of stock are met to rounding; SGD does not blow that up.
OTHER_KINDS = {"lfm2": 1e-9, "qwen3_next": 1e-6, "qwen3_moe": 1e-6, "gpt_oss": 1e-6}
OF_METRICS = {
    "qwen3_next": 1e-2
}  # weights that are 1e-8 apart move the gradient norm of stock's own sixth step by 6e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("model_type", OTHER_KINDS)
def test_the_full_grid_of_hybrids_and_experts(monkeypatch, tmp_path, model_type, geometry, loss, checkpointing):
    from tests.modeling import families

    path = str(tmp_path)
    families.build(model_type).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    more = {**experts(model_type), "optim": "sgd", "gradient_checkpointing": checkpointing}
    more |= {"tolerance": OTHER_KINDS[model_type], "of_metrics": OF_METRICS.get(model_type, 1e-3)}
    compare(monkeypatch, path, geometry, loss, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"num_iterations": 2},
        {"mask_truncated_completions": True},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 8},
        {"max_grad_norm": 0.05},
        {"max_steps": -1, "num_train_epochs": 1, "train_dataset": tiny.prompts(6, longest=12)},
    ],
    ids=lambda more: "-".join(more),
)
def test_other_settings_learn_the_stock_weights(monkeypatch, paths, more):
    trainer = compare(monkeypatch, paths["qwen3"], (1, 8, 8), "dapo", **more)
    if "mask_truncated_completions" not in more:  # which leaves rows out
        expected = more.get("gradient_accumulation_steps", 8)
        assert set(logged(trainer, "prefix_grouper/rows_per_group")) == {expected}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_small_micro_batches_forward_as_few_tokens_as_whole_groups(monkeypatch, paths, batch_size):
    use_float64_head(monkeypatch)
    ratios = []
    # Where TRL keeps logits, few rows go ahead, and what completions of different forwards begin alike with is not shared.
    share = "auto" if reuse_module.HAS_FUSED_HEAD else "prompt"
    for rows, accumulation in ((batch_size, 8), (8 * batch_size, 1)):
        settings = {**geometry_of(rows, accumulation, 8), "max_steps": 1, "prefix_grouper_share": share}
        _, trainer = train(paths["llama"], shared=True, **settings)
        ratios.append(logged(trainer, "prefix_grouper/token_ratio"))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)


def test_rloo_reuses_prompts(monkeypatch, paths):
    use_float64_head(monkeypatch)
    settings = {**geometry_of(2, 4, 4), "beta": 0.05}
    stock, _ = train(paths["llama"], shared=False, trainer_class=RLOOTrainer, config_class=RLOOConfig, **settings)
    classes = {"trainer_class": PrefixGrouperRLOOTrainer, "config_class": PrefixGrouperRLOOConfig}
    shared, trainer = train(paths["llama"], shared=True, **classes, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4] * 6


def experts(model_type):
    """Settings for a mixture of experts in float64, whose router loss is off: with it rows keep their micro-batch."""
    init = {
        "dtype": torch.float64,  # not in transformers' grouped kernel
        "attn_implementation": "eager" if model_type == "gpt_oss" else "sdpa",
        "experts_implementation": "eager",
    }
    return {"model_init_kwargs": init, **({"router_aux_loss_coef": 0.0} if HAS_ROUTER_LOSS else {})}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_and_sinks_reuse_prompts(monkeypatch, tmp_path, model_type):
    """Routers compute in float32; rows of stock alone differ as much."""
    from tests.modeling import families

    path = str(tmp_path)
    families.build(model_type).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    use_float64_head(monkeypatch)
    settings = {**geometry_of(1, 4, 4), "max_steps": 2, "learning_rate": 1e-4, **experts(model_type)}
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-5
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4, 4]


def test_a_router_loss_keeps_rows_in_their_micro_batch_and_says_so(monkeypatch, tmp_path):
    skip_before("1.7", "has no router loss in GRPO")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    path = tiny.saved_model(tmp_path, "qwen3_moe", **sizes)
    use_float64_head(monkeypatch)
    settings = {**geometry_of(2, 4, 4), "max_steps": 2, **experts("qwen3_moe"), "router_aux_loss_coef": 0.5}
    settings |= {"optim": "sgd", "learning_rate": 0.05}  # Adam would blow rounding of the routers up to its step size
    stock, _ = train(path, shared=False, **settings)
    shared, trainer = train(path, shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-6
    (limit,) = trainer.limits()
    assert "only 2 of 4 rows share a prompt (the router loss is made of means over a micro-batch)" in limit
    assert trainer.sharing.passes["update"].rows_per_group < 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss_type": "bnpo"}, "loss_type='bnpo'"),
        ({"prefix_grouper_regroup": "none"}, "leaves TRL's shuffle alone"),
        ({"gradient_accumulation_steps": 1, "steps_per_generation": 8}, "no common factor"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_where_prompts_are_not_reused_the_reason_is_said_and_the_weights_are_stock(
    monkeypatch, paths, caplog, settings, reason
):
    use_float64_head(monkeypatch)
    settings = {**geometry_of(2, 8, 8), "max_steps": 2, **settings}
    stock, stock_trainer = train(paths["qwen3"], shared=False, **settings)
    shared, trainer = train(paths["qwen3"], shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    if "prefix_grouper_regroup" in settings:  # else micro-batches, whose means TRL averages, have other rows
        assert logged(trainer, "entropy") == pytest.approx(logged(stock_trainer, "entropy"), rel=1e-9)
    assert any(reason in limit for limit in trainer.limits())
    assert (
        sum(reason in record.getMessage() and "smaller than" in record.getMessage() for record in caplog.records) >= 1
    )
    assert trainer.sharing.passes["update"].rows_per_group <= 2


LONG_PROMPTS = {"train_dataset": tiny.prompts(64, shortest=60, longest=60)}


def forwards_with_gradients(monkeypatch):
    """The rows of each forward of the update, in a list that grows."""
    rows = []
    run = PackedForward._forward

    def counted(self, model, batch, *args):
        if torch.is_grad_enabled():
            rows.append(batch.num_rows)
        return run(self, model, batch, *args)

    monkeypatch.setattr(PackedForward, "_forward", counted)
    return rows


@pytest.mark.parametrize(
    ("geometry", "more", "expected"),
    [
        ((2, 8, 8), {}, [8, 8]),  # 60 + 8 * 10 tokens in place of 2 * 70
        ((4, 4, 4), {}, [4] * 4),  # whole groups stay by themselves, whatever would fit
        ((1, 8, 8), {}, [1] * 8),
        ((2, 8, 8), {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, [8, 8]),
        ((2, 8, 8), {"max_completion_length": 40}, [2] * 8),
        ((3, 4, 6), {"lora": True}, [6, 6]),
    ],
)
def test_a_forward_takes_the_rows_of_as_many_micro_batches_as_fit_into_a_stock_one(
    monkeypatch, paths, geometry, more, expected
):
    use_float64_head(monkeypatch)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", True)  # the next test is about logits
    settings = {**geometry_of(*geometry), **LONG_PROMPTS, "max_steps": 2, "min_new_tokens": 9, **more}
    settings["generation_kwargs"] = {"min_new_tokens": settings.pop("min_new_tokens")}
    if "max_completion_length" in more:
        settings["generation_kwargs"] = {"min_new_tokens": more["max_completion_length"]}
    stock, _ = train(paths["llama"], shared=False, **settings)
    rows = forwards_with_gradients(monkeypatch)
    shared, trainer = train(paths["llama"], shared=True, **settings)
    assert rows == expected * 2
    assert largest_difference(stock, shared) <= 1e-12
    if "gradient_checkpointing" in more:  # prompts do not stay open then
        (limit,) = trainer.limits()
        assert "only those rows share a prompt that fit into the tokens of 2 padded ones (reentrant" in limit
        assert "set use_reentrant=False" in limit


@pytest.mark.parametrize(("tokens", "expected"), [("auto", [1] * 8), (1000, [8]), ("1", [1] * 8)])
def test_max_tokens_says_how_much_a_forward_may_hold(monkeypatch, paths, tokens, expected):
    """Rows of each forward of the update, for one group in micro-batches of one row."""
    use_float64_head(monkeypatch)
    settings = {**LONG_PROMPTS, **geometry_of(1, 8, 8), "max_steps": 1}
    stock, _ = train(paths["llama"], shared=False, **settings)
    rows = forwards_with_gradients(monkeypatch)
    shared, trainer = train(paths["llama"], shared=True, **settings, prefix_grouper_max_tokens=tokens)
    assert rows == expected
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [8]
    assert trainer._reuse.bound(1).endswith("of 1 padded ones" if tokens == "auto" else f"max_tokens={tokens}")


@pytest.mark.parametrize("tokens", [0, -1, "many", 1.5])
def test_max_tokens_is_a_positive_whole_number(paths, tokens):
    with pytest.raises(
        ValueError, match=f"prefix_grouper_max_tokens is '?{tokens}'?: choose auto or a positive whole number"
    ):
        make_trainer(paths["llama"], shared=True, prefix_grouper_max_tokens=tokens)


def test_where_the_head_keeps_logits_a_forward_holds_no_more_of_them_than_a_stock_one(monkeypatch, paths):
    """Completions that fill their columns leave room for the rows of the micro-batch alone; masked ones leave more."""
    use_float64_head(monkeypatch)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", False)  # before TRL 1.15
    rows = forwards_with_gradients(monkeypatch)
    settings = {**LONG_PROMPTS, **geometry_of(2, 8, 8), "max_steps": 1}
    train(paths["llama"], shared=True, **settings, generation_kwargs={"min_new_tokens": 10})
    assert rows == [2] * 8
    rows.clear()
    stock, _ = train(paths["llama"], shared=False, **settings, mask_truncated_completions=True)
    shared, trainer = train(paths["llama"], shared=True, **settings, mask_truncated_completions=True)
    assert len(rows) < 8
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer._reuse.bound(2) == "the tokens and the logits of 2 padded ones"


class ScoresOtherRows:
    """A loss of the user's own, which scores one token less from the second micro-batch on, or from the first."""

    loss_is_sum_over_rows = True
    whole = 0

    def _compute_loss(self, model, inputs):
        if self._step % 4 > self.whole:
            inputs = {**inputs, "completion_mask": inputs["completion_mask"].clone()}
            inputs["completion_mask"][:, 3:] = 0
        return super()._compute_loss(model, inputs)


def test_a_loss_that_scores_other_rows_than_those_that_were_forwarded_is_stopped(monkeypatch, paths):
    use_float64_head(monkeypatch)
    monkeypatch.setattr(reuse_module, "HAS_FUSED_HEAD", True)  # else few rows go ahead
    settings = {**LONG_PROMPTS, **geometry_of(2, 4, 8)}
    trainer_class = type("Trainer", (ScoresOtherRows, PrefixGrouperGRPOTrainer), {})
    with pytest.raises(RuntimeError, match="scores other rows than those of its micro-batch"):
        train(paths["llama"], shared=True, trainer_class=trainer_class, **settings)


def test_a_loss_that_always_scores_other_rows_is_forwarded_micro_batch_by_micro_batch(monkeypatch, paths):
    use_float64_head(monkeypatch)
    weights = []
    rows = forwards_with_gradients(monkeypatch)
    for shared, base in ((False, GRPOTrainer), (True, PrefixGrouperGRPOTrainer)):
        trainer_class = type("Trainer", (ScoresOtherRows, base), {"whole": -1})
        settings = {**geometry_of(2, 4, 8), **LONG_PROMPTS, "max_steps": 2}
        weights.append(train(paths["llama"], shared=shared, trainer_class=trainer_class, **settings)[0])
    assert rows == [2] * 8
    assert largest_difference(*weights) <= 1e-12


class ScoresTwice(PrefixGrouperGRPOTrainer):
    """The second scoring of a micro-batch is not that of the rows which were forwarded ahead."""

    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        return (super()._compute_loss(model, inputs) + super()._compute_loss(model, inputs)) / 2


@pytest.mark.parametrize("longest_prompt", [12, 60])
def test_a_loss_that_scores_its_rows_twice_learns_the_stock_weights(monkeypatch, paths, longest_prompt):
    use_float64_head(monkeypatch)
    settings = {**geometry_of(2, 4, 8), "longest_prompt": longest_prompt, "max_steps": 2}
    stock, _ = train(paths["llama"], shared=False, **settings)
    twice, trainer = train(paths["llama"], shared=True, trainer_class=ScoresTwice, **settings)
    assert largest_difference(stock, twice) <= 1e-12
    assert not trainer.sharing.fallbacks


def test_a_prompt_without_its_gradient_stops_training(monkeypatch, paths):
    use_float64_head(monkeypatch)
    monkeypatch.setattr(PromptCache, "is_closed", property(lambda self: False))
    with pytest.raises(RuntimeError, match="have not got their gradient"):
        train(paths["llama"], shared=True, **geometry_of(1, 4, 4))


class SkipsTheLast(PrefixGrouperGRPOTrainer):
    """Forgets to score the last micro-batch of a step, so no backward goes through the prompt."""

    loss_is_sum_over_rows = True

    def _compute_loss(self, model, inputs):
        if self.accelerator.sync_gradients:
            return next(model.parameters()).sum() * 0
        return super()._compute_loss(model, inputs)


def test_a_micro_batch_that_is_not_scored_stops_training(monkeypatch, paths):
    use_float64_head(monkeypatch)
    with pytest.raises(RuntimeError, match="prefix_grouper_regroup='none'"):
        train(paths["llama"], shared=True, trainer_class=SkipsTheLast, **geometry_of(1, 4, 4))


def test_training_that_is_resumed_learns_the_stock_weights(monkeypatch, paths, tmp_path):
    """In the middle of a generation batch: 8 micro-batches of it make two optimizer steps."""
    use_float64_head(monkeypatch)
    settings = {**geometry_of(1, 4, 4), "steps_per_generation": 8, "save_strategy": "steps", "save_steps": 1}
    weights = []
    for shared in (False, True):
        folder = tmp_path / str(shared)
        make = {"shared": shared, "output_dir": folder, **settings}
        train(paths["qwen3"], **{**make, "max_steps": 1})
        trainer = make_trainer(paths["qwen3"], **{**make, "max_steps": 3})
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert largest_difference(*weights) <= 1e-12


def train_with_a_scaler(monkeypatch, path, *, shared, overflow, **settings):
    """As under fp16, but in float64: gradients are scaled, the second optimizer step is skipped if ``overflow``."""
    trainer = make_trainer(path, shared=shared, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    trainer.accelerator.scaler = scaler
    clip = trainer.accelerator.clip_grad_norm_

    def unscale_and_clip(parameters, norm):
        scaler.unscale_(trainer.optimizer.optimizer)
        return clip(parameters, norm)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", unscale_and_clip)
    if overflow:
        trainer.loss_is_sum_over_rows = True  # the hook multiplies
        weight = trainer.model.get_input_embeddings().weight
        weight.register_hook(lambda grad: grad * (torch.inf if trainer.state.global_step == 1 else 1.0))
    torch.manual_seed(5)
    trainer.train()
    return trained_weights(trainer), trainer, scaler.get_scale()


@pytest.mark.parametrize(("rows", "overflow"), [(1, True), (2, False)])
def test_scaled_gradients_learn_the_stock_weights(monkeypatch, paths, rows, overflow):
    use_float64_head(monkeypatch)
    settings = {**geometry_of(rows, 8 // rows, 8), **LONG_PROMPTS, "max_steps": 4, "max_grad_norm": 0.5}
    stock, _, stock_scale = train_with_a_scaler(
        monkeypatch, paths["qwen3"], shared=False, overflow=overflow, **settings
    )
    shared, trainer, scale = train_with_a_scaler(
        monkeypatch, paths["qwen3"], shared=True, overflow=overflow, **settings
    )
    assert scale == stock_scale == (32.0 if overflow else 128.0)
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "prefix_grouper/rows_per_group") == [8] * 4


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_under_deepspeed_and_fsdp_the_reason_is_named(kind):
    trainer = stub_trainer(enabled_model(), 8, 8)
    trainer.accelerator.distributed_type = kind
    reuse = PromptReuse(trainer, PackedForward(trainer))
    for update in (True, False):
        assert f"under {kind.value} every process has to make the same number" in reuse.why_not(
            trainer.model, update=update
        )
    reuse.enter(one_group(12, 4, 1), 0)
    assert reuse.score_update(trainer.model, None, entropy=False) is None


def test_processes_whose_ddp_accelerate_has_compiled_make_one_forward_in_each_micro_batch():
    """One with several pieces would synchronise in each, and wait for the others for ever."""
    trainer = stub_trainer(enabled_model(), 8, 8)
    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.EAGER
    reuse = PromptReuse(trainer, None)
    assert reuse.why_not(trainer.model) is None
    trainer.accelerator.num_processes = 2
    assert "torch.compile of accelerate hides DDP" in reuse.why_not_ahead(trainer.model)


def test_a_model_that_accelerate_has_not_sharded_itself_does_not_reuse_prompts():
    """But transformers, when it was loaded, or a script: nobody asks the other processes there."""
    model = enabled_model()
    trainer = stub_trainer(model, 8, 8)
    assert PromptReuse(trainer, None).why_not(model) is None
    model.__class__ = type("FSDPQwen3ForCausalLM", (FSDPModule, type(model)), {})
    assert "under FSDP2 past accelerate every process has to" in PromptReuse(trainer, None).why_not(model)


def test_where_every_process_must_forward_alike_the_reason_is_said_once_and_the_weights_are_stock(
    monkeypatch, paths, caplog
):
    """As under DeepSpeed and FSDP, by one process that is taken for several."""
    use_float64_head(monkeypatch)
    settings = {**geometry_of(2, 4, 8), "max_steps": 2, "beta": 0.04}
    stock, _ = train(paths["llama"], shared=False, **settings)
    monkeypatch.setattr(reuse_module, "_KINDS", set())
    shared, trainer = train(paths["llama"], shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer.sharing.passes["update"].rows_per_group == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("every process has to make the same number of forwards" in warning for warning in warnings) == 1
