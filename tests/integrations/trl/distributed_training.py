"""Run by torchrun from test_distributed.py: trains stock and shared in the same processes and compares the weights.

    python -m tests.integrations.trl.distributed_training TEXT_MODEL MODELS_WITH_IMAGES MODE...

All modes run in the same processes, since each process takes seconds to import TRL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from transformers import Qwen3ForCausalLM
from trl import GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer, forward, reuse
from prefix_grouper_plugins.integrations.trl.forward import PackedForward
from tests import tiny
from tests.integrations.trl import distributed_images, sharded_training, vision
from tests.integrations.trl.training import largest_difference, logged, train, use_float64_head
from tests.logs import messages

MODE, EQUAL = "## mode: ", "both ranks have learned the stock weights"  # before and after what a mode writes to stderr
SHARDED = "FSDP2: "
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
REUSE: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_generations": 6}
# A group, that of both micro-batches, in the forward of the first: that in which gradients are synchronised has none.
AHEAD: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "train_dataset": tiny.prompts(shortest=40, longest=40),
}


def text(mode: str) -> dict[str, Any]:
    if "/" in mode:  # batch size, accumulation steps, group
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
        return {**dict(zip(names, map(int, mode.split("/")), strict=True)), "beta": 0.04}
    checkpointing = mode == "checkpointing"
    sizes = {"full": SETTINGS, "checkpointing": SETTINGS, "rows ahead": AHEAD}.get(mode, REUSE)
    return {**sizes, "beta": 0.04, "lora": checkpointing, "gradient_checkpointing": checkpointing}


def images() -> dict[str, Any]:
    """Every second prompt of a process has no image, and DDP waits for the gradient of every parameter."""
    with_images, without = vision.prompts(24), vision.prompts(24, mixed=True).filter(lambda row: not row["images"])
    rows = [row for pair in zip(with_images, [*without] * 3, strict=False) for row in pair]
    return {
        **SETTINGS,
        "processing_class": vision.processor("qwen2_5_vl"),
        "train_dataset": Dataset.from_list(rows),
        "max_steps": 3,
        "max_completion_length": 6,
        "adam_epsilon": 1e-6,
        "shuffle_dataset": False,  # or a process may get no image at all, which stops the stock trainer too
        "ddp_find_unused_parameters": False,
        "generation_kwargs": {"suppress_tokens": [vision.families.IMAGE]},
    }


# One row fits into a forward beside the prompt, and rank 1 has half of the rows.
UNEQUAL: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_generations": 8,
    "train_dataset": tiny.prompts(shortest=25, longest=25),
    "generation_kwargs": {"min_new_tokens": 10},
}


def masking_rank_1(base: type) -> Any:
    """On rank 1 the first four completions are masked, as when they were truncated."""

    class Masking(base):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if self.accelerator.process_index == 1:
                output["completion_mask"][:4] = 0
            return output

    return Masking


def nothing_to_score(path: str) -> None:
    """Rank 1 forwards one token where rank 0 forwards its rows, and DDP waits for every parameter on both."""
    settings = {**SETTINGS, "beta": 0.04, "max_steps": 3, "ddp_find_unused_parameters": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
        trained = {
            shared: train(path, shared=shared, trainer_class=masking_rank_1(base), **settings)
            for shared, base in ((False, GRPOTrainer), (True, PrefixGrouperGRPOTrainer))
        }
    (stock, stock_trainer), (shared, trainer) = trained[False], trained[True]
    assert largest_difference(stock, shared) <= 1e-12
    assert logged(trainer, "entropy") == pytest.approx(logged(stock_trainer, "entropy"), abs=1e-12)
    assert logged(trainer, "prefix_grouper/fallbacks") == [0, 0, 0] and trainer.sharing.packed > 0


def unequal_parts(path: str) -> None:
    """Ranks make different numbers of forwards in an optimizer step, and DDP reduces gradients once in it.

    The prompt's layers run again in the backward: it counts 6 tokens of 35, so two rows of 10 go into a forward.
    """
    settings = {**UNEQUAL, "beta": 0.04, "max_steps": 3, "ddp_find_unused_parameters": False}
    settings["gradient_checkpointing"] = False
    stock, _ = train(path, shared=False, trainer_class=masking_rank_1(GRPOTrainer), **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "HAS_FUSED_HEAD", True)  # where TRL keeps logits, few rows go into a forward
        forwards = count_calls(patch, PackedForward, "_forward", if_=torch.is_grad_enabled)
        shared, trainer = train(path, shared=True, trainer_class=masking_rank_1(PrefixGrouperGRPOTrainer), **settings)
    of_both: list[int] = [0, 0]
    dist.all_gather_object(of_both, len(forwards))
    assert of_both == [(1 + 4) * 3, (1 + 2) * 3], "the prompt, and its rows"
    assert largest_difference(stock, shared) <= 1e-12
    assert not trainer.sharing.fallbacks


def unequal_pieces(path: str) -> None:
    """The last micro-batch makes two forwards on rank 0, an open prompt's and a whole group's, and often one on rank 1.

    DDP sends its buffers before each forward that follows one that synchronises gradients, so each rank makes one of these.
    """
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_generations": 2, "max_steps": 3}
    settings = {**UNEQUAL, **sizes}
    stock, _ = train(path, shared=False, trainer_class=masking_rank_1(GRPOTrainer), **settings)
    shared, trainer = train(path, shared=True, trainer_class=masking_rank_1(PrefixGrouperGRPOTrainer), **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert not trainer.sharing.fallbacks and trainer.sharing.rows_per_group == 2


def synchronizes_each_micro_batch(path: str) -> None:
    """Ranks whose completions differ in length would make different numbers of forwards between two reductions."""
    settings = {**UNEQUAL, "generation_kwargs": {}, "max_steps": 3}
    each = json.dumps({"gradient_accumulation_kwargs": {"sync_each_batch": True}})  # Trainer adds to what it is given
    stock, _ = train(path, shared=False, accelerator_config=json.loads(each), **settings)
    shared, trainer = train(path, shared=True, accelerator_config=json.loads(each), **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert trainer.sharing.rows_per_group == 1 and "under sync_each_batch=True" in " ".join(trainer.limits())


def falls_back_on_rank_1(path: str) -> None:
    """What one process alone does reaches the log of the run, and is told once."""

    class FallsBack(PrefixGrouperGRPOTrainer):
        def _why_not_share(self, *args: Any) -> str | None:
            return "rank 1 cannot" if self.accelerator.process_index == 1 else super()._why_not_share(*args)

    _, trainer = train(path, shared=True, trainer_class=FallsBack, max_steps=2, **SETTINGS)
    assert logged(trainer, "prefix_grouper/fallbacks") == [0.5, 0.5]
    assert all(1.3 < mean < 2 for mean in logged(trainer, "prefix_grouper/rows_per_group")), "of both: 4 and 1 rows"


def packs_on_rank_0_alone(path: str) -> None:
    """Whether packing pays is decided by the rows of a process; its forwards are as many either way."""
    settings = {**SETTINGS, "loss_type": "bnpo", "max_steps": 2, "ddp_find_unused_parameters": False}  # rows stay
    stock, _ = train(path, shared=False, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "pays_to_pack", lambda *sizes: dist.get_rank() == 0)
        shared, trainer = train(path, shared=True, **settings)
    assert largest_difference(stock, shared) <= 1e-12
    assert bool(trainer.sharing.packed) == (dist.get_rank() == 0) and not trainer.sharing.fallbacks


def compares_the_first_batch_on_both_ranks(path: str) -> None:
    """A class that no test has compared, whose first rows on rank 1 take the stock path: rank 0 would wait for it."""
    own = type("OwnQwen3", (Qwen3ForCausalLM,), {})

    class FallsBackAtFirst(PrefixGrouperGRPOTrainer):
        calls = 0
        runs_out_of_memory = False

        def _scores(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
            if self.runs_out_of_memory and self.verification.runs and self.accelerator.process_index == 1:
                raise torch.OutOfMemoryError
            return super()._scores(*args)

        def _why_not_share(self, *args: Any) -> str | None:
            self.calls += 1
            falls_back = self.accelerator.process_index == 1 and self.calls == 1
            return "rank 1 cannot" if falls_back else super()._why_not_share(*args)

    with messages() as said:
        for iterations in (1, 2):  # the update comes first, and the log-probs of the old policy
            said.clear()
            model = own.from_pretrained(path, dtype=torch.float64)
            settings = {**SETTINGS, "num_iterations": iterations, "model_init_kwargs": None}
            _, trainer = train(model, shared=True, trainer_class=FallsBackAtFirst, max_steps=2, **settings)
            compared = [line for line in said if "the first batch of OwnQwen3" in line]
            assert len(compared) == (iterations if trainer.accelerator.is_main_process else 0), said
            assert trainer.gate.reason is None and trainer.sharing.packed > 0
        for out_of_memory in (False, True):  # on one rank, which has to stay with the other one
            said.clear()
            FallsBackAtFirst.runs_out_of_memory = out_of_memory
            train(path, shared=True, trainer_class=FallsBackAtFirst, max_steps=1, prefix_grouper_verify="1", **SETTINGS)
            if trainer.accelerator.is_main_process:
                expected = (
                    "could not be compared: another process could not" if out_of_memory else "prefix grouper: verified "
                )
                assert [expected in line for line in said if "first micro-batch of optimizer" in line] == [True], said


def count_calls(
    patch: pytest.MonkeyPatch, owner: type, name: str, if_: Callable[[], bool] = lambda: True
) -> list[None]:
    """A list that gets an entry for each call of a method, while ``if_`` holds."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.extend([None] * if_())
        return method(*args, **kwargs)

    patch.setattr(owner, name, counted)
    return calls


def both_train(path: str, mode: str) -> None:
    settings = images() if mode == "images" else text(mode)
    stock, _ = train(path, shared=False, **settings)
    with pytest.MonkeyPatch.context() as patch:
        if mode == "rows ahead":
            patch.setattr(reuse, "HAS_FUSED_HEAD", True)  # where TRL keeps logits, few rows go ahead
        single_tokens = count_calls(patch, PackedForward, "nothing_to_score")
        shared, trainer = train(path, shared=True, **settings)
    assert trainer.accelerator.num_processes == 2
    steps = trainer.state.global_step  # where rows were forwarded ahead, DDP sees one token in the last micro-batch
    # Where prompts are long enough, and where a last micro-batch has no images.
    joins = "/" in mode or mode in ("groups over several micro-batches", "images")
    allowed = {steps} if mode == "rows ahead" else set(range(steps + 1)) if joins else {0}
    assert len(single_tokens) in allowed, (mode, len(single_tokens))
    assert trainer.sharing.rows_per_group == settings["num_generations"], trainer.sharing.rows_per_group
    difference = largest_difference(stock, shared)
    assert difference <= (1e-6 if mode == "images" else 1e-12), difference  # rotary angles are computed in float32
    assert not trainer.sharing.fallbacks, trainer.sharing.fallbacks


def say(text: str) -> None:
    """Once, to stderr, after all that both processes wrote before and before all that they write from now on."""
    dist.barrier()
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)
    dist.barrier()


def main() -> None:
    faulthandler.dump_traceback_later(300, repeat=True)  # where a rank waits for the other one; gloo ends that
    path, folder, *modes = sys.argv[1:]
    with_images = Path(folder)
    use_float64_head(pytest.MonkeyPatch())
    PartialState()  # starts the group
    for mode in modes:
        say(f"{MODE}{mode}")
        if mode == "unequal parts":
            unequal_parts(path)
        elif mode == "unequal pieces":
            unequal_pieces(path)
        elif mode == "synchronizes each":
            synchronizes_each_micro_batch(path)
        elif mode in distributed_images.CASES:
            distributed_images.trains_with_images(with_images, mode)
        elif mode.startswith(SHARDED):
            sharded_training.MODES[mode.removeprefix(SHARDED)](path)
        elif mode == "one process":
            nothing_to_score(path)
            falls_back_on_rank_1(path)
            packs_on_rank_0_alone(path)
            compares_the_first_batch_on_both_ranks(path)
        else:
            both_train(str(with_images / "qwen2_5_vl") if mode == "images" else path, mode)
        say(EQUAL)


if __name__ == "__main__":
    main()
    # All is checked. Gloo's threads now and then abort an interpreter that is torn down while another rank still talks.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
