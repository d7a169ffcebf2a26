"""Generation by transformers with each distinct prompt prefilled once.

``model.generate`` is called with every prompt repeated for each completion, and its first forward (the prefill) runs on
all of these rows. In :func:`shared_prefill` that forward runs on the distinct rows, and its logits and cache are repeated
for the others. What follows (sampling, stopping, one forward for each new token) is transformers' own and sees the same
numbers, so it draws the same tokens. Rounding may differ where a kernel sums in another order for another number of rows.
From then on the cache is appended to in place (modeling/growing_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.growing_cache import grow_in_place

# Layers of transformers' caches that hold one entry for each row, in tensors that may grow.
_REPEATABLE_LAYERS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",  # of layers without a cache
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
_ROW_INPUTS = ("input_ids", "attention_mask", "position_ids")  # [rows, ...]
CACHES = ("cache", "past_key_values")  # as transformers calls it from 5.24 on, and before
_OTHER_INPUTS = (
    *CACHES,
    "use_cache",
    "return_dict",
    "cache_position",
    "logits_to_keep",
    "is_first_iteration",
)


@dataclass
class Prefill:
    """One prefill.

    Attributes:
        counts: tokens that were forwarded, tokens of all rows, rows and distinct rows.
        reason: why each row was prefilled by itself; None where distinct rows were forwarded once.
    """

    counts: Counts
    reason: str | None = None


@contextmanager
def shared_prefill(model: nn.Module, on_prefill: Callable[[Prefill], None] | None = None) -> Iterator[None]:
    """In this context, ``model.generate`` forwards each distinct prompt of a batch once in its prefill.

    Generation that cannot be shared runs as it is: one row, a cache that cannot be repeated (static, quantised), beam
    search, images and whatever else the forward is given for each row.

    Args:
        model: a causal LM of transformers, bare or wrapped by PEFT, DDP or FSDP. Not to be called by several threads.
        on_prefill: called after each prefill of more than one row.

    Raises:
        RuntimeError: the model does not return the cache that it was given.

    Example:
        >>> with shared_prefill(model):
        ...     model.generate(input_ids=ids.repeat_interleave(8, 0), attention_mask=mask, do_sample=True)
    """
    base: Any = transformers_model(model)
    # Index of each row among the distinct ones, the prefill, and the inputs of all rows.
    pending: list[tuple[Tensor, Prefill, dict[str, Any]]] = []

    def select(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        pending.clear()  # of a forward that raised
        ids, cache = kwargs.get("input_ids"), cache_in(kwargs)
        if args or ids is None or ids.shape[0] < 2 or ids.shape[1] < 2 or not kwargs.get("use_cache", True):
            return None
        if _holds_tokens(cache):
            return None
        first, index, prefill = _distinct_rows(ids, kwargs.get("attention_mask"))
        prefill.reason = why_not_share_prefill(base, kwargs)
        if prefill.reason is not None or len(first) == len(ids):
            if prefill.reason is not None:
                prefill.counts.tokens_forwarded = prefill.counts.row_tokens
            _report(on_prefill, prefill)
            return None
        pending.append((index, prefill, kwargs))
        return args, {name: _take(name, value, first) for name, value in kwargs.items()}

    def expand(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not pending:
            return None
        index, prefill, of_all_rows = pending.pop()
        cache = cache_in(of_all_rows)
        if cache is None or not hasattr(output, "logits") or cache_in(vars(output)) is not cache:
            raise RuntimeError(
                f"{type(module).__name__} was given a cache and does not return it, so its rows cannot be repeated: "
                "generate outside of shared_prefill (in TRL, prefix_grouper_generation=false)"
            )
        grow_in_place(cache)
        cache.reorder_cache(index)
        output.logits = output.logits[index]
        _report(on_prefill, prefill)
        return output

    hooks = [
        base.register_forward_pre_hook(select, with_kwargs=True),
        base.register_forward_hook(expand, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def why_not_share_prefill(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """Why a prefill with these inputs runs on every row; None if distinct rows are enough.

    Args:
        model: the model of transformers.
        inputs: keyword arguments of its forward.
    """
    base: Any = transformers_model(model)
    if hasattr(base.config, "vision_config"):
        return "a vision-language model keeps positions outside of its cache"
    if any(hasattr(module, "_setup_cache") for module in base.modules()):
        return f"{type(base).__name__} keeps states in its layers instead of in its cache"
    extra = [
        name
        for name, value in inputs.items()
        if value is not None and value is not False and name not in _ROW_INPUTS + _OTHER_INPUTS
    ]
    if extra:
        return f"`{extra[0]}` is an input of the forward that is not known here"
    if (reason := _why_not_repeat(cache_in(inputs))) is not None:
        return reason
    mask = inputs.get("attention_mask")
    return None if mask is None or _is_of_tokens(mask) else "attention_mask is not [rows, tokens]"


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or the outputs of a forward, or None."""
    return next((named[name] for name in CACHES if named.get(name) is not None), None)


def _holds_tokens(cache: Any) -> bool:
    """Whether tokens have been forwarded with ``cache``; one of recurrent layers alone has no length to tell."""
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "has_previous_state", False)  # of each of its states from transformers 5.24 on
        if any(states.values()) if isinstance(states, dict) else states:
            return True
        if getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0:
            return True
    return False


def _why_not_repeat(cache: Any) -> str | None:
    if cache is None:
        return "the forward makes its cache itself"
    if not hasattr(cache, "layers") or not hasattr(cache, "reorder_cache"):
        return f"{type(cache).__name__} cannot be repeated"
    found = {type(layer).__name__ for layer in cache.layers}
    if (appended := getattr(cache, "layer_class_to_replicate", None)) is not None:
        found.add(appended.__name__)
    unknown = sorted(found - _REPEATABLE_LAYERS)
    return f"a cache of {unknown[0]} cannot be repeated" if unknown else None


def _distinct_rows(ids: Tensor, mask: Any) -> tuple[Tensor, Tensor, Prefill]:
    """The first of each set of equal rows, which of these each row equals, and the counts if only these are forwarded."""
    real = torch.ones_like(ids) if not _is_of_tokens(mask) else mask
    rows = torch.where(real != 0, ids, -1).cpu()
    distinct: dict[bytes, int] = {}
    first: list[int] = []
    index: list[int] = []
    for i, row in enumerate(rows):
        key = row.numpy().tobytes()
        if key not in distinct:
            distinct[key] = len(first)
            first.append(i)
        index.append(distinct[key])
    lengths = (real != 0).sum(1).cpu()
    counts = Counts(
        tokens_forwarded=int(lengths[first].sum()), row_tokens=int(lengths.sum()), rows=len(rows), groups=len(first)
    )
    return torch.tensor(first, device=ids.device), torch.tensor(index, device=ids.device), Prefill(counts)


def _is_of_tokens(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _take(name: str, value: Any, rows: Tensor) -> Any:
    if name not in _ROW_INPUTS or value is None:
        return value
    # Positions may be those of one row, for all.
    return value if len(value) == 1 else value[rows]


def _report(on_prefill: Callable[[Prefill], None] | None, prefill: Prefill) -> None:
    if on_prefill is not None:
        on_prefill(prefill)
