"""Other people's ways to run attention over a group, for benchmarks/attention.py: each makes a forward-backward step.

All take the tokens that they need: the published package keeps the whole prompt in one segment, the others follow our
layout, whose branches start with the prompt's last token. The results are the same numbers; tests/benchmarks compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.bench import Attention, Case, Step


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """``[B, H, N, D]`` each. The CUDA kernels that take a mask know no grouped heads, so keys are repeated there."""
    if q.device.type != "cpu" and mask is not None:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def published(case: Case) -> Attention:
    """The package `prefix-grouper` of the paper's authors: keys and values of the prompt copied for each response.

    Its attention function is `scaled_dot_product_attention`; where nothing is padded, causal masks say all, so the
    prompt needs no mask tensor, and the responses one of ``[R, P + R]``.
    """
    from prefix_grouper import PrefixGrouper

    grouper = PrefixGrouper([[case.prompt] + [case.response] * case.group], device=case.device)
    forward = grouped_attention(grouper, case.prompt, case.response, case.device)
    return lambda query, key, value: forward(*(x.transpose(0, 1)[None] for x in (query, key, value)))[0]


def grouped_attention(
    grouper: Any, prompt: int, response: int, device: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`PrefixGrouper.forward` on query, key and value ``[1, H, T, D]`` of a group; returns ``[1, T, H, D]``."""
    mask = _bottom_right(response, prompt + response, device)

    def attention_function(q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor) -> Tensor:
        square = q.shape[2] == k.shape[2]
        return _sdpa(q, k, v, None if square else mask, causal=square).transpose(1, 2)

    return lambda query, key, value: grouper.forward(attention_function, query, key, value)


def gathered(case: Case) -> Attention:
    """Keys and values of every path gathered first, as TRL's tree attention does it (experimental/async_grpo).

    TRL then calls a varlen kernel of FlashAttention 3, bottom-right causal. Without one, this calls
    `scaled_dot_product_attention` for each segment, with a mask where the path is longer than the segment.
    """
    paths = _paths(case)
    index, queries, keys = torch.cat(paths), _lengths(case), [len(path) for path in paths]
    masks = {(q, k): _bottom_right(q, k, case.device) for q, k in zip(queries, keys, strict=True) if q != k}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (query.split(queries), key[index].split(keys), value[index].split(keys))
        out = []
        for row in zip(*parts, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in row)
            mask = masks.get((q.shape[2], k.shape[2]))
            out.append(_sdpa(q, k, v, mask, causal=mask is None)[0].transpose(0, 1))
        return torch.cat(out)

    return attention


def gathered_flash(case: Case) -> Attention:
    """The same, with one bottom-right causal varlen call of torch's CUDA flash kernels, and autograd for the gathered keys."""
    paths = _paths(case)
    queries, keys = _lengths(case), [len(path) for path in paths]
    lengths = (_cumulative(queries, case.device), _cumulative(keys, case.device), max(*queries, 2), max(keys))
    index = torch.cat(paths)
    return lambda query, key, value: _VarlenFlash.apply(query, key[index], value[index], lengths)


class _VarlenFlash(torch.autograd.Function):
    """Torch's varlen flash kernels; those of `torch.nn.attention.varlen` are not in every torch that we support."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...]) -> Tensor:
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, unused)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse, *states = ctx.saved_tensors
        inputs = (grads[0], q, k, v, out, lse, *ctx.lengths, 0.0, True)
        return *torch.ops.aten._flash_attention_backward(*inputs, *states), None


def dense_mask(case: Case) -> Attention:
    """One call of `scaled_dot_product_attention` with the whole ``T x T`` mask."""
    mask = visibility_mask(case.layout.segments).to(case.device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return _sdpa(q, k, v, mask)[0].transpose(0, 1)

    return attention


def tree_attention(case: Case) -> Attention:
    """TRL's own function, on a GPU with FlashAttention 3 from the kernels hub."""
    from trl.experimental.async_grpo import packing

    paths, queries = _paths(case), _lengths(case)
    keys = [len(path) for path in paths]
    arguments = {
        "tree_kv_index": torch.cat(paths),
        "tree_cu_seqlens_q": _cumulative(queries, case.device),
        "tree_cu_seqlens_k": _cumulative(keys, case.device),
        "tree_max_seqlen_q": max(queries),
        "tree_max_seqlen_k": max(keys),
    }

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return packing.tree_attention(torch.nn.Module(), q, k, v, None, **arguments)[0][0]

    return attention


def _paths(case: Case) -> list[Tensor]:
    """For each segment the packed positions of its ancestors' tokens and of its own."""
    paths: list[Tensor] = []
    for start, end, parent, _ in case.layout.segments.tolist():
        own = torch.arange(start, end, device=case.device)
        paths.append(own if parent < 0 else torch.cat([paths[parent], own]))
    return paths


def _lengths(case: Case) -> list[int]:
    return (case.layout.segments[:, 1] - case.layout.segments[:, 0]).tolist()


def _cumulative(lengths: list[int], device: str) -> Tensor:
    return F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()


def _bottom_right(queries: int, keys: int, device: str) -> Tensor:
    """``BoolTensor[queries, keys]``: causal, the last query seeing the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def other_step(name: str, case: Case) -> Step:
    """The step of the method called ``name``, one of `OTHERS`."""
    tokens = case.prompt + case.response * case.group if name == "published" else case.layout.num_tokens
    return case.step(OTHERS[name](case), tokens)


OTHERS = {
    "published": published,
    "gathered": gathered,
    "gathered_flash": gathered_flash,
    "dense_mask": dense_mask,
    "tree_attention": tree_attention,
}
