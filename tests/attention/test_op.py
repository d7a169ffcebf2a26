"""The custom operator, and the way past it, among compile, checkpointing, offloading, autocast and odd tensors."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, library
from torch._dynamo import compiled_autograd
from torch.overrides import BaseTorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from prefix_grouper_plugins.attention import api, shared_prefix_attention
from prefix_grouper_plugins.attention import op as ops
from prefix_grouper_plugins.attention.op import attention_backward_op, attention_op
from prefix_grouper_plugins.layout import PrefixLayout
from tests.attention.forests import Features, assert_all_close, inputs, output_and_gradients

LAYOUT = PrefixLayout.from_groups([33, 7], [[9, 14, 5], [6, 3]])
ALL_FEATURES = Features(heads=4, kv_heads=2, head_dim=8, value_dim=6, window=11, softcap=3.0, sinks=True)
PLAIN = Features(heads=4, kv_heads=2, sinks=True)
both = pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES], ids=["merged_lse", "blockwise"])


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: PrefixLayout, features: Features) -> Tensor:
    return shared_prefix_attention(q, k, v, layout, sinks=sinks, **features.options())


@both
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_over_many_layouts(features: Features) -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    layouts = [
        LAYOUT,
        PrefixLayout.from_groups([20], [[7, 8]]),
        PrefixLayout.from_groups([41, 9, 5], [[9, 10, 11, 12], [6], [3]]),
        PrefixLayout.from_rows([torch.arange(n) for n in (18, 25, 31)]),
    ]
    for layout in layouts:
        tensors = inputs(layout, features)
        actual = output_and_gradients(lambda *x, layout=layout: compiled(*x, layout, features), tensors)
        expected = output_and_gradients(lambda *x, layout=layout: attend(*x, layout, features), tensors)
        assert_all_close(actual, expected, 0.0)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_window_that_hides_nothing_in_one_layout_does_not_recompile() -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    features = Features(window=25)
    for layout in (PrefixLayout.from_groups([9], [[5, 4]]), PrefixLayout.from_groups([40], [[30, 21]])):
        tensors = inputs(layout, features)
        expected = shared_prefix_attention(*tensors, layout, sliding_window=25, backend="dense")
        torch.testing.assert_close(compiled(*tensors, None, layout, features), expected)


def _saving_attention(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    mine = op == torch.ops.prefix_grouper.shared_prefix_attention.default
    return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE


@both
@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective", "save_on_cpu"])
def test_checkpointed_gradients_are_bit_equal(features: Features, mode: str) -> None:
    tensors = inputs(LAYOUT, features, torch.float32)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        args = (q * 1.5, k, v, sinks, LAYOUT, features)
        if mode == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                return attend(*args)
        contexts = {"context_fn": lambda: create_selective_checkpoint_contexts(_saving_attention)}
        return checkpoint(attend, *args, use_reentrant=mode == "reentrant", **(contexts if mode == "selective" else {}))

    expected = output_and_gradients(lambda q, *rest: attend(q * 1.5, *rest, LAYOUT, features), tensors)
    # A reentrant checkpoint supports backward() only.
    out = run(*tensors)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).float())
    assert torch.equal(out, expected[0])
    assert all(torch.equal(x.grad, g) for x, g in zip(tensors, expected[1:], strict=True) if x.grad is not None)
    assert all(x.grad is not None for x in tensors)


@pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES, Features()], ids=["sinks", "all", "plain"])
@pytest.mark.parametrize("layout", [LAYOUT, PrefixLayout.from_groups([8], [[1]])], ids=["groups", "one row"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_checkpointed_under_a_mode_runs_again_without_it(
    features: Features, layout: PrefixLayout, reentrant: bool
) -> None:
    """A mode of functions that is over before the backward, or that torch takes off for it, as that by which `verify` drops dropout."""
    tensors = inputs(layout, features)
    given = (*tensors, *[None] * (4 - len(tensors)), layout, features)
    expected = torch.autograd.grad(attend(*given).square().sum(), tensors)
    with BaseTorchFunctionMode():
        loss = checkpoint(attend, *given, use_reentrant=reentrant).square().sum()
    loss.backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES, Features()], ids=["sinks", "all", "plain"])
def test_operator_passes_opcheck(features: Features, dtype: torch.dtype) -> None:
    q, k, v, *sinks = inputs(LAYOUT, features, dtype)
    args = (q, k, v, LAYOUT.segments, 0, sinks[0] if sinks else None, 0.3, features.window, features.softcap, "auto")
    library.opcheck(attention_op, args)


every_way = pytest.mark.parametrize("features", [PLAIN, ALL_FEATURES, Features()], ids=["sinks", "all", "plain"])


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_and_the_way_past_it_give_the_same_bits(
    features: Features, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(LAYOUT, features, dtype)

    def run() -> list[Tensor]:
        return output_and_gradients(lambda *x: attend(*x, LAYOUT, features), tensors)

    with monkeypatch.context() as patch:
        patch.setattr(api, "attention_op", None)
        patch.setattr(ops, "attention_backward_op", None)
        past = run()
    monkeypatch.setattr(api, "is_traced", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(past, run(), strict=True))


@every_way
def test_a_mode_sees_the_operator_that_it_is_there_for(features: Features) -> None:
    """Forward and backward each for itself: FLOPs of neither are lost because the other one was not counted."""
    tensors = inputs(LAYOUT, features)
    counted, uncounted = FlopCounterMode(display=False), contextlib.nullcontext()
    for forward, backward in ((counted, uncounted), (uncounted, counted)):
        with forward:
            out = attend(*tensors, *[None] * (4 - len(tensors)), LAYOUT, features)
        with backward:
            out.sum().backward()
        assert counted.get_total_flops() > 0


def test_factories_of_a_default_device_make_nothing_of_ours_elsewhere() -> None:
    tensors = inputs(LAYOUT, PLAIN)
    expected = output_and_gradients(lambda *x: attend(*x, LAYOUT, PLAIN), tensors)
    with torch.device("meta"):
        out = attend(*tensors, LAYOUT, PLAIN)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    with torch.device("meta"):
        actual = [out, *torch.autograd.grad(attend(*tensors, LAYOUT, PLAIN), tensors, grad_out)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_way
@pytest.mark.parametrize("counted", ["forward", "backward"])
def test_a_checkpoint_of_which_one_pass_is_traced_gives_the_same(features: Features, counted: str) -> None:
    """The recomputation has to save what the forward saved, though one of them takes the operator."""
    tensors = inputs(LAYOUT, features)
    none = [None] * (4 - len(tensors))
    expected = torch.autograd.grad(attend(*tensors, *none, LAYOUT, features).sum(), tensors)
    modes = {counted: FlopCounterMode(display=False)}
    with modes.get("forward", contextlib.nullcontext()):
        out = checkpoint(attend, *tensors, *none, LAYOUT, features, use_reentrant=False)
    with modes.get("backward", contextlib.nullcontext()):
        actual = torch.autograd.grad(out.sum(), tensors)
    assert_all_close(list(actual), list(expected), 0.0)


@every_way
def test_the_meta_device_has_shapes(features: Features) -> None:
    tensors = [x.detach().to("meta").requires_grad_() for x in inputs(LAYOUT, features)]
    out = attend(*tensors, *[None] * (4 - len(tensors)), LAYOUT, features)
    assert out.is_meta and out.shape == (LAYOUT.num_tokens, features.heads, features.value_dim)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.is_meta and grad.shape == x.shape for grad, x in zip(grads, tensors, strict=True))


@both
@pytest.mark.parametrize("which", range(5), ids=["query", "key", "value", "out", "lse"])
def test_a_saved_tensor_that_comes_back_as_a_subclass_meets_the_operator(features: Features, which: int) -> None:
    """A subclass has its values where only operators find them: a kernel that is given its memory computes with anything."""
    tensors = inputs(LAYOUT, features)
    expected = torch.autograd.grad(attend(*tensors, LAYOUT, features).sum(), tensors)
    number = itertools.count()

    def unpack(saved: tuple[int, Tensor]) -> Tensor:
        return TwoTensor(saved[1].detach(), saved[1].detach()) if saved[0] == which else saved[1]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: (next(number), x), unpack):
        out = attend(*tensors, LAYOUT, features)
    actual = torch.autograd.grad(out.sum(), tensors)
    assert_all_close([getattr(grad, "a", grad) for grad in actual], list(expected), 0.0)


@both
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_torch_jit_holds_the_operator(features: Features) -> None:
    """A call of a Python function could not be saved."""
    tensors = [x.detach() for x in inputs(LAYOUT, features)]
    traced = torch.jit.trace(lambda *x: attend(*x, LAYOUT, features), tuple(tensors), check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    others = [x * 1.5 for x in tensors]
    # A trace computes with shapes, of which the scale is made, in float32.
    assert_all_close([traced(*others)], [attend(*others, LAYOUT, features)], 1e-6)


@every_way
def test_gradients_for_several_gradients_at_once_are_those_for_each(features: Features) -> None:
    tensors = inputs(LAYOUT, features)
    out = attend(*tensors, *[None] * (4 - len(tensors)), LAYOUT, features)
    grad_outs = torch.randn(3, *out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    together = torch.autograd.grad(out, tensors, grad_outs, is_grads_batched=True, retain_graph=True)
    for i, grad_out in enumerate(grad_outs):
        alone = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        assert_all_close([x[i] for x in together], list(alone), 1e-12)


def test_compiled_autograd_traces_the_backward_of_an_eager_forward() -> None:
    tensors = inputs(LAYOUT, PLAIN)
    expected = torch.autograd.grad(attend(*tensors, LAYOUT, PLAIN).sum(), tensors)
    graphs: list[str] = []

    def compiler(graph: Any) -> Any:
        graphs.append(str(graph.graph))
        return torch.compile(graph, backend="aot_eager")

    with compiled_autograd._enable(compiler):
        attend(*tensors, LAYOUT, PLAIN).sum().backward()
    assert graphs and all(torch.equal(x.grad, g) for x, g in zip(tensors, expected, strict=True) if x.grad is not None)


@both
def test_log_sum_exp_is_not_differentiable(features: Features) -> None:
    q, k, v, sinks = inputs(LAYOUT, features)
    out, lse = attention_op(q, k, v, LAYOUT.segments, 0, sinks, 0.3, features.window, features.softcap, "auto")
    assert out.requires_grad and not lse.requires_grad
    assert lse.shape == (features.heads, LAYOUT.num_tokens)


@both
def test_strided_inputs_and_expanded_gradients_give_the_same(features: Features) -> None:
    tensors = inputs(LAYOUT, features)
    expected = torch.autograd.grad(attend(*tensors, LAYOUT, features).sum(), tensors)

    def odd(x: Tensor) -> Tensor:  # head-major storage, with a stride in the last dimension
        return torch.stack([x, x], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    q, k, v, sinks = tensors
    out = attend(odd(q), odd(k), odd(v), torch.stack([sinks, sinks], -1)[:, 0], LAYOUT, features)
    actual = torch.autograd.grad(out.sum(), tensors)
    assert_all_close(list(actual), list(expected), 1e-12)


@both
def test_fused_projection_views_give_the_same(features: Features) -> None:
    q, k, v, sinks = inputs(LAYOUT, features)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    parts = fused.split([x[0].numel() for x in (q, k, v)], dim=1)
    views = [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, (q, k, v), strict=True)]
    assert torch.equal(attend(*views, sinks, LAYOUT, features), attend(q, k, v, sinks, LAYOUT, features))


@both
def test_autocast_narrows_the_inputs_and_nothing_that_happens_inside(features: Features) -> None:
    """As for torch's own attention; float64 is left alone, as everywhere in torch."""

    def narrowed(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        return attend(*(x.to(torch.bfloat16) for x in (q, k, v)), *sinks, LAYOUT, features)

    tensors = inputs(LAYOUT, features, torch.float32)
    expected = output_and_gradients(narrowed, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(lambda *x: attend(*x, LAYOUT, features), tensors)
    assert_all_close(actual, expected, 0.0)


def test_a_traced_call_does_not_ask_what_dynamo_of_old_torch_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.amp.is_autocast_available` breaks the graph on torch 2.8 to 2.11; which devices have autocast is a constant."""

    def untraceable(kind: str) -> bool:
        raise AssertionError("asked during a call")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    q, k, v = inputs(LAYOUT, Features())
    assert shared_prefix_attention(q, k, v, LAYOUT).shape == q.shape


@both
def test_inference_mode_and_frozen_inputs_work(features: Features) -> None:
    q, k, v, sinks = inputs(LAYOUT, features)
    expected = attend(q, k, v, sinks, LAYOUT, features)
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v, sinks, LAYOUT, features), expected)
    frozen = attend(q, k.detach(), v.detach(), sinks.detach(), LAYOUT, features)
    assert torch.equal(torch.autograd.grad(frozen.sum(), q)[0], torch.autograd.grad(expected.sum(), q)[0])


@pytest.mark.parametrize("layout", [LAYOUT, PrefixLayout.from_rows([torch.arange(9)])], ids=["group", "one row"])
def test_second_derivatives_are_refused_loudly(layout: PrefixLayout) -> None:
    q, k, v = inputs(layout, Features())
    (dq,) = torch.autograd.grad(shared_prefix_attention(q, k, v, layout).square().sum(), q, create_graph=True)
    with pytest.raises(ValueError, match="shared_prefix_attention has a first derivative only: take backend='dense'"):
        dq.sum().backward()


@pytest.mark.parametrize("op", [attention_op, attention_backward_op], ids=["forward", "backward"])
def test_no_cuda_graph_repeats_the_layout_of_another_batch(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor cuts its graphs at the operators, and a capture by hand is refused: replays never read the segments."""
    assert torch.Tag.cudagraph_unsafe in op._opoverload.tags
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tensors = inputs(LAYOUT, PLAIN)
    torch.autograd.grad(attend(*tensors, LAYOUT, PLAIN).sum(), tensors)  # what is on the CPU is in no capture
    with pytest.raises(RuntimeError, match="leave packed forwards and backwards out of CUDA graphs"):
        ops.refuse_capture(torch.device("cuda"))
