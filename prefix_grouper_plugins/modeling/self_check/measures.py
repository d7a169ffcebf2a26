"""What two passes over the same rows computed, how far they are apart, and whether rounding explains it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.self_check.tolerances import OF_SCANS, TIMES_NOISE, tolerance

_KEPT_WHOLE = 1 << 16  # elements; larger gradients are kept as projections, so that a second model's worth never exists
_PROJECTIONS = 4
_OF_PARAMETER = "gradients of parameter "
ALL_GRADIENTS = "all gradients together"
_SMALL = (
    1e-2  # of a typical gradient; what is smaller is measured by that, as it may be rounding alone (biases of keys)
)


@dataclass
class Pass:
    """One pass over all rows, in packed places.

    Attributes:
        outputs (`Tensor[T, V]`): logits or hidden states.
        embeddings (`Tensor[T, d]`): gradients by the input embeddings; None for a pass without gradients.
        parameters: gradients of the trainable parameters by name, as :func:`projected`.
    """

    outputs: Tensor
    embeddings: Tensor | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)


def projected(gradient: Tensor) -> Tensor:
    """``gradient`` in float32; if it is large, its projection by fixed random vectors along the last dimension.

    Linear, and with the same norm in the mean (Johnson-Lindenstrauss), so that norms of sums and differences can be taken.
    """
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    if gradient.numel() <= _KEPT_WHOLE or gradient.dim() < 2:
        return gradient.float().clone()
    vectors = _random_vectors(gradient.shape[-1]).to(gradient.device)
    return gradient.float() @ vectors


@functools.lru_cache(maxsize=64)
def _random_vectors(length: int) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(length)
        return torch.randn(length, _PROJECTIONS, generator=generator, dtype=torch.float32) / _PROJECTIONS**0.5


def differences(found: Pass, expected: Pass, layout: PrefixLayout, typical_only: bool) -> dict[str, float]:
    """Relative differences by what differs.

    Args:
        found: the pass in question.
        expected: the ordinary one.
        layout: what their places mean.
        typical_only: compare medians over tokens only, where rounding sends single tokens to other experts.
    """
    pairs = {"outputs": (found.outputs, expected.outputs)}
    if found.embeddings is not None and expected.embeddings is not None:
        pairs["gradients"] = (found.embeddings, expected.embeddings)
    result = {f"{name} of a typical token": _typical(_by_position(*pair), layout) for name, pair in pairs.items()}
    if typical_only:
        return result
    result |= {name: difference(*pair) for name, pair in pairs.items()}
    return result | parameter_differences(found.parameters, expected.parameters)


def parameter_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative differences of gradients, by ``gradients of parameter NAME``; a parameter without one has a zero gradient."""
    sizes = {name: float(g.norm()) / g.numel() ** 0.5 for name, g in expected.items()}
    typical = statistics.median(size for size in sizes.values() if size) if any(sizes.values()) else 0.0
    result = {}
    for name in dict.fromkeys([*expected, *found]):
        mine, own = found.get(name), expected.get(name)
        apart = mine - own if mine is not None and own is not None else (own if mine is None else mine)
        assert apart is not None
        size = max(sizes.get(name, 0.0), _SMALL * typical) * apart.numel() ** 0.5
        result[f"{_OF_PARAMETER}{name}"] = float(apart.norm()) / max(size, 1e-30)
    return result


def total_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference of all gradients over that of the ``expected`` ones; 0.0 where there are none."""
    size = sum(float(gradient.norm()) ** 2 for gradient in expected.values()) ** 0.5
    apart = 0.0
    for name in dict.fromkeys([*expected, *found]):
        mine, own = found.get(name), expected.get(name)
        if mine is not None and own is not None:
            apart += float((mine - own).norm()) ** 2
        else:
            apart += float((own if mine is None else mine).norm()) ** 2  # type: ignore[union-attr]
    return apart**0.5 / max(size, 1e-30)


def excess(
    found: Mapping[str, float],
    dtype: torch.dtype,
    noise: Mapping[str, float] | None,
    *,
    scans: bool = False,
) -> str | None:
    """What differs by more than rounding explains, in words; None where nothing does. Arguments of :func:`exceeding`."""
    over = exceeding(found, dtype, noise, scans=scans)
    return in_words(over, dtype) if over else None


def in_words(over: Mapping[str, tuple[float, float]], dtype: torch.dtype) -> str:
    """The first one of differences as :func:`exceeding` returns them."""
    name, (value, limit) = next(iter(over.items()))
    return f"{name} differ by {value:.1e}, rounding in {dtype} explains {limit:.0e}"


def exceeding(
    found: Mapping[str, float],
    dtype: torch.dtype,
    noise: Mapping[str, float] | None,
    *,
    scans: bool = False,
) -> dict[str, tuple[float, float]]:
    """The differences that rounding does not explain, by name, each with its limit.

    Args:
        found: differences by name, see :func:`differences`.
        dtype: that of the forward.
        noise: the same differences between two ordinary passes, one of which was rounded otherwise.
        scans: whether the model has recurrent layers. Their kernels round in float32 inside of a scan, where measured noise
            does not reach, and the gradients of their decays feel it most.
    """
    plain = tolerance(dtype)
    of_parameters = sorted(v for name, v in (noise or {}).items() if name.startswith(_OF_PARAMETER) and v < 0.5)
    usual = of_parameters[len(of_parameters) // 2] if of_parameters else 0.0  # one sample may be small by chance
    over = {}
    for name, value in found.items():
        limit = plain.outputs if name.startswith("outputs") else plain.gradients
        limit = plain.update if name == ALL_GRADIENTS else limit
        if noise is not None:
            own = noise.get(name, 0.0)
            limit += TIMES_NOISE * (max(own, usual) if name.startswith(_OF_PARAMETER) else own)
            if scans and (name.startswith(_OF_PARAMETER) or name == ALL_GRADIENTS):
                limit = max(limit, OF_SCANS)
        if not value <= limit:  # catches NaN as well
            over[name] = (value, limit)
    return over


def parameter_of(name: str) -> str | None:
    """The parameter whose gradients a difference of this name is about; None where it is about something else."""
    return name.removeprefix(_OF_PARAMETER) if name.startswith(_OF_PARAMETER) else None


def difference(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of ``expected``."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _by_position(found: Tensor, expected: Tensor) -> Tensor:
    """``[T, d]`` twice -> ``[T]``: the difference at each place over its size, or over a part of the mean one."""
    if found.shape[-1] > 1:
        found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    sizes = expected.norm(dim=-1)
    return (found - expected).norm(dim=-1) / sizes.clamp(min=max(0.1 * float(sizes.mean()), 1e-30))


def _typical(errors: Tensor, layout: PrefixLayout) -> float:
    """The median over a segment, of the worst segment: the first row of a tree is right even without a layout."""
    medians = [errors[start:end].median() for start, end in layout.segments[:, :2].tolist()]
    return float(torch.stack(medians).max())
