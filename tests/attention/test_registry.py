"""Which backend a layer takes: what docs/attention.md says, what the code does, and what the environment overrides."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_grouper_plugins.attention import available_backends, shared_prefix_attention
from prefix_grouper_plugins.attention import device as attention_device
from prefix_grouper_plugins.attention.backends import blockwise, merged_lse
from prefix_grouper_plugins.attention.registry import BACKENDS, auto_backend
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import Features, inputs

LAYERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"sliding_window": 100},
    "softcap": {"softcap": 30.0},
    "window+softcap": {"sliding_window": 100, "softcap": 30.0},
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
HEAD_DIMS = (8, 64, 80, 96, 128, 256, 320)


def documented() -> dict[tuple[str, str, str, int], tuple[str, ...]]:
    """``(device, dtype, layer, head dim)`` -> backends, from the table in the docs."""
    text = (Path(__file__).parents[2] / "docs/attention.md").read_text()
    table = re.search(r"<!-- auto -->(.*)<!-- /auto -->", text, re.S)[1]  # type: ignore[index]
    found: dict[tuple[str, str, str, int], tuple[str, ...]] = {}
    for line in re.findall(r"^\| (`.*) \|$", table, re.M):
        *cells, backends = (tuple(re.findall(r"`([^`]+)`", cell)) for cell in line.split(" | "))
        for device, dtype, layer, head_dim in itertools.product(*cells):
            case = (device, dtype, layer, int(head_dim))
            assert case not in found, f"two lines for {case}"
            found[case] = backends
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an H100 and Triton; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(attention_device, "_why_not_started", lambda: None)


@pytest.mark.usefixtures("gpu")
def test_the_table_in_the_docs_is_what_the_code_does() -> None:
    actual = {}
    for device, dtype, layer, head_dim in itertools.product(("cpu", "cuda"), DTYPES, LAYERS, HEAD_DIMS):
        answers = available_backends(device, getattr(torch, dtype), head_dim, **LAYERS[layer])
        able = tuple(name for name, reason in answers.items() if reason is None)
        actual[device, dtype, layer, head_dim] = able
        assert auto_backend(device, getattr(torch, dtype), head_dim, **LAYERS[layer]) == able[0]
    assert documented() == actual


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("activated", "capability", "head_dim", "reason"),
    [
        (None, (8, 0), 256, None),
        (None, (12, 0), 256, "flash backward with head dim 256 does not fit compute capability 12.0"),
        ("FA3", (9, 0), 256, None),
        ("FA3", (8, 0), 128, "FA3 is activated and needs compute capability 9.x, this GPU has 8.0"),
        ("FA4", (10, 0), 128, None),
        ("FA4", (12, 0), 128, "FA4 is activated and needs compute capability 9.x or 10.x, this GPU has 12.0"),
        ("FA4", (10, 0), 129, "FA4 is activated and is used for head dims up to 128, not for 136"),
        ("FA4", (9, 0), 256, "FA4 is activated and is used for head dims up to 128, not for 256"),
    ],
)
def test_activated_flash_kernels_are_taken_where_they_run_only(
    activated: str | None,
    capability: tuple[int, int],
    head_dim: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: activated, raising=False)
    assert available_backends("cuda", torch.bfloat16, head_dim)["merged_lse"] == reason


@pytest.mark.usefixtures("gpu")
def test_the_driver_is_asked_once_for_all_layers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: not asked.append(1))
    for _ in range(3):
        assert available_backends("cuda:99", torch.bfloat16, 104)["merged_lse"] is None
    assert len(asked) == 1


def test_every_backend_is_described_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs/attention.md").read_text()
    described = re.findall(r"^\| `(\w+)` \| ", text.partition("## What")[0], re.M)
    assert described == [*BACKENDS, "dense"]


LAYOUT = PrefixLayout.from_groups([12], [[7, 9]])


def used(monkeypatch: pytest.MonkeyPatch, features: Features, backend: str) -> list[str]:
    """The backends whose forward and backward one call takes."""
    calls: list[str] = []
    modules = {"blockwise": blockwise, "merged_lse": merged_lse}
    for key, name in itertools.product(modules, ("forward", "backward")):
        module, real = modules[key], getattr(modules[key], name)

        def spy(*args: Any, _real: Any = real, _backend: str = key, **kwargs: Any) -> Any:
            calls.append(_backend)
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    tensors = inputs(LAYOUT, features)
    shared_prefix_attention(*tensors, LAYOUT, backend=backend, **features.options()).sum().backward()
    return calls


@pytest.mark.parametrize("backend", ["auto", "merged_lse"])
def test_the_environment_wins_over_the_code_in_forward_and_backward(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    assert used(monkeypatch, Features(), backend) == ["blockwise"] * 2


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_empty_variable_and_auto_leave_the_choice_to_the_layer(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", value)
    assert used(monkeypatch, Features(), "auto") == ["merged_lse"] * 2


def test_a_forced_backend_that_cannot_run_a_layer_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "merged_lse")
    with pytest.raises(ValueError, match=r"PREFIX_GROUPER_BACKEND='merged_lse' cannot run this call: sliding_window=3"):
        shared_prefix_attention(*inputs(LAYOUT, Features()), LAYOUT, sliding_window=3)
    monkeypatch.delenv("PREFIX_GROUPER_BACKEND")
    with pytest.raises(
        ValueError, match=r"^backend='flex' cannot run this call: FlexAttention has no backward on the CPU"
    ):
        shared_prefix_attention(*inputs(LAYOUT, Features()), LAYOUT, backend="flex")


def test_an_unknown_name_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "flash")
    message = "PREFIX_GROUPER_BACKEND='flash' is unknown: choose one of auto, merged_lse, .*blockwise$"
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(*inputs(LAYOUT, Features()), LAYOUT)


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_kernels_of_triton_name_the_gpu_that_they_cannot_use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)

    def reason(device: str) -> str:
        return str(available_backends(device, torch.float16, 64)[backend])

    assert "need an NVIDIA CUDA device, not mps" in reason("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason("cuda") == "this process sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "need compute capability 8.0, this GPU has 7.5" in reason("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "need an NVIDIA CUDA device, not ROCm" in reason("cuda")
