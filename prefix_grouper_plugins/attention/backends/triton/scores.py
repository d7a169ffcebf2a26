"""What the Triton kernels of both directions share: the scores of a tile, and which of them are visible.

Products of float32 are taken as three TF32 products (``tf32x3``), nearly as exact as float32 and on the matrix units;
the option means nothing to half precision.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_scores(products, inner, outer, CAPPED: tl.constexpr):
    """Scores in base 2 from ``q . k``, and ``tanh`` of the uncapped ones, which the backward needs.

    Without a cap ``inner`` is ``scale * log2(e)``. With one it is ``scale / softcap``, and ``outer`` is
    ``softcap * log2(e)``.
    """
    if CAPPED:
        tanh = 2.0 * tl.sigmoid(2.0 * inner * products) - 1.0
        scores = tanh * outer
    else:
        tanh = products  # unused
        scores = products * inner
    return scores, tanh


@triton.jit
def visible(queries, keys, key_ends, query_depth, key_depth, window, WINDOWED: tl.constexpr):
    """Which query sees which key; all arguments broadcast to the shape of a tile.

    ``key_ends`` is ``subtree_end`` of the keys, 0 where there is none. Depth counts tokens from a row's start.
    """
    seen = (keys <= queries) & (queries < key_ends)
    if WINDOWED:
        seen = seen & (query_depth - key_depth < window)
    return seen
