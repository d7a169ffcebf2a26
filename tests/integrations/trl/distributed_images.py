"""Prompts with images that are reused on two processes, part of distributed_training.py.

The stock trainer hands the model a tensor of no images where a micro-batch has none, at which the model stops. Here it takes
it away first. Without the vision tower in a micro-batch, DDP has to look for unused parameters; the shared trainer need not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOTrainer
from prefix_grouper_plugins.integrations.trl.forward import PackedForward
from prefix_grouper_plugins.metrics import Counts
from tests.integrations.trl import vision
from tests.integrations.trl.training import largest_difference, train
from tests.modeling import multimodal_families as families

FAMILIES = ("llava", "qwen2_5_vl")  # the first has parameters that get no gradient from anything
ONE_ROW: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_generations": 4}
TWO_ROWS: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 4}
# By mode: the family, which prompts have images (i) and which have none (t), in turns, and settings. The two processes take
# two prompts each from a generation batch of four, and with twice the steps_per_generation four of eight.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "images in every row": ("qwen2_5_vl", "i", {**ONE_ROW, "ddp_find_unused_parameters": False}),
    "images in half of the rows": ("qwen2_5_vl", "it", {**ONE_ROW, "ddp_find_unused_parameters": False}),
    "images on one process": ("llava", "iitt", ONE_ROW),
    "images in forwards ahead": ("llava", "it", {**TWO_ROWS, "prefix_grouper_verify": "1"}),
    "images in some optimizer steps": ("qwen2_5_vl", "tttttttti", {**ONE_ROW, "steps_per_generation": 16}),
    "images and LoRA": ("llava", "it", {**ONE_ROW, "lora": True}),
}


def save_models(folder: Path) -> None:
    for family in FAMILIES:
        vision.saved_model(folder / family, family)


def prompts(pattern: str, count: int = 24) -> Dataset:
    shown = iter([*vision.prompts(count)] * 2)
    without = iter([*vision.prompts(count, mixed=True).filter(lambda row: not row["images"])] * count)
    kinds = (pattern * count)[:count]
    return Dataset.from_list([next(shown if kind == "i" else without) for kind in kinds])


class SkipsEmptyImages(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        hook = model.register_forward_pre_hook(without_empty_images, with_kwargs=True, prepend=True)
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            hook.remove()


def without_empty_images(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if len(kwargs.get("pixel_values", "some")) == 0:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("pixel_values", "image_grid_thw")}
    return args, kwargs


class Counting(PrefixGrouperGRPOTrainer):
    """Counts tokens of whole groups, in which the rows of a generation batch lie."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.expected = Counts()

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        prompts, completions = (output[name].sum(1).tolist() for name in ("prompt_mask", "completion_mask"))
        of_groups = sum(prompt - 1 for prompt in prompts[:: self.num_generations]) + sum(completions)
        self.expected += Counts(tokens_forwarded=of_groups, row_tokens=sum(prompts) + sum(completions))
        return output


def trains_with_images(models: Path, mode: str) -> None:
    family, pattern, more = CASES[mode]
    settings = {
        "processing_class": vision.processor(family),
        "train_dataset": prompts(pattern),
        "max_steps": 4,
        "max_completion_length": 6,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,  # which a parameter without a gradient does not get
        "beta": 0.04,
        "shuffle_dataset": False,
        "log_multimodal": False,  # TRL would wait for images of both processes
        "generation_kwargs": {"suppress_tokens": [vision.families.IMAGE]},
        "prefix_grouper_share": "prompt",
        "ddp_find_unused_parameters": True,
        **more,
    }
    path, besides = str(models / family), []
    stock_settings = {**settings, "ddp_find_unused_parameters": True}
    with pytest.MonkeyPatch.context() as patch:
        families.compute_vision_rotary_in_input_dtype(patch, families.build(family))
        if "steps_per_generation" in more:  # or the rows of a group would come to both optimizer steps
            patch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
        stock, _ = train(path, shared=False, trainer_class=SkipsEmptyImages, **stock_settings)
        forward = PackedForward.nothing_to_score

        def counted(self: PackedForward, *args: Any, **kwargs: Any) -> Any:
            found = forward(self, *args, **kwargs)
            if not self._trainer.verification.runs:
                besides.append(found[1].tokens_forwarded)
            return found

        patch.setattr(PackedForward, "nothing_to_score", counted)
        shared, trainer = train(path, shared=True, trainer_class=Counting, **settings)
    difference = largest_difference(stock, shared)
    assert difference <= 1e-12, difference
    assert not trainer.sharing.fallbacks and not trainer.limits(), (trainer.sharing.fallbacks, trainer.limits())
    assert len(besides) <= trainer.state.global_step, besides
    if mode == "images in forwards ahead":
        assert besides
    counts, expected = trainer.sharing.update, trainer.expected
    assert counts.tokens_forwarded == expected.tokens_forwarded + sum(besides), (counts, expected, besides)
    assert counts.row_tokens == expected.row_tokens and counts.rows_per_group == 4, (counts, expected)
