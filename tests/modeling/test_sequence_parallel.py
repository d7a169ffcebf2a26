"""A packed row that lies on several processes gives the numbers of one process: attention alone, and whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper, shared_prefix_attention
from prefix_grouper_plugins.modeling import ShardedLayout, layout_inputs, packed_inputs
from prefix_grouper_plugins.modeling.sequence_parallel import sequence_parallel_attention
from tests import tiny
from tests.processes import SIZES

pytestmark = pytest.mark.slow  # four processes take their time to start

ROWS = tiny.rows({9: [4, 7, 1], 3: [6, 2], 1: [5]})
LAYOUT = PrefixLayout.from_rows(ROWS)
PADDED = LAYOUT.pad_to(-(-LAYOUT.num_tokens // max(SIZES)) * max(SIZES))


def piece(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's piece of what is ``[T, ...]``."""
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def assert_close(got: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert got.shape == expected.shape, name
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    assert error <= tolerance, f"{name} is off by {error:.1e}"


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One attention call of the whole row; every process makes the same tensors and takes its piece of them."""

    heads: int
    key_heads: int
    value_dim: int = 8
    sinks: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    backend: str = "auto"

    def tensors(self) -> list[Tensor]:
        """query, key, value, the gradient of the output, and sinks if there are any"""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.heads, 8), (self.key_heads, 8), (self.key_heads, self.value_dim), (self.heads, self.value_dim)]
        tokens = PADDED.num_tokens
        made = [torch.randn(tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [*made, *[torch.randn(self.heads, generator=generator, dtype=torch.float64)] * self.sinks]

    def options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window, "softcap": self.softcap, "scale": self.scale}


def output_and_gradients(attend: Any, layout: Any, tensors: list[Tensor], case: Case, backend: str) -> list[Tensor]:
    query, key, value, grad_out, *sinks = tensors
    leaves = [x.clone().requires_grad_() for x in (query, key, value, *sinks)]
    options = case.options() | ({"sinks": leaves[3]} if sinks else {})
    out = attend(*leaves[:3], layout, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def attend_to_a_piece(group: dist.ProcessGroup, case: Case) -> list[Tensor]:
    query, key, value, grad_out, *sinks = case.tensors()
    tensors = [*(piece(x, group) for x in (query, key, value, grad_out)), *sinks]
    layout = ShardedLayout(PADDED, group)
    assert layout.num_tokens == len(tensors[0]), "the layout does not say how long a piece is"
    return output_and_gradients(sequence_parallel_attention, layout, tensors, case, case.backend)


CASES = {
    "as many key heads": Case(4, 4),
    "more key heads than processes": Case(16, 8),
    "fewer key heads than processes": Case(8, 2),
    "one key head": Case(4, 1),
    "sinks": Case(8, 2, sinks=True),
    "window": Case(8, 4, sliding_window=4),
    "softcap and scale": Case(4, 2, softcap=1.5, scale=0.7),
    "everything": Case(8, 2, sinks=True, sliding_window=5, softcap=2.0, backend="blockwise"),
    "wide values": Case(4, 4, value_dim=12),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_over_pieces_equals_dense_attention_over_the_whole_row(processes, case, size):
    expected = output_and_gradients(shared_prefix_attention, PADDED, case.tensors(), case, "dense")
    by_process = processes.run(size, attend_to_a_piece, case)
    for name, wanted, *parts in zip(("out", "dq", "dk", "dv", "dsinks"), expected, *by_process, strict=False):
        got = sum(parts) if name == "dsinks" else torch.cat(parts)
        assert_close(got, wanted, 1e-12, name)
    assert {len(results) for results in by_process} == {len(expected)}


def test_each_process_has_the_gradients_of_the_sinks_of_its_heads_alone(processes):
    for rank, results in enumerate(processes.run(2, attend_to_a_piece, Case(8, 2, sinks=True))):
        own = torch.arange(8) // 4 == rank
        assert torch.equal(results[-1] != 0, own)


# --- whole models ----------------------------------------------------------------------------------------------------


def exact(model_type: str) -> Any:
    """A float64 model whose norms compute in float64, so that only a different order of sums is left."""
    own = "eager" if model_type == "gpt_oss" else None
    model = tiny.model(model_type, attn_implementation=own, sliding_window=5).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    tiny.compute_norms_in_input_dtype(model)
    return enable_prefix_grouper(model, self_check=False)  # forwards are counted


def logits_and_gradients(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(**inputs).logits[0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def forward_a_piece(
    group: dist.ProcessGroup, model_type: str, reentrant: bool | None
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients, and how often the first layer ran; ``reentrant`` is None without checkpointing."""
    model = exact(model_type)
    if reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
    runs: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    inputs = {
        "input_ids": piece(PADDED.pack(ROWS), group)[None],
        "position_ids": piece(PADDED.position_ids, group)[None],
        "use_cache": False,
        **layout_inputs(ShardedLayout(PADDED, group), torch.device("cpu")),
    }
    return *logits_and_gradients(model, inputs, piece(PADDED.labels(ROWS), group)), len(runs)


def assert_pieces_equal_the_whole_row(processes, size: int, model_type: str, reentrant: bool | None = None) -> None:
    model = exact(model_type)
    inputs = packed_inputs(LAYOUT, LAYOUT.pack(ROWS))
    logits, gradients = logits_and_gradients(model, inputs, LAYOUT.labels(ROWS))
    by_process = processes.run(size, forward_a_piece, model_type, reentrant)
    assert_close(torch.cat([own for own, _, _ in by_process])[: LAYOUT.num_tokens], logits, 1e-11, "logits")
    for name, wanted in gradients.items():
        assert_close(sum(own[name] for _, own, _ in by_process), wanted, 1e-11, name)  # type: ignore[arg-type]
    for _, own, runs in by_process:
        assert own.keys() == gradients.keys()
        assert runs == 1 + (reentrant is not None), "checkpointing did not recompute, or did without being asked"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss", "stablelm"])
def test_a_model_forwarded_in_pieces_equals_one_forwarded_whole(processes, model_type, size):
    assert_pieces_equal_the_whole_row(processes, size, model_type)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss"])
def test_gradient_checkpointing_recomputes_the_same_pieces(processes, model_type, reentrant):
    assert_pieces_equal_the_whole_row(processes, 4, model_type, reentrant)


# --- what is refused -------------------------------------------------------------------------------------------------


def cut_unevenly(group: dist.ProcessGroup) -> None:
    layout = PrefixLayout.from_groups([4], [[3, 3]])
    assert layout.num_tokens == 9
    ShardedLayout(layout.pad_to(12), group)
    with pytest.raises(
        ValueError, match=rf"9 tokens cannot be cut into {dist.get_world_size(group)} equal pieces: .*layout.pad_to\(\)"
    ):
        ShardedLayout(layout, group)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_that_cannot_be_cut_evenly_is_refused(processes, size):
    processes.run(size, cut_unevenly)


@pytest.mark.parametrize("case", [Case(6, 2), Case(12, 6), Case(12, 3)], ids=str)
def test_heads_that_cannot_be_dealt_out_are_refused(processes, case):
    message = f"{case.heads} query heads and {case.key_heads} key heads cannot be dealt out to 4 processes: "
    with pytest.raises(ValueError, match=f"{message}choose a sequence-parallel size that divides both"):
        processes.run(4, attend_to_a_piece, case)


def forward_the_whole_row_as_a_piece(group: dist.ProcessGroup) -> None:
    inputs = packed_inputs(PADDED, PADDED.pack(ROWS)) | layout_inputs(ShardedLayout(PADDED, group), torch.device("cpu"))
    exact("qwen3")(**inputs)


def test_a_row_that_is_not_the_piece_of_this_process_is_refused(processes):
    tokens = PADDED.num_tokens
    with pytest.raises(ValueError, match=f"row.s. of {tokens} tokens with a layout of {tokens // 2} tokens"):
        processes.run(2, forward_the_whole_row_as_a_piece)
