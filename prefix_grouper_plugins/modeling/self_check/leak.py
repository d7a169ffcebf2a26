"""A layout with one error made on purpose: what a comparison has to notice.

A comparison that finds no difference says little unless an error would have been seen in it. The smallest error of attention
over packed rows is one key that a token of another row sees. So that key is leaked, and the size of what it does is
reported with what was found.
"""

from __future__ import annotations

import torch

from prefix_grouper_plugins.layout import PrefixLayout


def leak_one_key(layout: PrefixLayout) -> PrefixLayout | None:
    """``layout``, in which the first token of a branch is seen by all tokens of the next branch of the same prompt.

    Where no prompt has two branches, it is the next prompt that sees it.

    Args:
        layout: whose given tokens, if any, are left as they are.

    Returns:
        the same positions and labels in another tree; None where there are no two branches side by side.
    """
    segments = layout.segments
    rows = layout.num_tokens - layout.num_padding  # padding is a segment of no row
    starts = {(start, parent): index for index, (start, _, parent, _) in enumerate(segments.tolist()) if start < rows}
    pairs = [
        (index, starts[subtree_end, parent])
        for index, (start, _, parent, subtree_end) in enumerate(segments.tolist())
        if start >= layout.num_given and (subtree_end, parent) in starts
    ]
    if not pairs:
        return None
    index, other = max(pairs, key=lambda pair: int(segments[pair[0], 2]) >= 0)
    start, end, parent, subtree_end = segments[index].tolist()
    reach = int(segments[other, 3])
    behind = segments[index + 1 :].clone()
    halves = [[start, start + 1, parent, reach]]
    if end - start > 1:  # the rest of the branch is a child of its first token
        halves.append([start + 1, end, index, subtree_end])
        behind[:, 2] += (behind[:, 2] >= index).to(behind.dtype)
    behind[other - index - 1, 2] = index
    leaking = layout.to(layout.position_ids.device)
    leaking.segments = torch.cat([segments[:index], segments.new_tensor(halves), behind])
    leaking.subtree_end = layout.subtree_end.clone()
    leaking.subtree_end[start] = reach
    return leaking
