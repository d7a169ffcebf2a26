"""What the rows of a whole training batch share, for the driver that deals them out to ranks.

verl's V1 trainer has names and lengths of rows, but not their tokens; V0 has the tokens. Nothing is forwarded by these
sizes: they decide which rows come to one rank, and the engines look at the tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from torch import Tensor

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.micro_batches import RowSize, sizes_in


def sizes_by_tokens(uids: Sequence[Hashable], ids: Tensor, mask: Tensor, width: int, share: str) -> list[RowSize]:
    """Rows of V0, each group those of one ``uid``.

    Args:
        uids: one for each row.
        ids, mask: ``[B, P + R]``, prompts padded on the left and responses on the right.
        width: ``P``.
        share: ``prefix_grouper.share``.
    """
    rows = [row[own] for row, own in zip(ids.cpu(), mask.cpu() != 0, strict=True)]
    prompts = mask[:, :width].sum(1).tolist()
    layout = PrefixLayout.from_rows(rows, shareable=prompts, min_level=None if share == "prompt" else 1)
    return sizes_in(layout, uids, prompts)


def sizes_by_names(keys: Sequence[str], lengths: Sequence[tuple[int, int]], share: str) -> list[RowSize]:
    """Rows of V1, each group those of one ``uid`` whose first prompts have equal lengths.

    Sessions of a ``uid`` share their prompt. An agent loop's later output goes on where the one before it ended, if its
    prompt is at least that long.

    Args:
        keys: ``uid_session_output`` of each row.
        lengths: tokens of each prompt, and of each row.
        share: ``prefix_grouper.share``.
    """
    sessions: dict[tuple[str, str], list[tuple[int, str, int]]] = defaultdict(list)
    for row, key in enumerate(keys):
        uid, session, output = key.rsplit("_", 2)
        sessions[uid, session].append((len(output), output, row))  # by number, 10 after 9
    sizes: dict[int, RowSize] = {}
    for (uid, session), outputs in sessions.items():
        rows = [row for *_, row in sorted(outputs)]
        first = lengths[rows[0]][0]
        root: tuple[tuple[Hashable, int], ...] = (((uid, first), first - 1),)
        path, ended = root, 0
        for number, row in enumerate(rows):
            prompt, total = lengths[row]
            if prompt < ended:  # not what was there before: a context that was cut
                path = root if prompt >= first else ()
            others_share = (prompt if share == "prompt" else total) - 1 - sum(tokens for _, tokens in path)
            if number + 1 < len(rows):
                path = (*path, ((uid, session, number), max(others_share, 0)))
            sizes[row] = RowSize((uid, first), prompt, total - prompt, path)
            ended = total
    return [sizes[row] for row in range(len(keys))]
