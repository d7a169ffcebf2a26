"""Training with images: the stock trainer's weights, and the images of a group seen once."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from prefix_grouper_plugins.integrations.trl import (
    PrefixGrouperGRPOTrainer,
    PrefixGrouperRLOOConfig,
    PrefixGrouperRLOOTrainer,
)
from prefix_grouper_plugins.integrations.trl.regroup import regroup
from tests.integrations.trl import vision
from tests.integrations.trl.training import (
    TRL,
    largest_difference,
    logged,
    make_trainer,
    skip_before,
    train,
    use_float64_head,
)

TOWERS = ("visual", "vision_tower", "vision_model")
GROUPED = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 3,
    "max_completion_length": 6,
    "beta": 0.04,
    # The gradient of a key bias is zero but for rounding, which Adam would blow up to its step size.
    "adam_epsilon": 1e-6,
    "generation_kwargs": {"suppress_tokens": [vision.families.IMAGE]},
}


def settings(model_type, mixed=False, **more):
    # Without a grid of each image, older releases take as many images from a batch as it has rows.
    has_grid = vision.IMAGES[model_type] is vision.IMAGES["qwen2_vl"]
    most = 2 if has_grid or Version("1.14.2") <= TRL else 1
    return {
        **GROUPED,
        "processing_class": vision.processor(model_type),
        "train_dataset": vision.prompts(mixed=mixed, most=most),
        **more,
    }


class SeesTheTower:
    """Notes what the vision tower is called with while log-probs are computed: patches, tiles or images."""

    loss_is_sum_over_rows = True  # code in front of the shared method could be anything, so it has to say so

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.scores = [], False
        for model in filter(None, (self.model, self.ref_model)):
            tower = next(m for name, m in model.named_modules() if name.endswith(TOWERS))
            tower.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if self.scores:
            self.seen.append(len(args[0] if args else kwargs["pixel_values"]))

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        self.scores = True
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            self.scores = False


STOCK, SHARED = (type("Trainer", (SeesTheTower, base), {}) for base in (GRPOTrainer, PrefixGrouperGRPOTrainer))


def compare(monkeypatch, path, **given):
    """Train both; the stock trainer and the shared one."""
    use_float64_head(monkeypatch)
    stock, stock_trainer = train(path, shared=False, trainer_class=STOCK, **given)
    shared, trainer = train(path, shared=True, trainer_class=SHARED, **given)
    assert logged(trainer, "reward") == logged(stock_trainer, "reward")
    # Rotary angles and some norms are computed in float32.
    assert largest_difference(stock, shared) <= 1e-6
    initial = dict(make_trainer(path, shared=False, **given).model.named_parameters())
    moved = [name for name in stock if (stock[name] - initial[name]).abs().max() > 1e-5]
    assert any(tower in name for name in moved for tower in TOWERS), "the vision tower did not learn"
    return stock_trainer, trainer


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_training_with_images_gives_the_stock_weights(monkeypatch, tmp_path, model_type):
    path = vision.saved_model(tmp_path, model_type)
    stock, trainer = compare(monkeypatch, path, **settings(model_type))
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.rows_per_group == 4
    assert len(trainer.seen) == len(stock.seen)
    assert sum(trainer.seen) == sum(stock.seen) / 4, "images of a group are seen once"


def test_several_images_of_a_row_stop_where_the_stock_trainer_loses_images(monkeypatch, tmp_path):
    """TRL's shuffle of a batch of rows takes as many images, and the others are gone."""
    if Version("1.14.2") <= TRL:
        pytest.skip(f"TRL {TRL} splits images by row")
    path = vision.saved_model(tmp_path, "llava")
    for shared in (False, True):
        trainer = make_trainer(path, shared=shared, **settings("llava", train_dataset=vision.prompts()))
        with pytest.raises(ValueError, match="do not match"):
            trainer.train()


def test_rows_with_and_without_images_share_too(monkeypatch, tmp_path):
    path = vision.saved_model(tmp_path, "qwen2_5_vl")
    # Old log-probs are scored before the shuffle, in chunks; prompts are scattered after it.
    # Whole micro-batches without images fail in the stock trainer, so they are large here.
    more = {"num_iterations": 2, "gradient_checkpointing": True, "beta": 0.0, "per_device_train_batch_size": 16}
    _, trainer = compare(monkeypatch, path, **settings("qwen2_5_vl", mixed=True, **more))
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.rows_per_group >= 4  # more where two prompts without images are equal


MORE = {
    "LoRA": ("llava", {"lora": True}),
    "recurrent layers": ("qwen3_5", {"optim": "sgd"}),
    "router loss": (
        "qwen3_vl_moe",
        {
            # As in test_moe: routers compute in float32.
            "optim": "sgd",
            "learning_rate": 0.05,
            "router_aux_loss_coef": 0.5,
            "model_init_kwargs": {"dtype": torch.float64, "experts_implementation": "eager"},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_ways_to_train_with_images_give_the_stock_weights(monkeypatch, tmp_path, name):
    model_type, more = MORE[name]
    if "router_aux_loss_coef" in more:
        skip_before("1.7", "has no router loss in GRPO")
    path = vision.saved_model(tmp_path, model_type)
    stock, trainer = compare(monkeypatch, path, **settings(model_type, **more))
    assert logged(trainer, "aux_loss") == pytest.approx(logged(stock, "aux_loss"), rel=1e-6)
    assert not trainer.sharing.fallbacks
    assert trainer.sharing.rows_per_group > 2


def test_rloo_with_images_gives_the_stock_weights(monkeypatch, tmp_path):
    path = vision.saved_model(tmp_path, "qwen3_vl")
    use_float64_head(monkeypatch)
    given = settings("qwen3_vl", max_steps=2)
    stock, _ = train(path, shared=False, trainer_class=RLOOTrainer, config_class=RLOOConfig, **given)
    shared, trainer = train(
        path, shared=True, trainer_class=PrefixGrouperRLOOTrainer, config_class=PrefixGrouperRLOOConfig, **given
    )
    assert largest_difference(stock, shared) <= 1e-6
    assert trainer.sharing.rows_per_group == 4


def test_rows_of_one_text_and_several_images_meet_by_image():
    """Two prompts of equal ids, scattered over two micro-batches: each comes to stand in one of them."""
    rows = 8
    image = torch.arange(rows) % 2
    batch = {
        "prompt_ids": torch.full((rows, 3), 7),
        "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
        "completion_ids": torch.arange(rows)[:, None],
        "pixel_values": image.float().repeat_interleave(4)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 2]]).expand(rows, -1),
        "num_images": [1] * rows,
    }
    halves = [unsplit_pixel_values_by_grid(b) for b in split_tensor_dict(split_pixel_values_by_grid(batch), 2)]
    for half in regroup(halves, [range(2)]):
        assert len(half["pixel_values"].unique()) == 1
        assert torch.equal(half["completion_ids"][:, 0] % 2, half["pixel_values"][::4, 0].long())


def test_videos_fall_back_to_the_stock_method(monkeypatch, tmp_path):
    trainer = make_trainer(vision.saved_model(tmp_path, "qwen2_5_vl"), shared=True, **settings("qwen2_5_vl"))
    calls = []
    monkeypatch.setattr(
        GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, *args, **kwargs: calls.append(kwargs)
    )
    ids = torch.full((8, 6), 9)
    for name, given in (
        ("pixel_values_videos", {"pixel_values_videos": torch.zeros(8, 3)}),
        ("pixel_values", {"pixel_values": torch.zeros(8, 3)}),
    ):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3, **given)
        assert name in calls[-1]
    assert list(trainer.sharing.fallbacks) == [
        "`pixel_values_videos` belongs to rows with videos, which are not packed",
        "`pixel_values` came without `num_images`, so it is not known which row an image belongs to",
    ]


def score(trainer, model_type, made):
    blocks, tensors, counts, tiles = vision.families.batch_inputs(model_type, made)
    kind = vision.families.FAMILIES[model_type].token_tensor
    if kind:
        tensors[kind] = torch.nn.functional.pad(tensors[kind], (0, blocks[2].shape[1]))
    if tiles is not None:
        tensors["num_tiles"] = tiles
    ids, mask = (torch.cat([blocks[i], blocks[i + 2]], dim=1) for i in (0, 1))
    tensors["pixel_values"] = tensors["pixel_values"].to(next(trainer.model.parameters()).dtype)
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, blocks[2].shape[1], num_images=counts, **tensors
    )[0]


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_rows_whose_placeholders_do_not_fit_their_images_stop_as_in_the_stock_trainer(tmp_path, model_type):
    """A placeholder is lost in both rows of a group and sampled in one row of another, so the totals of a packed row fit."""
    path = vision.saved_model(tmp_path, model_type)
    made = vision.families.rows(model_type)
    lost, other = made[0], made[1]
    for row in made:
        if row.images and row.images[0] is lost.images[0]:
            row.prompt = row.prompt[int((row.prompt == vision.families.IMAGE).nonzero()[0]) + 1 :]
    other.response = torch.cat([torch.tensor([vision.families.IMAGE]), other.response])
    for shared in (False, True):
        trainer = make_trainer(path, shared=shared, **settings(model_type))
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            score(trainer, model_type, made)


def test_a_micro_batch_without_completions_runs_the_vision_tower(tmp_path):
    trainer = make_trainer(vision.saved_model(tmp_path, "qwen2_5_vl"), shared=True, **settings("qwen2_5_vl"))
    blocks, tensors, counts, _ = vision.families.batch_inputs("qwen2_5_vl", vision.families.rows("qwen2_5_vl"))
    ids = torch.cat([blocks[0], blocks[2]], dim=1)
    mask = torch.cat([blocks[1], blocks[3] * 0], dim=1)
    tensors["mm_token_type_ids"] = (ids == vision.families.IMAGE).int() * mask.int()
    logps = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, blocks[2].shape[1], batch_size=4, num_images=counts, **tensors
    )[0]
    assert not logps.any()
    logps.sum().backward()
    assert next(p for name, p in trainer.model.named_parameters() if "visual" in name).grad is not None
    assert not trainer.sharing.fallbacks and trainer.sharing.packed == len(ids) // 4
