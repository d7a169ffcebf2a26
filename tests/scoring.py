"""Batches of rows, and values and gradients compared in float64: what tests of scoring have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests import tiny

TOLERANCE = 1e-8


class ComputeInFloat64(TorchFunctionMode):
    """transformers casts norms, routers, softmax and rotary angles to float32; leave float64 models in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def batch_of(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """``(prompt, completion)`` of each row to the two padded blocks and their masks."""
    width, length = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    prompts, completions = torch.zeros(len(rows), width), torch.zeros(len(rows), length)
    prompt_mask, completion_mask = torch.zeros_like(prompts), torch.zeros_like(completions)
    for i, (p, c) in enumerate(rows):
        prompts[i, width - len(p) :], prompt_mask[i, width - len(p) :] = torch.tensor(p), 1
        completions[i, : len(c)], completion_mask[i, : len(c)] = torch.tensor(c), 1
    return tuple(x.long() for x in (prompts, prompt_mask, completions, completion_mask))


def groups(sizes: dict[int, list[int]], seed: int = 0, vocabulary: int = tiny.SIZES["vocab_size"]):
    """``{prompt length: [completion lengths]}`` to shuffled rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    rows = [(prompt, tokens(n)) for length, ns in sizes.items() for prompt in [tokens(length)] for n in ns]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


def values_and_gradients(model, function, batch):
    """``function(model, batch)`` and the gradients of one scalar that weights every value differently."""
    model.zero_grad()
    values = [value for value in function(model, batch) if value is not None]
    generator = torch.Generator().manual_seed(1)
    sum((v * torch.randn(v.shape, generator=generator, dtype=torch.float64)).sum() for v in values).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [value.detach() for value in values], gradients


def assert_close(got, expected, tolerance: float = TOLERANCE) -> None:
    assert len(got[0]) == len(expected[0])
    for name, value, wanted in zip(("logps", "entropy"), got[0], expected[0], strict=False):  # entropy or none
        error = float((value - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance, f"{name} is off by {error:.1e} of the largest"
    assert got[1].keys() == expected[1].keys()
    # Some gradients are zero but for rounding (the bias of a key projection), hence the floor.
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, wanted in expected[1].items():
        error = float((got[1][name] - wanted).abs().max()) / max(float(wanted.abs().max()), floor)
        assert error <= tolerance, f"the gradient of {name} is off by {error:.1e} of its largest entry"
