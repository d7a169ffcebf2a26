"""Wrong arguments are refused with the offending value and a remedy."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from emulation import flash_on_cpu

from prefix_grouper_plugins.attention import available_backends, shared_prefix_attention
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.attention.registry import BACKENDS
from prefix_grouper_plugins.layout import PrefixLayout

LAYOUT = PrefixLayout.from_groups([6], [[3, 4]])
T = LAYOUT.num_tokens


def call(q: Any = (T, 4, 8), k: Any = (T, 2, 8), v: Any = (T, 2, 8), **options: Any) -> torch.Tensor:
    tensors = (x if isinstance(x, torch.Tensor) else torch.randn(x) for x in (q, k, v))
    return shared_prefix_attention(*tensors, LAYOUT, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": (1, T, 4, 8)}, r"query has shape \(1, 12, 4, 8\).*no batch axis"),
        ({"q": (T + 1, 4, 8)}, r"query has 13 tokens and the layout 12.*layout.pack"),
        ({"k": (T - 1, 2, 8)}, r"shapes do not fit.*key \(11, 2, 8\)"),
        ({"k": (T, 2, 16)}, r"shapes do not fit.*key \(12, 2, 16\)"),
        ({"v": (T, 4, 8)}, r"shapes do not fit.*value \(12, 4, 8\)"),
        ({"q": (T, 3, 8)}, "3 query heads are not a multiple of 2 key heads"),
        ({"k": torch.randn(T, 2, 8).double()}, r"key torch\.float64.*cast the three"),
        ({"q": torch.ones(T, 4, 8).int()}, "floating-point"),
        ({"v": torch.empty(T, 2, 8, device="meta")}, "value meta: move the three to one device"),
        ({"sliding_window": 0}, "sliding_window=0: give a number of tokens of at least 1"),
        ({"softcap": -1.0}, r"softcap=-1\.0: give a positive cap"),
        ({"softcap": float("inf")}, "softcap=inf: give a positive cap that is finite"),
        ({"sliding_window": 1.5}, r"sliding_window=1\.5: give a number of tokens of at least 1"),
        ({"scale": float("nan")}, "scale=nan: give a finite number"),
        ({"scale": "0.3"}, "scale='0.3' is a str: give a number"),
        (
            {"scale": torch.tensor(0.3, requires_grad=True)},
            "would get no gradient: give a number, and multiply query by",
        ),
        ({"q": (T, 0, 8)}, r"query \(12, 0, 8\) and key \(12, 2, 8\) have no heads"),
        ({"k": (T, 0, 8), "v": (T, 0, 8)}, r"key \(12, 0, 8\) have no heads"),
        ({"q": (T, 4, 0), "k": (T, 2, 0)}, r"query \(12, 4, 0\).*heads without dims"),
        (
            dict.fromkeys("qkv", torch.ones(T, 2, 8).to(torch.float8_e4m3fn)),
            "floating-point dtype of 16, 32 or 64 bits",
        ),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\): one logit for each of the 4 query heads"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is torch.float32 on meta: move it"),
        ({"backend": "flash"}, "backend='flash' is unknown: choose one of auto, merged_lse, .*blockwise, dense"),
        ({"backend": "merged_lse", "softcap": 9.0}, r"backend='merged_lse' cannot.*softcap=9\.0.*use backend='auto'"),
        ({"backend": "merged_lse", "sliding_window": 2}, "sliding_window=2 hides keys.*use backend='auto'"),
    ],
)
def test_wrong_arguments_are_refused_with_value_and_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**arguments)


@pytest.mark.parametrize("scale", [-0.7, 0.0, torch.tensor(-0.7), np.float32(0.5)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "blockwise", "dense", "cuda_driver"])
def test_a_scale_may_be_any_finite_number(scale: Any, backend: str) -> None:
    """Flash kernels give NaN for one that is 0 or below: they compare scores, hidden ones too, before they scale them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(T, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    leaves = [x.requires_grad_() for x in tensors]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    scores = torch.einsum("qhd,khd->hqk", q, k) * float(scale)
    hidden = ~visibility_mask(LAYOUT.segments)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    with flash_on_cpu() if backend == "cuda_driver" else nullcontext():
        name = "merged_lse" if backend == "cuda_driver" else backend
        out = shared_prefix_attention(*leaves, LAYOUT, scale=scale, backend=name)
        grad = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        found = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cpu", torch.float64, 64), None),
        (("cuda", torch.float32, 64), "float16 and bfloat16, not torch.float32"),
        (("cuda", torch.bfloat16, 320), "head dim 320 is above 256"),
        (("mps", torch.float16, 64), "not on mps"),
    ],
)
def test_available_backends_tells_the_reason(arguments: tuple[Any, ...], reason: str | None) -> None:
    available = available_backends(*arguments)
    assert list(available) == list(BACKENDS) and list(available)[-1] == "blockwise" and available["blockwise"] is None
    assert available["merged_lse"] is None if reason is None else reason in str(available["merged_lse"])


def test_available_backends_knows_window_and_softcap() -> None:
    assert "sliding_window=4" in str(available_backends("cpu", torch.float32, 64, sliding_window=4)["merged_lse"])
    assert "softcap=30.0" in str(available_backends("cpu", torch.float32, 64, softcap=30.0)["merged_lse"])


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_derivatives_by_torch_func_are_an_error_that_names_the_remedy(backend: str) -> None:
    layout = PrefixLayout.from_groups([8], [[3, 4]])
    x = torch.randn(layout.num_tokens, 2, 8)

    def total(x: torch.Tensor) -> torch.Tensor:
        return shared_prefix_attention(x, x, x, layout, backend=backend).sum()

    for run in (lambda: torch.func.grad(total)(x), lambda: torch.func.vjp(total, x)):
        with pytest.raises(ValueError, match=r"cannot be differentiated by torch\.func.* take torch\.autograd\.grad"):
            run()


def test_forward_mode_derivatives_are_refused_instead_of_zero_and_dense_has_them() -> None:
    layout = PrefixLayout.from_groups([8], [[3, 4]])
    x, tangent = torch.randn(2, layout.num_tokens, 2, 8, dtype=torch.float64)

    def attention(x: torch.Tensor, backend: str) -> torch.Tensor:
        return shared_prefix_attention(x, x, x, layout, backend=backend)

    with pytest.raises(ValueError, match=r"no forward-mode derivative.*in reverse mode"):
        torch.func.jvp(lambda x: attention(x, "auto"), (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="no forward-mode derivative"):
        attention(forward_ad.make_dual(x, tangent), "auto")
    with forward_ad.dual_level():  # tensors without a tangent are as ever
        assert torch.equal(attention(x, "auto"), attention(x.clone(), "auto"))
    by_difference = (attention(x + 1e-6 * tangent, "auto") - attention(x - 1e-6 * tangent, "auto")) / 2e-6
    with forward_ad.dual_level():
        by_rule = forward_ad.unpack_dual(attention(forward_ad.make_dual(x, tangent), "dense")).tangent
    torch.testing.assert_close(by_rule, by_difference, rtol=1e-6, atol=1e-7)
