"""Trainings with FSDP2 on two processes, part of distributed_training.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from transformers import TrainerCallback
from trl import GRPOTrainer

from prefix_grouper_plugins import UnsupportedModelError
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer, reuse
from prefix_grouper_plugins.integrations.trl.forward import PackedForward
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, train, trained_weights
from tests.logs import messages

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 2,
    "beta": 0.04,
    "lora": True,
    "gradient_checkpointing": True,
}
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


@contextmanager
def sharding() -> Iterator[None]:
    """In here accelerate shards by FSDP2, which it would not do on a CPU, though torch does."""

    def on_cpu(state: PartialState) -> None:
        state.device = torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(PartialState, "set_device", on_cpu)
        yield
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate leaves behind


def trains_sharded(path: str) -> None:
    """Against two stock processes without sharding: LoRA, layers that run again, a reference without adapters, and `verify` before each step, which runs sharded as well."""
    with messages() as said:
        stock, _ = train(path, shared=False, **SETTINGS)
        with sharding():
            trainer = make_trainer(path, shared=True, prefix_grouper_verify="1", **FSDP2, **SETTINGS)
            torch.manual_seed(5)
            trainer.train()
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
        shared = whole_weights(trainer)
        assert largest_difference(stock, shared) <= 1e-12, largest_difference(stock, shared)
        assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks, trainer.sharing.fallbacks
        if trainer.accelerator.is_main_process:
            verified = [line for line in said if "verified the first micro-batch" in line]
            assert len(verified) == SETTINGS["max_steps"] and "not covered" not in "".join(verified), said
    refuses_a_hook_that_leaks(trainer)


def refuses_a_hook_that_leaks(trainer: Any) -> None:
    """Checking the model again needs all processes."""
    layer = next(m for m in trainer.model.modules() if type(m).__name__ == "FSDPQwen3DecoderLayer")
    layer.register_forward_hook(lambda _, args, out: out + 0.5 * F.pad(out, (0, 0, 1, 0))[..., :-1, :])
    ids = torch.full((2, 9), 4)
    with pytest.raises(
        UnsupportedModelError, match=r"has changed since it was checked.* depends on tokens of other rows"
    ):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)


# ------------------------------------------------------------------------ the prompt once per optimizer step, against stock

# Prompts of many lengths. Without new tokens to wait for, some completions would fit into one forward with their prompt.
REUSE: dict[str, Any] = {
    "train_dataset": tiny.prompts(64, shortest=3, longest=25),
    "generation_kwargs": {"min_new_tokens": 10},
    "prefix_grouper_share": "prompt",
}


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    return {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trained_weights(trainer).items()}


def masking(base: type) -> Any:
    """Completions are cut, and a third of them masked, on each process by itself; counts what whole groups would forward."""

    class Masking(base):  # type: ignore[misc]
        whole_groups = 0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            random = torch.Generator().manual_seed(2 * self.state.global_step + self.accelerator.process_index)
            mask = output["completion_mask"]
            left = torch.randint(1, mask.shape[1] + 1, (len(mask), 1), generator=random)
            left[torch.rand(len(mask), generator=random) < 0.35] = 0
            mask *= torch.arange(mask.shape[1]) < left
            prompts = [tuple(ids[own != 0].tolist()) for ids, own in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]  # fmt: skip
            scored = {prompt for prompt, own in zip(prompts, mask, strict=True) if own.any()}
            self.whole_groups += int(mask.sum()) + sum(len(prompt) - 1 for prompt in scored)
            return output

    return Masking


def train_sharded(path: str, *, shared: bool, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    with sharding():
        trainer = make_trainer(path, shared=shared, **FSDP2, **settings)
        torch.manual_seed(5)
        trainer.train()
    assert trainer.accelerator.is_fsdp2
    return whole_weights(trainer), trainer


def sizes_of(rows: int, accumulation: int, group: int) -> dict[str, int]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    return dict(zip(names, (rows, accumulation, group), strict=True))


@contextmanager
def collectives() -> Iterator[list[Any]]:
    """Those of FSDP2, on this process, and afterwards whether all processes have made the same ones."""
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("foreach_all_gather", "foreach_reduce"):
            own = getattr(param_group, name)

            def counted(parameters: Any, *args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
                calls.append((name, [parameter._param_fqn for parameter in parameters]))
                return own(parameters, *args, **kwargs)

            patch.setattr(param_group, name, counted)
        yield calls
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, calls)
    assert all(others == calls for others in of_all)


@contextmanager
def single_tokens() -> Iterator[list[int]]:
    """The tokens that are forwarded in the update in the place of what another process forwards."""
    tokens: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((PromptCache, "of_one_token"), (PackedForward, "nothing_to_score")):
            own = getattr(owner, name)

            def counted(*args: Any, own: Any = own, **kwargs: Any) -> Any:
                tokens.extend([1] * torch.is_grad_enabled())
                return own(*args, **kwargs)

            patch.setattr(owner, name, counted)
        yield tokens


def reuses_prompts(path: str, *, rows_ahead: bool = False, is_matched: bool = False, **settings: Any) -> None:
    """Stock weights, at the tokens of whole groups and of what is matched."""
    settings = {**REUSE, **settings}
    stock, stock_trainer = train_sharded(path, shared=False, trainer_class=masking(GRPOTrainer), **settings)
    with collectives(), single_tokens() as singles, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "HAS_FUSED_HEAD", rows_ahead)  # where TRL keeps logits, few rows go ahead
        trainer_class = masking(PrefixGrouperGRPOTrainer)
        shared, trainer = train_sharded(path, shared=True, trainer_class=trainer_class, **settings)
    assert largest_difference(stock, shared) <= 1e-12, largest_difference(stock, shared)
    assert logged(trainer, "loss") == pytest.approx(logged(stock_trainer, "loss"), abs=1e-6)
    assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks, trainer.sharing.fallbacks
    if not settings.get("prefix_grouper_verify"):
        update, iterations = trainer.sharing.passes["update"], settings.get("num_iterations", 1)
        assert update.tokens_forwarded == trainer.whole_groups * iterations + len(singles)
    if is_matched:
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, len(singles))
        assert any(of_all), "no process had to forward anything for another"


class OneDeclines(PrefixGrouperGRPOTrainer):
    """Rows of one process, in every second optimizer step, are those of a model whose angles depend on padding."""

    def why_not_columns(self, *args: Any) -> str | None:
        is_wide = self.accelerator.process_index == 1 and self.state.global_step % 2 == 0
        return "too wide on one process" if is_wide else super().why_not_columns(*args)


class HookOfOne(TrainerCallback):
    """From the second optimizer step on, one process looks at a gradient."""

    trainer: Any

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.trainer.accelerator.process_index == 1:
            next(p for p in self.trainer.model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient)


class OneIsHooked(PrefixGrouperGRPOTrainer):
    def train(self, *args: Any, **kwargs: Any) -> Any:
        hook = HookOfOne()
        hook.trainer = self
        self.add_callback(hook)
        return super().train(*args, **kwargs)


def where_one_may_not_none_does(path: str) -> None:
    """Processes that would decide by themselves would wait for each other."""
    settings: dict[str, Any] = {**REUSE, **sizes_of(2, 4, 8), "max_steps": 3, "beta": 0.04}
    stock, _ = train_sharded(path, shared=False, **settings)
    for trainer_class, expected in ((OneDeclines, [False, True, False]), (OneIsHooked, [True, False, False])):
        with messages() as said, collectives():
            shared, trainer = train_sharded(path, shared=True, trainer_class=trainer_class, **settings)
        assert largest_difference(stock, shared) <= 1e-12, largest_difference(stock, shared)
        assert [rows == 8 for rows in logged(trainer, "prefix_grouper/rows_per_group")] == expected
        if trainer.accelerator.is_main_process:
            reason = "too wide on one process" if trainer_class is OneDeclines else "a hook on"
            assert sum("share nothing with each other" in line and reason in line for line in said) == 1, said


class ScoresLess(PrefixGrouperGRPOTrainer):
    """A loss of the user's own that scores other rows than those of its micro-batch."""

    loss_is_sum_over_rows = True

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        mask = inputs["completion_mask"].clone()
        mask[:, 3:] = 0
        return super()._compute_loss(model, {**inputs, "completion_mask": mask})


class Changes(TrainerCallback):
    """Changes a shard of one process between micro-batches, in a way that autograd does not count."""

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.data.to_local().mul_(1.1)


class Interrupts(TrainerCallback):
    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def stops(path: str) -> None:
    """On all processes that planned, with the setting that helps."""
    settings: dict[str, Any] = {**REUSE, **sizes_of(1, 4, 4), "max_steps": 1}
    with pytest.raises(RuntimeError, match=r"scores other rows than those of its micro-batch.*regroup='none'"):
        train_sharded(path, shared=True, trainer_class=ScoresLess, **settings)
    with sharding():
        trainer = make_trainer(path, shared=True, **FSDP2, **settings)
        trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
        trainer.add_callback(Changes())
        with pytest.raises(RuntimeError, match=r"the weight .*up_proj.weight has changed: make such changes between"):
            trainer.train()
        trainer = make_trainer(path, shared=True, **FSDP2, **settings)
        trainer.loss_is_sum_over_rows = True  # an `on_substep_end` keeps rows apart otherwise
        trainer.add_callback(Interrupts())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        with pytest.raises(RuntimeError, match="FSDP keeps the gradients of a training that was stopped inside an"):
            trainer.train()


MODES: dict[str, Callable[[str], None]] = {
    "sharded": trains_sharded,
    "open prompts": lambda path: reuses_prompts(
        path, **sizes_of(1, 8, 8), is_matched=True, loss_type="dapo", beta=0.04
    ),
    "two groups in a micro-batch": lambda path: reuses_prompts(
        path, **sizes_of(4, 3, 6), num_iterations=2, gradient_checkpointing=False
    ),
    "rows ahead": lambda path: reuses_prompts(
        path, **sizes_of(2, 4, 8), rows_ahead=True, loss_type="grpo", lora=True, beta=0.04
    ),
    "verified": lambda path: reuses_prompts(path, **sizes_of(2, 4, 8), prefix_grouper_verify="1", max_steps=2),
    "where one may not, none does": where_one_may_not_none_does,
    "stops": stops,
}
