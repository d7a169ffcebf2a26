"""What goes wrong in a training goes as it does in the stock trainer, or better."""

from __future__ import annotations

import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.integrations.trl.training import largest_difference, logged, make_trainer, train, trained_weights

SIZES: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1, "beta": 0.0}
SAVING: dict[str, Any] = {**SIZES, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("qwen"), "qwen3")


def outcome(path: str, shared: bool, **settings: Any) -> tuple[Any, Any]:
    """The error that a training ends with, by type and text, or the weights that it has learned; and the trainer."""
    own_reward, trainer = settings.pop("reward", None), None
    try:
        trainer = make_trainer(path, shared=shared, **{**SIZES, **settings})
        if own_reward is not None:
            trainer.reward_funcs = [own_reward]
        torch.manual_seed(5)
        trainer.train()
    except Exception as error:
        return (type(error), str(error)), trainer
    return trained_weights(trainer), trainer


def both(path: str, **settings: Any) -> tuple[Any, Any, Any]:
    """The outcome of a stock training and of a shared one, and the shared trainer."""
    stock, _ = outcome(path, False, **settings)
    shared, trainer = outcome(path, True, **settings)
    return stock, shared, trainer


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoints(qwen, tmp_path_factory):
    """By trainer, the folder of a training of two steps that saved each, and its weights."""
    found = {}
    for shared in (False, True):
        folder = tmp_path_factory.mktemp("stock" if not shared else "shared")
        found[shared] = folder, train(qwen, shared=shared, output_dir=folder, **SAVING)[0]
    return found


def resume(qwen: str, shared: bool, folder: Path, checkpoint: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(qwen, shared=shared, output_dir=folder, **SAVING)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trained_weights(trainer)


def test_stock_goes_on_from_our_checkpoint_and_we_from_stocks(qwen, checkpoints, tmp_path):
    learned = []
    for saved, resumed in ((True, False), (False, True), (False, False)):
        folder, weights = checkpoints[saved]
        assert largest_difference(weights, checkpoints[False][1]) < 1e-9
        copy = tmp_path / f"{saved} {resumed}"
        shutil.copytree(folder / "checkpoint-1", copy / "checkpoint-1")
        learned.append(resume(qwen, resumed, copy, str(copy / "checkpoint-1")))
    assert max(largest_difference(own, learned[-1]) for own in learned[:-1]) < 1e-9


@pytest.mark.parametrize(("damage", "how"), [("missing", True), ("cut off", "path")])
def test_a_kill_inside_of_a_save_is_told_from_a_whole_checkpoint(qwen, checkpoints, tmp_path, damage, how):
    run = tmp_path / "run"
    shutil.copytree(checkpoints[True][0], run)
    last = run / "checkpoint-2" / "trainer_state.json"
    text = last.read_text()
    last.unlink() if damage == "missing" else last.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"checkpoint-2 was not written to its end .*: resume from .*checkpoint-1$"):
        resume(qwen, True, run, how if how is True else str(run / "checkpoint-2"))
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(ValueError, match="no other checkpoint there is complete: start from the beginning"):
        resume(qwen, True, run, True)


def test_where_there_is_no_checkpoint_the_error_is_that_of_transformers(qwen, tmp_path):
    for place in (True, str(tmp_path / "nowhere")):
        errors = []
        for shared in (False, True):
            with pytest.raises(Exception) as stopped:  # noqa: PT011
                resume(qwen, shared, tmp_path, place)
            errors.append((stopped.type, str(stopped.value)))
        assert errors[0] == errors[1]


@pytest.fixture
def full_disk():
    """No file grows beyond 20,000 bytes in here: the kernel refuses to write on, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_save_as_it_does_in_stock(qwen, tmp_path, full_disk):
    stock, shared, trainer = both(qwen, **{**SAVING, "output_dir": tmp_path / "run"})
    assert isinstance(stock, tuple) and stock[0] is shared[0], (stock, shared)
    assert "File too large" in shared[1] and "File too large" in stock[1]
    assert trainer.gate.reason is None
    with pytest.raises(ValueError, match="was not written to its end"):
        trainer.train(resume_from_checkpoint=True)


def test_a_folder_that_cannot_be_written_stops_as_it_does_in_stock(qwen):
    stock, shared, _ = both(qwen, **{**SAVING, "output_dir": "/proc/prefix-grouper"})
    assert isinstance(stock, tuple) and stock == shared


# ------------------------------------------------------------------------------------------------------------- the data


def test_a_reward_that_raises_stops_as_in_stock_and_the_trainer_can_go_on(qwen):
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no reward today")

    stock, shared, trainer = both(qwen, reward=broken)
    assert stock == shared == (RuntimeError, "no reward today")
    trainer.reward_funcs = [lambda completions, **_: [float(len(text)) for text in completions]]
    before = trained_weights(trainer)
    trainer.train()
    assert largest_difference(before, trained_weights(trainer)) > 0 and trainer.sharing.packed > 0


def test_rewards_that_are_no_numbers_do_what_they_do_in_stock(qwen):
    def some(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [math.nan if i == 1 else float(sum(ids) % 7) for i, ids in enumerate(completion_ids)]

    stock, shared, trainer = both(qwen, reward=some)
    assert trainer.sharing.packed > 0
    assert all(
        torch.allclose(shared[name], weight, rtol=0, atol=1e-9, equal_nan=True) for name, weight in stock.items()
    )


ENDS_AT_ONCE = {"suppress_tokens": [i for i in range(len(tiny.WORDS)) if i != 1]}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "nothing but the end": {"generation_kwargs": ENDS_AT_ONCE},
    "one token": {"max_completion_length": 1},
    "all truncated and masked": {"generation_kwargs": {"suppress_tokens": [1]}, "mask_truncated_completions": True},
}


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_empty_and_truncated_completions_give_the_stock_weights(qwen, kind):
    stock, shared, trainer = both(qwen, **COMPLETIONS[kind])
    assert not isinstance(stock, tuple), stock
    assert largest_difference(stock, shared) < 1e-9
    assert logged(trainer, "prefix_grouper/fallbacks") == [0]


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_prompts_beyond_the_models_length_do_what_they_do_in_stock(model_type, tmp_path):
    """Rotary positions go on; learned ones end, and generation stops before anything is forwarded by us."""
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if model_type == "gpt2" else {}
    path = tiny.saved_model(tmp_path, model_type, max_position_embeddings=16, **no_dropout)
    stock, shared, trainer = both(path, train_dataset=tiny.prompts(8, shortest=20, longest=30))
    if model_type == "gpt2":
        assert isinstance(stock, tuple) and stock == shared
    else:
        assert largest_difference(stock, shared) < 1e-9 and trainer.sharing.packed > 0
