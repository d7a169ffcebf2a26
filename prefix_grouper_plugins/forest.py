"""The segments of a layout on the host, in numpy: depth, level and subtree of each.

Every plan (tiles, varlen calls, scans) is a pure function of the segments, which always live on the CPU, so planning
never waits for a device. All layers of a model ask for the same plans, hence the caches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Layouts kept in each cache: the micro-batches of a step and their recomputation, not a whole epoch.
CACHED_LAYOUTS = 64


class Forest:
    """The segments of a layout as numpy arrays, with the depth that sliding windows are measured in.

    A token's depth is the position it has in its row, derived from the tree: a root starts at 0, a child where its
    parent ends. ``position_ids`` are not used, for integrations put offsets into them.

    Attributes:
        start, end, parent, subtree_end (`int64 [S]`): the columns of ``layout.segments``.
        depth (`int64 [S]`): depth of the first token of each segment.
        level (`int64 [S]`): number of ancestors of each segment.
        token_depth, token_subtree_end (`int64 [T]`): depth and subtree end of each token.
        deepest_row (`int`): tokens on the longest path from a root; a window that wide hides nothing.
    """

    def __init__(self, segments: np.ndarray) -> None:
        """
        Args:
            segments: ``[S, 4]`` integers, ``start, end, parent, subtree_end`` in depth-first pre-order.
        """
        self.start, self.end, self.parent, self.subtree_end = segments.astype(np.int64).T
        self.depth = np.zeros_like(self.start)
        self.level = np.zeros_like(self.start)
        lengths = self.end - self.start
        for s, parent in enumerate(self.parent.tolist()):
            if parent >= 0:  # pre-order: the parent is done
                self.depth[s] = self.depth[parent] + lengths[parent]
                self.level[s] = self.level[parent] + 1
        segment_of = np.repeat(np.arange(len(self.start)), lengths)
        self.num_tokens = int(self.end[-1])
        self.token_depth = np.arange(self.num_tokens) - self.start[segment_of] + self.depth[segment_of]
        self.token_subtree_end = self.subtree_end[segment_of]
        self.deepest_row = int((self.depth + lengths).max())

    def effective_window(self, window: int | None) -> int | None:
        """``window``, or None where it is wide enough to hide nothing in this forest."""
        return None if window is None or window >= self.deepest_row else window


def forest_of(segments: Tensor) -> Forest:
    """The `Forest` of ``segments`` (``IntTensor[S, 4]`` on the CPU), cached by content.

    Raises:
        ValueError: ``segments`` is not on the CPU; reading it would wait for the device.
    """
    if segments.device.type != "cpu":
        raise ValueError(f"segments are on {segments.device}: keep layout.segments on the CPU, where plans are made")
    table = segments.detach().to(torch.int32).contiguous().numpy()
    return _forest(table.tobytes())


@lru_cache(maxsize=CACHED_LAYOUTS)
def _forest(table: bytes) -> Forest:
    return Forest(np.frombuffer(table, dtype=np.int32).reshape(-1, 4))
