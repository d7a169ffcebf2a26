"""Groups with images that are larger than a micro-batch: the prompt and the vision tower once, and the stock gradients."""

from __future__ import annotations

import pytest
import torch
import trl.trainer.utils as trl_utils

from prefix_grouper_plugins import enable_prefix_grouper
from prefix_grouper_plugins.batch import blocks_on_host
from prefix_grouper_plugins.integrations.trl.forward import PackedForward, Rows
from prefix_grouper_plugins.integrations.trl.images import DummyImageRow, RowsOfImages, given_of
from prefix_grouper_plugins.integrations.trl.last_forward import row_besides
from prefix_grouper_plugins.integrations.trl.reuse import PromptReuse, blocks_of
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling.images import TOKEN_TENSORS
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MULTIMODAL_TYPES
from prefix_grouper_plugins.token_budget import RowTokens
from tests import tiny
from tests.integrations.trl import vision
from tests.integrations.trl.stub_trainer import stub_trainer
from tests.integrations.trl.test_images import compare, settings
from tests.integrations.trl.training import logged, use_float64_head
from tests.modeling import multimodal_families as families
from tests.modeling.test_images import gradients, vision_calls


def micro_batches_of(model_type, made):
    """As TRL buffers them: one row each."""
    blocks, tensors, counts, tiles = families.batch_inputs(model_type, made)
    kind = families.FAMILIES[model_type].token_tensor
    if kind:
        tensors[kind] = torch.nn.functional.pad(tensors[kind], (0, blocks[2].shape[1]))
    more = {} if tiles is None else {"num_tiles": tiles}
    whole = RowsOfImages({**tensors, "num_images": counts, **more}, len(made))
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    found = []
    for i, row in enumerate(made):
        own = {name: block[i : i + 1] for name, block in zip(names, blocks, strict=True)}
        shown = whole[i : i + 1].arguments()
        if (
            not row.images
        ):  # what is left of the images of a batch; a row of Idefics is padded to the most images of a row
            rows = slice(i, i + 1) if "pixel_attention_mask" in tensors else slice(0)
            shown |= {name: tensor[rows] for name, tensor in tensors.items() if name not in TOKEN_TENSORS}
        found.append({**own, **shown})
    return found


def stock_rows(model, micro_batches):
    """Log-probs of each row's completion from an ordinary forward of the padded row."""
    scores = []
    for batch in micro_batches:
        prompts, prompt_mask, completions, mask = blocks_of(batch)
        shown = {name: x for name, x in given_of(batch).items() if not name.startswith("num_")}
        if not batch["num_images"][0]:
            shown = {name: x for name, x in shown.items() if name in TOKEN_TENSORS}
        ids = torch.cat([prompts, completions], dim=1)
        logits = model(
            input_ids=ids, attention_mask=torch.cat([prompt_mask, mask], dim=1), use_cache=False, **shown
        ).logits
        logps = logits[0, prompts.shape[1] - 1 : -1].log_softmax(-1).gather(-1, completions[0, :, None])[:, 0]
        scores.append(logps[: int(mask.sum())])
    return scores


def run_step(model, micro_batches):
    """Log-probs of each row, computed as TRL's loss does it, and the gradients of all micro-batches."""
    trainer = stub_trainer(model, len(micro_batches), 2)
    reuse, scores, counts = PromptReuse(trainer, PackedForward(trainer)), [], []
    for number, batch in enumerate(micro_batches):
        trainer.accelerator.sync_gradients = number == len(micro_batches) - 1
        reuse.enter(micro_batches, number)
        blocks = blocks_of(batch)
        ids, mask = (torch.cat([blocks[i], blocks[i + 2]], dim=1) for i in (0, 1))
        rows = Rows(ids, mask, blocks[2].shape[1], RowsOfImages(given_of(batch), 1))
        found = reuse.score_update(model, rows, entropy=False)
        if found is None:
            found = trainer_forward(trainer, model, rows)
        (logps, _, _), count = found
        logps = logps[0, : int(blocks[3].sum())]
        ((number + 1) * torch.arange(1, len(logps) + 1) * logps).sum().backward()
        reuse.leave()
        scores.append(logps.detach())
        counts += count
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores, found, sum(counts, Counts())


def trainer_forward(trainer, model, rows):
    scores, counts = PackedForward(trainer).score(model, rows, entropy=False, aux_loss=False)
    return scores, [counts]


def assert_reuse_equals_rows(monkeypatch, model_type, freeze=False, tolerance=1e-10):
    """Two groups of equal ids and different images, one of several images, one without; rows side by side."""
    if tolerance < 1e-6:
        use_float64_head(monkeypatch)
    # Their forwards do not scale logits, and TRL's head does.
    text = {"logit_scale": 1.0} if model_type in ("aya_vision", "cohere2_vision") else {}
    model = families.build(model_type, **text)
    tiny.compute_norms_in_input_dtype(model)
    families.compute_vision_rotary_in_input_dtype(monkeypatch, model)
    model.requires_grad_(not freeze)
    for name, parameter in model.named_parameters():
        if freeze and any(tower in name for tower in ("visual", "vision_tower")):
            parameter.requires_grad_()
    made = families.rows(model_type)
    made = [row for pair in zip(made[:4], made[4:], strict=True) for row in pair]
    if freeze:
        made = [row for row in made if row.images]
    batches = micro_batches_of(model_type, made)
    expected = stock_rows(model, batches)
    wanted = gradients(model, expected)
    model.zero_grad()
    if hasattr(trl_utils, "add_fused_lm_head"):
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    enable_prefix_grouper(model, self_check=False)
    run = {}
    seen = vision_calls(model, lambda: run.update(zip("sgc", run_step(model.train(), batches), strict=True)))
    for got, row in zip(run["s"], expected, strict=True):
        torch.testing.assert_close(got, row.detach(), rtol=tolerance, atol=tolerance, check_dtype=False)
    assert run["g"].keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, value in wanted.items():
        assert (run["g"][name] - value).abs().max() <= tolerance * largest, name
    assert run["c"].rows == len(made) and run["c"].groups == len(made) // 2
    return seen


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_with_images_is_reused_with_the_gradients_of_single_rows(monkeypatch, model_type):
    seen = assert_reuse_equals_rows(monkeypatch, model_type)
    assert len(seen) == 3, "each prompt with images once"


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", sorted(VERIFIED_MULTIMODAL_TYPES))
def test_prompts_with_images_of_each_model_type_are_reused(monkeypatch, model_type):
    assert_reuse_equals_rows(monkeypatch, model_type, tolerance=1e-4)


def test_where_the_vision_tower_learns_alone_its_gradient_comes_from_all_parts(monkeypatch):
    """The keys of a part do not depend on what learns, those of the prompt do."""
    assert_reuse_equals_rows(monkeypatch, "qwen2_5_vl", freeze=True)


def test_micro_batches_of_one_row_learn_the_stock_weights_and_see_images_once(monkeypatch, tmp_path):
    path = vision.saved_model(tmp_path, "qwen3_vl")
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 1}
    stock, trainer = compare(monkeypatch, path, **settings("qwen3_vl", **sizes))
    assert not trainer.sharing.fallbacks and not trainer.limits()
    assert logged(trainer, "prefix_grouper/rows_per_group") == [4]
    assert sum(trainer.seen) == sum(stock.seen) / 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"pixel_values_videos": torch.zeros(1)}, "`pixel_values_videos` belongs to rows with videos"),
        ({"token_type_ids": torch.zeros(1, 30)}, "some bring other tensors of images than others"),
    ],
)
def test_micro_batches_whose_images_cannot_be_packed_stay_apart_and_say_so(more, reason):
    model = families.build("llava")
    batches = micro_batches_of("llava", families.rows("llava"))
    batches[1] |= more
    trainer, said = stub_trainer(model, len(batches), 2), []
    trainer.gate.warn = said.append
    reuse = PromptReuse(trainer, PackedForward(trainer))
    for number in (0, 1):
        reuse.enter(batches, number)
        assert reuse.score_update(model, None, entropy=False) is None
    assert len(said) == 1 and reason in said[0]


def of_two_processes(model, batches):
    """A stub as DDP's trainers are, whose generation batch is ``batches``; and what it says."""
    trainer, said = stub_trainer(model, len(batches), 2), []
    trainer.accelerator.num_processes, trainer.gate.warn = 2, said.append
    trainer.dummy_image_row = DummyImageRow(enabled=True, warn=False)
    trainer.dummy_image_row.choose(model, batches)
    return trainer, said


def test_with_several_processes_micro_batches_stay_apart_where_no_row_can_lend_its_image():
    model = families.build("llava")
    batches = micro_batches_of("llava", [row for row in families.rows("llava") if row.images])
    for batch in batches:
        batch["completion_ids"][:, 0] = families.IMAGE
    trainer, said = of_two_processes(model, batches)
    reuse = PromptReuse(trainer, PackedForward(trainer))
    reuse.enter(batches, 0)
    assert not reuse.is_entered and said == [
        "micro-batches share nothing with each other: no row has its images in its prompt alone"
    ]


@pytest.mark.parametrize(("finds_unused", "reason"), [(None, "set ddp_find_unused_parameters=False"), (False, None)])
def test_experts_that_a_dummy_image_does_not_meet_are_not_taken_for_unused(finds_unused, reason):
    model = families.build("qwen3_vl_moe")
    trainer, _ = of_two_processes(model, micro_batches_of("qwen3_vl_moe", families.rows("qwen3_vl_moe")))
    trainer.args.ddp_find_unused_parameters = finds_unused
    found = PromptReuse(trainer, PackedForward(trainer)).why_not(model)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_dummy_image_by_itself_is_forwarded_as_a_row(model_type):
    model = families.build(model_type)
    enable_prefix_grouper(model, self_check=False)
    if hasattr(trl_utils, "add_fused_lm_head"):
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    batches = micro_batches_of(model_type, families.rows(model_type))
    trainer, _ = of_two_processes(model, batches)
    blocks, images = trainer.dummy_image_row.alone(torch.device("cpu"))
    rows = Rows.of_blocks(blocks, blocks_on_host(*blocks), images)
    seen = vision_calls(model, lambda: PackedForward(trainer).nothing_to_score(model, rows, entropy=False))
    assert len(seen) == 1 and len(rows) == 1
    shortest = min(int(batch["prompt_mask"].sum()) for batch in batches if batch["num_images"][0])
    assert rows.input_ids.shape[1] <= shortest + 1, "the image alone, and not the whole prompt"


@pytest.mark.parametrize(
    ("finds_unused", "window", "own", "ahead", "expected"),
    [
        (False, [0], [0], False, "image"),  # DDP waits for the tower whatever the rows of the step show
        (False, [1], [1], False, None),
        (False, [1], [1], True, "image"),
        (True, [1, 0], [0], False, "image"),
        (True, [1, 0], [0], True, "image"),
        (True, [0], [0], False, None),  # the tower stays without a gradient, as in the stock trainer
        (True, [0], [0], True, "rows"),
    ],
)
def test_what_the_last_forward_under_ddp_takes_besides(finds_unused, window, own, ahead, expected):
    model = families.build("llava")
    batches = micro_batches_of("llava", families.rows("llava"))
    trainer, _ = of_two_processes(model, batches)
    model.find_unused_parameters = finds_unused
    blocks = blocks_of(batches[0])
    rows = Rows.of_blocks(blocks, blocks_on_host(*blocks))
    of_window, of_own = ([RowTokens(object(), 3, 2, images=shown) for shown in images] for images in (window, own))
    found = row_besides(model, rows, of_own, of_window, trainer.dummy_image_row, ahead=ahead)
    kind = None if found is None else "rows" if found is rows else "image" if found.images.images[0] else "other"
    assert kind == expected
