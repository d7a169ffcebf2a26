"""Flex backend: torch's FlexAttention with the exact block mask of the forest.

FlexAttention (arXiv 2412.05496) compiles an attention kernel around a rule that says which pairs are visible, and walks
only over the blocks of 128 x 128 pairs that a table names. torch builds that table by evaluating the rule on all
``T x T`` pairs; here it comes from the segments in O((T / 128)^2) (`block_tables`). Rows are padded to whole blocks
inside, the padding being one more tree, so that lengths vary without another code path.

The kernel's own backward wants the kernel's own output and log-sum-exp, but what was saved may hold attention sinks
too. So the backward runs the compiled forward once more, with gradients, and feeds it the gradients of both results
(see `backward`); only public interfaces of torch are used. FlexAttention has no backward on the CPU.

torch compiles once for each kind of layer, with dynamic lengths. Past its limit of compilations it may reuse code made
for something else; here the limit is an error. At the limit, and where a kernel does not compile, layers of that kind
are given up: each of their calls raises `CannotRun` with the reason, and another backend runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from prefix_grouper_plugins.attention.device import stream_of, upload, why_not_dtype, why_not_gpu
from prefix_grouper_plugins.attention.request import CannotRun, Options, Request
from prefix_grouper_plugins.forest import Forest

Result = TypeVar("Result")

BLOCK = 128
# Below 128 queries torch chooses another kernel, made for decoding; and a length of one block would be compiled apart.
SHORTEST = 2 * BLOCK
HEAD_DIMS = (16, 256)
KERNELS = "the kernels of FlexAttention"
# Kinds of layers times forward and backward; lengths do not count, they are dynamic.
RECOMPILE_LIMIT = 64
# A mask of 131,072 tokens takes 16 MB on the device, so fewer are kept than plans on the host.
CACHED_MASKS = 8

# Kinds of layers that torch could not compile, and why.
_given_up: dict[tuple[Any, ...], str] = {}


def why_not(request: Request) -> str | None:
    """Why this backend cannot serve ``request``, in words; None if it can."""
    if request.device.type == "cpu":
        return "FlexAttention has no backward on the CPU"
    if (reason := why_not_dtype(request, KERNELS) or why_not_gpu(request.device, KERNELS)) is not None:
        return reason
    fewest, most = HEAD_DIMS
    for head_dim in (request.head_dim, request.value_dim):
        if not fewest <= head_dim <= most:
            return f"head dim {head_dim} is not between {fewest} and {most}, which FlexAttention is used for"
    return _why_not_compiled()


def _why_not_compiled() -> str | None:
    from torch.utils._triton import has_triton

    if not has_triton():
        return "FlexAttention is compiled with Triton, which is not installed"
    if torch._dynamo.config.disable:
        return "FlexAttention has to be compiled, and torch.compile is switched off"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        query, key, value: ``[Q, H, D]``, ``[T, H_kv, D]``, ``[T, H_kv, D_v]``, ``Q = forest.num_queries``.
        forest: of the layout.
        options: of the layer.

    Returns:
        ``out [Q, H, D_v]`` in the query's dtype and ``lse [H, Q]`` (natural log) in float32 or float64.

    Raises:
        CannotRun: torch could not compile it.
    """
    queries = query.shape[0]

    def used(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out[0, :, :queries].transpose(0, 1), lse[0, :, :queries]

    # Not in inference mode: what is compiled and cached here also serves training.
    with torch.inference_mode(False), torch.no_grad():
        padded = _padded(forest, query, key, value)
        return _compiled_attention(padded, forest, options, used)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Let ``o, l`` be the kernel's own results and ``out, lse`` the merged ones, with sinks outside of the kernel. Then
    ``out = w * o`` with ``w = exp(l - lse)``, and since ``lse`` is the log-sum-exp of ``l`` and constants,
    ``dw / dl = w * (1 - w)``. Hence the kernel's gradients are fed with

        grad_o = w * grad_out        grad_l = sum(grad_out * o) * w * (1 - w) = sum(grad_out * out) * (1 - w)

    Args:
        grad_out, out: ``[Q, H, D_v]``.
        lse: ``[H, Q]``; it may hold the attention sinks, with ``out`` rescaled accordingly.
        query, key, value, forest, options: as in `forward`.

    Raises:
        CannotRun: torch could not compile it.
    """
    queries, keys = query.shape[0], key.shape[0]

    def gradients(own_out: Tensor, own_lse: Tensor) -> list[Tensor]:
        log_weight = (own_lse.detach()[0, :, :queries] - lse).clamp(max=0)
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
        grad_own_out, grad_own_lse = torch.zeros_like(own_out), torch.zeros_like(own_lse)
        grad_own_out[0, :, :queries] = (grad_out.to(lse.dtype) * log_weight.exp().t()[..., None]).transpose(0, 1)
        grad_own_lse[0, :, :queries] = -delta * log_weight.expm1()
        grads = torch.autograd.grad((own_out, own_lse), leaves, (grad_own_out, grad_own_lse))
        return [grad[0, :, :used].transpose(0, 1) for grad, used in zip(grads, (queries, keys, keys), strict=True)]

    # Inside a custom operator autograd is switched off below grad mode; without this nothing would be recorded.
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.inference_mode(False), recording, torch.enable_grad():
        leaves = [x.requires_grad_() for x in _padded(forest, query.detach(), key.detach(), value.detach())]
        dq, dk, dv = _compiled_attention(leaves, forest, options, gradients)
    return dq, dk, dv


def _padded_length(tokens: int) -> int:
    return max(-(-tokens // BLOCK) * BLOCK, SHORTEST)


def _padded_lengths(forest: Forest) -> tuple[int, int]:
    """Of queries and of keys: whole blocks each, and keys for the padding of the queries too."""
    queries = _padded_length(forest.num_queries)
    return queries, _padded_length(forest.num_given + queries)


def _padded(forest: Forest, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """``[N, H, D]`` to ``[1, H, N', D]`` padded with zeros. Always copies, so that all calls have the same strides."""
    queries, keys = _padded_lengths(forest)
    made = []
    for x, length in ((query, queries), (key, keys), (value, keys)):
        padded = x.new_zeros((length, *x.shape[1:]))
        padded[: x.shape[0]] = x
        made.append(padded.transpose(0, 1).unsqueeze(0))
    return made


# ---------------------------------------------------------------------------------------------------- the block mask


def padded_forest(forest: Forest, length: int) -> Forest:
    """``forest`` followed, up to ``length`` tokens, by a tree of padding: it sees itself and no token sees it."""
    if length == forest.num_tokens:
        return forest
    columns = np.stack([forest.start, forest.end, forest.parent, forest.subtree_end], axis=1)
    return Forest(np.concatenate([columns, [[forest.num_tokens, length, -1, length]]]), forest.num_given)


def block_tables(forest: Forest, window: int | None, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys (columns) a block of queries (rows) sees in part, and which in full.

    Args:
        forest: of a whole number of blocks of keys. Blocks of queries are counted from the first query on, and what is
            left of the queries after the last whole block is left out.
        window: sliding window in tokens of a row, or None.
        block: edge of a block in tokens.

    Returns:
        two ``bool [m, n]``, ``m = Q // block``, ``n = T / block``, never both True: some but not all pairs are visible; all
        pairs are.
    """
    rows, columns = forest.num_queries // block, forest.num_tokens // block
    seen = _seen_blocks(forest, window, block)
    # All pairs are visible: the subtrees of all keys reach beyond the last query, and no pair is too far apart.
    lowest_end = forest.token_subtree_end.reshape(columns, block).min(1)
    first_query = forest.num_given + np.arange(rows)[:, None] * block
    full = (first_query >= (np.arange(columns) + 1) * block) & (lowest_end >= first_query + block)
    if window is not None:
        depth = forest.token_depth.reshape(columns, block)
        query_depth = forest.token_depth[forest.num_given : forest.num_given + rows * block].reshape(rows, block)
        full &= query_depth.max(1)[:, None] - depth.min(1) < window
    return seen & ~full, full


def _seen_blocks(forest: Forest, window: int | None, block: int) -> np.ndarray:
    """``bool [m, n]``: at least one pair is visible.

    Queries of one segment in one block are a piece. The keys that a piece sees are one stretch of its path from the
    root, from the first key of its first query to its last query. Walking up the path, each segment contributes one
    range of packed positions, so one range of blocks, which is entered as +1 at its beginning and -1 after its end.
    """
    rows, columns, given = forest.num_queries // block, forest.num_tokens // block, forest.num_given
    behind = given + rows * block
    start = np.union1d(forest.start[(forest.start >= given) & (forest.start < behind)], np.arange(given, behind, block))
    last = np.append(start[1:], behind)
    segment = np.searchsorted(forest.start, start, side="right") - 1
    first_depth = np.zeros_like(start) if window is None else forest.token_depth[start] - window + 1
    row = (start - given) // block
    steps = np.zeros((rows, columns + 1), dtype=np.int32)
    while len(segment):
        k0 = forest.start[segment] + np.maximum(first_depth - forest.depth[segment], 0)
        k1 = np.minimum(last, forest.end[segment])
        hit = k0 < k1
        np.add.at(steps, (row[hit], k0[hit] // block), 1)
        np.add.at(steps, (row[hit], (k1[hit] - 1) // block + 1), -1)
        up = (forest.parent[segment] >= 0) & (first_depth < forest.depth[segment])
        segment, first_depth, last, row = forest.parent[segment][up], first_depth[up], last[up], row[up]
    return steps.cumsum(1)[:, :columns] > 0


@lru_cache(maxsize=CACHED_MASKS)
def block_mask(forest: Forest, window: int | None, device: torch.device, stream: int = 0) -> torch_flex.BlockMask:
    """The exact mask of the padded forest, on ``device``: 4 tables of ``(T' / 128)^2`` and up to 3 of ``T'`` int32.

    Call it outside of inference mode: it is cached, and autograd could not save tensors made inside.
    """
    queries, keys = _padded_lengths(forest)
    padded = padded_forest(forest, keys)
    tables = block_tables(padded, window)
    by_query_and_key = [x for seen in (*tables, *(t.T for t in tables)) for x in _ordered(seen, device)]
    rest: tuple[Any, ...] = (*by_query_and_key, (BLOCK, BLOCK), _mask_mod(padded, window, device))
    return torch_flex.BlockMask((queries, keys), *rest)


def _ordered(seen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """``int32 [1, 1, n]`` and ``[1, 1, n, n]``: how many blocks each row has, and their numbers first in each row."""
    counts, numbers = seen.sum(1, dtype=np.int32), np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    return upload(counts, device)[None, None], upload(numbers, device)[None, None]


def _mask_mod(forest: Forest, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """The rule for single pairs, as FlexAttention calls it. It reads tensors only: a number would be compiled in."""
    subtree_end = upload(forest.token_subtree_end.astype(np.int32), device)
    # A packed position for each query, only where the two differ: a table to read costs the kernels a little.
    position = None
    if forest.num_given:
        position = upload(np.arange(forest.num_given, forest.num_tokens, dtype=np.int32), device)

    def in_forest(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if position is None else position[query]
        return (key <= at) & (at < subtree_end[key])

    if window is None:
        return in_forest
    tables = (forest.token_depth, forest.token_depth[forest.num_given :] - window + 1)
    depth, first_depth = (upload(table.astype(np.int32), device) for table in tables)

    def in_forest_and_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_forest(batch, head, query, key) & (depth[key] >= first_depth[query])

    return in_forest_and_window


# ------------------------------------------------------------------------------------------------------- compilation


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: torch_flex.BlockMask,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What is compiled: ``out [1, H, T', D_v]`` and ``lse [1, H, T']``, natural log."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

    options: dict[str, Any] = {
        "score_mod": None if softcap is None else capped,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": True,
    }
    # Not ROWS_GUARANTEED_SAFE, although every query sees itself: torch's kernel counts on a visible key in the first tile that
    # it walks over, which holds for no response that begins within a block, and takes NaN from exp2(-inf + inf) otherwise.
    if hasattr(torch_flex, "AuxRequest"):
        out, aux = torch_flex.flex_attention(query, key, value, **options, return_aux=torch_flex.AuxRequest(lse=True))
        return out, aux.lse
    return torch_flex.flex_attention(query, key, value, **options, return_lse=True)  # torch < 2.9


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_attention, dynamic=True, fullgraph=True)


def _compiled_attention(
    tensors: list[Tensor], forest: Forest, options: Options, finish: Callable[[Tensor, Tensor], Result]
) -> Result:
    """``finish(out, lse)`` of `_attention`.

    Args:
        tensors: padded query, key and value.
        forest, options: as in `forward`.
        finish: what is made of the results. A backward may be compiled only when it runs, so it belongs in here.

    Raises:
        CannotRun: torch could not compile that, now or before.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.runtime.triton_heuristics import NoTritonConfigsError

    query, key, value = tensors
    widths = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    kind = (query.device, query.dtype, widths, options.scale, options.window is None, options.softcap)
    if kind in _given_up:
        raise CannotRun(_given_up[kind])
    limits: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "fail_on_recompile_limit_hit": True}
    limits["suppress_errors"] = False  # torch allows one of the two only
    mask = block_mask(forest, options.window, query.device, stream_of(query.device))
    try:
        # Scale and softcap are compiled in: they belong to the model, and FlexAttention wants numbers.
        with torch._dynamo.config.patch(**limits, specialize_float=True):
            return finish(*_compiled()(query, key, value, mask, options.scale, options.softcap))
    except FailOnRecompileLimitHit:
        _given_up[kind] = f"torch has compiled it {RECOMPILE_LIMIT} times"
    except (TorchDynamoException, NoTritonConfigsError) as error:  # the latter from a first run, out of shared memory
        cause = getattr(error, "inner_exception", error)
        message = str(cause).strip().partition("\n")[0]
        _given_up[kind] = f"torch could not compile it ({type(cause).__name__}: {message})"
    raise CannotRun(_given_up[kind])
