"""Several threads with one model: each gets its own result."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from prefix_grouper_plugins import enable_prefix_grouper, prefix_grouped_logps
from prefix_grouper_plugins.modeling import is_enabled, without_prefix_grouper
from tests import tiny
from tests.modeling import families

CALLS, BATCHES = 12, 4


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def batch(seed: int) -> list[Tensor]:
    """Two prompts, four completions: the same shapes and prompts for every seed, other completions."""
    prompts = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    completions = torch.randint(3, 24, (4, 6), generator=torch.Generator().manual_seed(seed))
    return [prompts, torch.ones_like(prompts), completions, torch.ones_like(completions)]


def in_threads(*works: Callable[[], None]) -> list[BaseException]:
    """Run all at once; what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "mamba2", "qwen3_5_text", "falcon"])
def test_scores_of_two_threads_and_ordinary_forwards_beside_them_are_those_of_one(model_type):
    model = enable_prefix_grouper(families.build(model_type), self_check=False)
    batches = [batch(seed) for seed in range(BATCHES)]
    with torch.no_grad():
        expected = [prefix_grouped_logps(model, *each)[0] for each in batches]
        plain = [model(input_ids=torch.cat(each[::2], 1), use_cache=False).logits for each in batches]
    wrong: list[int] = []

    @torch.no_grad()
    def score() -> None:
        for i in range(CALLS):
            found = prefix_grouped_logps(model, *batches[i % BATCHES])[0]
            if not torch.equal(found, expected[i % BATCHES]):
                wrong.append(i)

    @torch.no_grad()
    def forward() -> None:
        for i in range(CALLS):
            ids = torch.cat(batches[i % BATCHES][::2], 1)
            if not torch.equal(model(input_ids=ids, use_cache=False).logits, plain[i % BATCHES]):
                wrong.append(i)

    assert not in_threads(score, score, forward) and not wrong


def test_gradients_of_two_threads_are_their_own():
    model = enable_prefix_grouper(tiny.model().train(), self_check=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights, batches = list(model.parameters()), [batch(seed) for seed in range(2)]

    def gradients(each: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(prefix_grouped_logps(model, *each)[0].sum(), weights))

    expected, found = [gradients(each) for each in batches], [[], []]
    errors = in_threads(*(lambda i=i: found[i].extend(gradients(batches[i])) for i in range(2)))
    assert not errors
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, own, rtol=0, atol=0)


def test_names_that_two_threads_take_away_come_back():
    model = enable_prefix_grouper(tiny.model(), self_check=False)
    first_in, first_out = threading.Event(), threading.Event()

    def first() -> None:
        with without_prefix_grouper(model):
            first_in.set()
            second_in.wait(10)
        first_out.set()

    second_in = threading.Event()

    def second() -> None:
        first_in.wait(10)
        with without_prefix_grouper(model):
            second_in.set()
            first_out.wait(10)
            assert not is_enabled(model), "the first one is out, the second one still needs the model's own names"
            with pytest.raises(ValueError, match="call enable_prefix_grouper"):
                prefix_grouped_logps(model, *batch(0))

    assert not in_threads(first, second)
    assert is_enabled(model)
