"""PrefixLayout: which packed position belongs to which token of which rows.

A trainer holds *rows* (prompt and response, one after the other). Rows that begin alike are laid out as a forest of
*segments* in depth-first pre-order, and every segment is forwarded once. The idea is Prefix Grouper's (arXiv
2506.05433), carried from one prompt and its responses to prefix trees of any depth.

The branch rule: a row of ``L`` tokens has ``L - 1`` *transitions* (a token and the one that follows it), and a packed
position is one distinct transition: rows share it when they agree up to and including its second token. Seen as tokens,
every branch repeats the last token of what it branches from and drops its own last token, so each packed position has
exactly one next-token label::

    rows     P P P P a a a          packed   P P P | P a a | P b b b          T = (P - 1) + sum(R_i)
             P P P P b b b b                 prefix  row 0   row 1

Visibility needs one integer per key: query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import IntTensor, LongTensor, Tensor

IGNORE_INDEX = -100  # the label of a position without one, as in torch.nn.functional.cross_entropy
MAX_TOKENS = 2**31 - 1  # of a packed row, whose positions are int32


def on_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """``x`` on ``device``. To a GPU the copy is queued from pinned memory: a plain one waits until the GPU has done all its work.

    So the copy is ordered with the current stream alone.
    """
    if device is not None and torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class _Node:
    """A run of transitions ``[start, end)``, counted from the beginning of the row, which the rows below it share."""

    __slots__ = ("children", "end", "first_row", "prompt", "rows", "start")

    def __init__(self, start: int, end: int, row: int, prompt: int = 0) -> None:
        self.start, self.end = start, end
        self.first_row = row  # smallest row below: gives the tokens, and the order among siblings
        self.prompt = prompt  # tokens of the shortest prompt below
        self.rows: list[int] = []  # rows whose last transition is `end - 1`
        self.children: list[_Node] = []

    def split(self, depth: int) -> None:
        """Cut this run at ``depth``: it keeps ``[start, depth)``, a new only child takes the rest."""
        lower = _Node(depth, self.end, self.first_row, self.prompt)
        lower.rows, lower.children = self.rows, self.children
        self.end, self.rows, self.children = depth, [], [lower]


class PrefixLayout:
    """How rows with shared prefixes lie in one packed row of ``T`` tokens.

    Make one with :meth:`from_groups` (lengths are known) or :meth:`from_rows` (shared prefixes are found by comparing
    token ids). A plain class on purpose: FSDP2 copies dataclass arguments.

    Attributes:
        position_ids (`LongTensor[T]`): the position that each packed token has in its row, counted from 0.
        subtree_end (`IntTensor[T]`): query ``q`` sees key ``k`` iff ``k <= q < subtree_end[k]``.
        segments (`IntTensor[S, 4]`): ``start, end, parent, subtree_end`` of every segment in depth-first pre-order,
            ``parent`` is -1 for a root. Always on the CPU: kernels plan on the host, without a device sync.
        row_lengths (`tuple[int, ...]`): tokens of each row.
        source_index (`LongTensor[T]`): index of each packed token in the rows laid end to end.
        row_index (`LongTensor[sum(L_i - 1)]`): packed position of each transition of the rows laid end to end.
        num_padding (`int`): tokens at the end that belong to no row, see :meth:`pad_to`.
        blocks (`IntTensor[N, 2]`): first token and end of each block of tokens that see each other in both directions,
            such as an image, in packed order; None for none. Always on the CPU. See `attention.bidirectional.blocks_of`.
        num_given (`int`): leading tokens, whole segments, that have keys only, see :meth:`given`. All attributes but
            ``segments``, ``subtree_end`` and ``blocks`` then speak of the other ``num_queries`` tokens.
        blocks_cut_by_window (`bool`): whether a sliding window hides tokens of a query's own block too.
        blocks_in_windows_only (`bool`): whether layers without a sliding window ignore ``blocks``.
    """

    num_padding: int = 0
    num_given: int = 0
    _given_of_rows: tuple[int, ...] = ()
    _row_index_on_host: Tensor
    cache: Any = None  # the `modeling.prompt_cache.PromptCache` that the tokens of this layout fill or read
    blocks: IntTensor | None = None
    blocks_cut_by_window: bool = False
    blocks_in_windows_only: bool = False

    @torch.inference_mode(False)  # a layout that was made for scoring may serve training too
    def __init__(self, roots: Sequence[_Node], row_lengths: Sequence[int], device: torch.device | None = None) -> None:
        self.row_lengths = tuple(map(operator.index, row_lengths))
        nodes, segments = _place(roots)
        starts, ends = segments[:, 0].astype(np.int64), segments[:, 1].astype(np.int64)
        offsets = np.concatenate(([0], np.cumsum(self.row_lengths)))
        depth = np.array([node.start for node in nodes], dtype=np.int64)
        first_token = np.array([offsets[node.first_row] + node.start for node in nodes], dtype=np.int64)
        packed = np.arange(ends[-1])
        segment_of = np.repeat(np.arange(len(nodes)), ends - starts)
        into = packed - starts[segment_of]
        self.segments = torch.from_numpy(segments)
        self.position_ids = on_device(torch.from_numpy(depth[segment_of] + into), device)
        self.subtree_end = on_device(torch.from_numpy(segments[segment_of, 3]), device)
        self.source_index = on_device(torch.from_numpy(first_token[segment_of] + into), device)
        # Planning reads it, and reads of a device tensor wait until the device has done all its work.
        self._row_index_on_host = torch.from_numpy(_row_index(nodes, segments, len(self.row_lengths)))
        self.row_index = on_device(self._row_index_on_host, device)

    @classmethod
    def from_groups(
        cls,
        prompt_lengths: Sequence[int],
        response_lengths: Sequence[Sequence[int]],
        *,
        device: torch.device | str | None = None,
    ) -> PrefixLayout:
        """Layout of groups whose lengths are known: ``prompt_lengths[g]`` tokens, then one response for each row.

        The rows are the responses in the order given, each after its prompt: ``P_g + R_gi`` tokens.

        Args:
            prompt_lengths: tokens of each group's prompt, at least 1.
            response_lengths: tokens of each response of each group, at least 1; groups may differ in size.
            device: where the layout's tensors live (``segments`` stays on the CPU).

        Raises:
            ValueError: no group, an empty prompt, group or response, or lists of different lengths.
        """
        if len(prompt_lengths) != len(response_lengths):
            raise ValueError(
                f"prompt_lengths has {len(prompt_lengths)} entries and response_lengths has {len(response_lengths)}: "
                "give one list of response lengths for each prompt"
            )
        if not prompt_lengths:
            raise ValueError("prompt_lengths is empty: a layout needs at least one group")
        roots: list[_Node] = []
        row_lengths: list[int] = []
        for group, (prompt, responses) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
            _check_group(group, prompt, responses)
            branches = roots
            shared = prompt - 1 if len(responses) > 1 else 0  # a single response is one segment with its prompt
            if shared:
                roots.append(_Node(0, shared, len(row_lengths)))
                branches = roots[-1].children
            for response in responses:
                leaf = _Node(shared, prompt - 1 + response, len(row_lengths))
                leaf.rows.append(len(row_lengths))
                branches.append(leaf)
                row_lengths.append(prompt + response)
        return cls(roots, row_lengths, None if device is None else torch.device(device))

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Tensor],
        keys: Sequence[Hashable] | None = None,
        *,
        shareable: Sequence[int] | None = None,
        min_level: int | None = None,
    ) -> PrefixLayout:
        """Layout of any prefix tree, found by comparing token ids: nothing that two rows have in common is run twice.

        Each level of the tree costs attention a call and a merge, so one of few tokens can cost more than it saves.
        With both ``shareable`` and ``min_level``, the leading tokens are shared in any case, and what follows them
        where a level has at least ``min_level`` tokens.

        Args:
            rows: token ids of each row, ``LongTensor[L_i]``, at least one token each, in any order.
            keys: one hashable for each row; rows with different keys never share (other images, another adapter).
            shareable: how many leading tokens of each row may be shared, by default all. A trainer passes the prompt
                lengths.
            min_level: share tokens after ``shareable`` too, in levels of at least this many tokens: 1 for all that rows
                have in common, None for nothing.

        Raises:
            ValueError: no rows, an empty row, a row that is not a 1-D integer tensor, no row of two tokens or more,
                ``keys`` or ``shareable`` of another length than ``rows``, or a ``min_level`` below 1.
        """
        _check_rows(rows)
        if min_level is not None and min_level < 1:
            raise ValueError(f"min_level is {min_level}: give the tokens of the shortest level, at least 1")
        for name, values in (("keys", keys), ("shareable", shareable)):
            if values is not None and len(values) != len(rows):
                raise ValueError(f"{name} has {len(values)} entries for {len(rows)} rows: give one for each row")
        tokens = [row.detach().to("cpu", torch.int64).numpy() for row in rows]
        prompts = [0] * len(rows) if shareable is None else [max(int(n), 0) for n in shareable]
        whole = shareable is None or min_level is not None
        heads = tokens if whole else [t[:n] for t, n in zip(tokens, prompts, strict=True)]
        by_key: dict[Hashable, list[int]] = {}
        for row, key in enumerate([None] * len(rows) if keys is None else keys):
            by_key.setdefault(key, []).append(row)
        lengths = [len(t) for t in tokens]
        tries = [_trie(members, heads, lengths, prompts) for members in by_key.values()]
        if min_level is not None:
            for trie in tries:
                _dissolve_short_levels(trie, min_level)
        roots = [root for trie in tries for root in trie.children]
        return cls(roots, lengths, rows[0].device)

    @classmethod
    def from_segments(cls, lengths: Sequence[int], parents: Sequence[int]) -> PrefixLayout:
        """Layout of a forest whose segments are known, in depth-first pre-order: a row for each leaf.

        Args:
            lengths: tokens of each segment, at least 1.
            parents: which segment each of them branches from, -1 for a root.

        Raises:
            ValueError: no segments, lists of different lengths, or another order.
        """
        if not lengths or len(lengths) != len(parents):
            raise ValueError(
                f"lengths has {len(lengths)} entries and parents has {len(parents)}: give both for each segment, at least one"
            )
        nodes: list[_Node] = []
        roots: list[_Node] = []
        for length, parent in zip(lengths, parents, strict=True):
            if not -1 <= parent < len(nodes) or length < 1:
                raise ValueError(
                    f"segment {len(nodes)} has {length} tokens and parent {parent}: parents come before their branches, "
                    "and each segment has a token"
                )
            start = nodes[parent].end if parent >= 0 else 0
            nodes.append(_Node(start, start + length, len(nodes)))
            (nodes[parent].children if parent >= 0 else roots).append(nodes[-1])
        row_lengths: list[int] = []
        first_rows: dict[int, int] = {}
        for index, node in enumerate(nodes):
            first_rows[index] = len(row_lengths)
            if not node.children:
                node.rows.append(len(row_lengths))
                row_lengths.append(node.end + 1)
        for index, node in enumerate(nodes):
            node.first_row = first_rows[index]
        layout = cls(roots, row_lengths)
        if layout.segments[:, 2].tolist() != list(parents):
            raise ValueError("the segments are not in depth-first pre-order: a segment's branches follow it")
        return layout

    @property
    def num_tokens(self) -> int:
        """``T``, the tokens that have keys: those that are forwarded, and given ones."""
        return self.subtree_end.shape[0]

    @property
    def num_queries(self) -> int:
        """Tokens that are forwarded: all but the given ones."""
        return self.num_tokens - self.num_given

    @property
    def num_row_tokens(self) -> int:
        """Tokens that an ordinary forward without padding would process."""
        return sum(self.row_lengths)

    @property
    def rows_per_position(self) -> LongTensor:
        """``LongTensor[num_queries]``: how many rows share each packed position that is forwarded."""
        return torch.bincount(self.row_index, minlength=self.num_queries)  # type: ignore[return-value]

    @property
    def row_segments(self) -> list[list[int]]:
        """For each row the segments that it goes through, from the root down; none for a row of one token."""
        parents = self.segments[:, 2].tolist()
        ends = np.cumsum([length - 1 - given for length, given in self._row_spans()])
        index = self._row_index_on_host.numpy() + self.num_given
        last = [int(index[end - 1]) if end > begin else -1 for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        paths = []
        for segment in (np.searchsorted(self.segments[:, 0].numpy(), last, side="right") - 1).tolist():
            path = []
            while segment >= 0:
                path.append(segment)
                segment = parents[segment]
            paths.append(path[::-1])
        return paths

    @property
    def shared_by_level(self) -> list[int]:
        """For each level of the tree how many tokens rows share at it: those of the rows less those that are laid out."""
        rows = np.zeros(len(self.segments), dtype=np.int64)
        level = np.zeros(len(self.segments), dtype=np.int64)
        for path in self.row_segments:
            rows[path], level[path] = rows[path] + 1, np.arange(len(path))
        lengths = (self.segments[:, 1] - self.segments[:, 0]).numpy() * (self.segments[:, 0].numpy() >= self.num_given)
        shared = np.bincount(level, weights=lengths * np.maximum(rows - 1, 0)).astype(int).tolist()
        while shared and not shared[-1]:
            shared.pop()
        return shared

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> PrefixLayout:
        """The same layout with its tensors on ``device`` (``segments`` and ``blocks`` stay on the CPU)."""
        moved = copy(self)
        for name in ("position_ids", "subtree_end", "source_index", "row_index"):
            setattr(moved, name, on_device(getattr(self, name), device))
        return moved

    @torch.inference_mode(False)
    def given(self, num_tokens: int) -> PrefixLayout:
        """The same rows, with the first ``num_tokens`` tokens *given*: their keys and values come from another forward.

        So the parts of a group reuse its prompt: a part is laid out after its prompt, as usual, and only what
        follows is forwarded. :meth:`pack`, :meth:`labels` and ``position_ids`` then have ``num_queries`` entries,
        :meth:`unpack` takes as many and leaves out each row's given transitions, and queries are a suffix of the keys.
        The rows that are passed in are whole.

        Args:
            num_tokens: tokens at the beginning of one path from a root: of a prompt of ``P`` tokens, the first ``P - 1``.
                A segment that goes on after them is cut in two.

        Raises:
            ValueError: the tokens are not the beginning of one path, or none would be left to forward.
        """
        if self.num_given:
            raise ValueError(f"{self.num_given} tokens of this layout are given already: start from the whole layout")
        if not 0 <= num_tokens < self.num_tokens:
            raise ValueError(f"num_tokens={num_tokens}: from 0 to {self.num_tokens - 1} of the tokens can be given")
        part = self.to(self.position_ids.device)
        part.segments = _cut(self.segments, num_tokens)
        inside = part.segments[part.segments[:, 0] < num_tokens, 2].tolist()
        if inside != list(range(-1, len(inside) - 1)):
            raise ValueError(f"num_tokens={num_tokens} is not the beginning of one row: give the tokens of one prompt")
        part.num_given = num_tokens
        part.position_ids, part.source_index = self.position_ids[num_tokens:], self.source_index[num_tokens:]
        index = self._row_index_on_host
        part._row_index_on_host = index[index >= num_tokens] - num_tokens
        part.row_index = on_device(part._row_index_on_host, self.row_index.device)
        paths = index.split([length - 1 for length in self.row_lengths])
        part._given_of_rows = tuple(int((path < num_tokens).sum()) for path in paths)
        return part

    @torch.inference_mode(False)
    def pad_to(self, num_tokens: int) -> PrefixLayout:
        """The same rows, followed by padding so that ``T`` is ``num_tokens``: for fixed shapes and equal pieces.

        Padding is a segment that belongs to no row: no token of a row sees it, its positions count from 0, its label
        is -100, :meth:`pack` fills it with the first token, and :meth:`unpack` leaves it out.

        Raises:
            ValueError: ``num_tokens`` is smaller than ``T``.
        """
        added = num_tokens - self.num_tokens
        if added < 0:
            raise ValueError(f"num_tokens={num_tokens} is smaller than the {self.num_tokens} tokens of the layout")
        if not added:
            return self
        padded = self.to(self.position_ids.device)
        start, positions = self.num_tokens, self.position_ids
        padded.num_padding = self.num_padding + added
        padded.segments = torch.cat([self.segments, self.segments.new_tensor([[start, num_tokens, -1, num_tokens]])])
        padded.position_ids = torch.cat([positions, torch.arange(added, device=positions.device)])
        padded.subtree_end = torch.cat([self.subtree_end, self.subtree_end.new_full((added,), num_tokens)])
        padded.source_index = torch.cat([self.source_index, self.source_index.new_zeros(added)])
        return padded

    def pack(self, rows: Sequence[Tensor]) -> Tensor:
        """Per-row values ``[L_i, ...]`` to packed ``[T, ...]``; shared positions take the first row's. Differentiable.

        Raises:
            ValueError: another number of rows, or a row of another length, than the layout was made for.
        """
        return torch.cat(self._checked(rows))[self.source_index]

    def labels(self, rows: Sequence[Tensor]) -> LongTensor:
        """Next token of each packed position, ``LongTensor[T]``, -100 where there is none.

        By the branch rule each position has a label, except for padding (:meth:`pad_to`).

        Raises:
            ValueError: another number of rows, or a row of another length, than the layout was made for.
        """
        real = self.num_queries - self.num_padding
        labels = torch.cat(self._checked(rows))[self.source_index[:real] + 1]
        return torch.cat([labels, labels.new_full((self.num_padding,), IGNORE_INDEX)])  # type: ignore[return-value]

    def unpack(self, values: Tensor) -> list[Tensor]:
        """Packed values ``[T, ...]`` to one ``[L_i - 1, ...]`` for each row; shared positions fan out. Differentiable.

        Raises:
            ValueError: ``values`` has another number of positions than the layout.
        """
        if values.shape[0] != self.num_queries:
            raise ValueError(f"values has {values.shape[0]} positions, the layout has {self.num_queries}")
        return list(values[self.row_index].split([length - 1 - given for length, given in self._row_spans()]))

    def _row_spans(self) -> list[tuple[int, int]]:
        """Tokens of each row, and how many of its transitions are given."""
        return list(zip(self.row_lengths, self._given_of_rows or [0] * len(self.row_lengths), strict=True))

    def _checked(self, rows: Sequence[Tensor]) -> list[Tensor]:
        lengths = tuple(len(row) for row in rows)
        if len(lengths) != len(self.row_lengths):
            raise ValueError(f"got {len(lengths)} rows, the layout was made for {len(self.row_lengths)}")
        if lengths != self.row_lengths:
            row = next(i for i, length in enumerate(lengths) if length != self.row_lengths[i])
            raise ValueError(f"row {row} has {lengths[row]} tokens, the layout was made for {self.row_lengths[row]}")
        return list(rows)

    def __repr__(self) -> str:
        return (
            f"PrefixLayout({len(self.row_lengths)} rows of {self.num_row_tokens} tokens in {self.num_tokens} "
            f"packed tokens and {len(self.segments)} segments)"
        )


def _cut(segments: Tensor, position: int) -> Tensor:
    """``segments``, with the one that ``position`` lies inside of cut in two."""
    inside = ((segments[:, 0] < position) & (position < segments[:, 1])).nonzero()
    if not len(inside):
        return segments
    index = int(inside[0])
    start, end, parent, subtree_end = segments[index].tolist()
    halves = segments.new_tensor([[start, position, parent, subtree_end], [position, end, index, subtree_end]])
    behind = segments[index + 1 :].clone()
    behind[:, 2] += (behind[:, 2] >= index).to(behind.dtype)
    return torch.cat([segments[:index], halves, behind])


def _check_group(group: int, prompt: int, responses: Sequence[int]) -> None:
    if prompt < 1:
        raise ValueError(f"prompt_lengths[{group}] is {prompt}: a prompt needs at least one token")
    if not responses:
        raise ValueError(f"response_lengths[{group}] is empty: a group needs at least one response")
    for i, response in enumerate(responses):
        if response < 1:
            raise ValueError(
                f"response_lengths[{group}][{i}] is {response}: a response needs at least one token; leave the row out"
            )


def _check_rows(rows: Sequence[Tensor]) -> None:
    if not len(rows):
        raise ValueError("rows is empty: a layout needs at least one row")
    for i, row in enumerate(rows):
        if row.dim() != 1 or row.is_floating_point() or row.is_complex():
            raise ValueError(f"rows[{i}] is a {row.dtype} tensor of shape {tuple(row.shape)}: token ids [L] are needed")
        if not len(row):
            raise ValueError(f"rows[{i}] is empty: a row needs at least one token")
    if max(len(row) for row in rows) < 2:
        raise ValueError("every row has one token, which has no next token to predict: give rows of two or more")


def _trie(members: Sequence[int], heads: Sequence[np.ndarray], lengths: Sequence[int], prompts: Sequence[int]) -> _Node:
    """A node without tokens above the forest of the rows ``members``, whose shareable tokens are ``heads``.

    Sorted rows meet their longest common prefix in a neighbour, so the tree grows along its rightmost path alone
    (Kasai et al. 2001, the traversal of suffix arrays by LCP values). Sorting compares raw bytes: any order serves
    that puts equal beginnings side by side. Python loops run over rows and segments, never over tokens.
    """
    order = sorted(members, key=lambda row: heads[row].tobytes())
    top = _Node(0, 0, order[0], prompts[order[0]])
    path = [top]
    previous: int | None = None
    for row in order:
        shared = 0 if previous is None else max(common_prefix(heads[previous], heads[row]) - 1, 0)
        while len(path) > 1 and path[-1].start >= shared:
            path.pop()
        if path[-1].start < shared < path[-1].end:
            path[-1].split(shared)
        if lengths[row] - 1 > shared:
            leaf = _Node(shared, lengths[row] - 1, row, prompts[row])
            path[-1].children.append(leaf)
            path.append(leaf)
        path[-1].rows.append(row)
        for node in path:
            node.first_row, node.prompt = min(node.first_row, row), min(node.prompt, prompts[row])
        previous = row
    return top


def _dissolve_short_levels(top: _Node, min_level: int) -> None:
    """Give the tokens of levels below ``top`` that are shorter than ``min_level`` back to their branches.

    A level that holds tokens of prompts, of all of its rows, stays. What stays depends on the length that a level has
    before others are dissolved. So fewer rows never share less of what they have in common: a plan made by the tree of
    a whole batch holds for each of its micro-batches.
    """
    stack = [top]
    while stack:
        node = stack.pop()
        waiting = [(child, child.start) for child in node.children]
        node.children = []
        while waiting:
            level, begin = waiting.pop()  # `begin`: where it began before its parents were dissolved
            if not level.children or level.end - begin >= min_level or level.prompt - 1 > begin:
                node.children.append(level)
                stack.append(level)
                continue
            for branch in level.children:
                branch.start = level.start
            waiting += [(branch, level.end) for branch in level.children]
            if level.rows:  # these end here
                leaf = _Node(level.start, level.end, min(level.rows), level.prompt)
                leaf.rows = level.rows
                node.children.append(leaf)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens of two rows are equal."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _place(roots: Sequence[_Node]) -> tuple[list[_Node], np.ndarray]:
    """Nodes in depth-first pre-order, siblings by their first row, and their segments, ``int32 [S, 4]``."""
    nodes: list[_Node] = []
    table: list[list[int]] = []
    stack = [(root, -1) for root in sorted(roots, key=lambda node: node.first_row, reverse=True)]
    cursor = 0
    while stack:
        node, parent = stack.pop()
        index = len(nodes)
        nodes.append(node)
        table.append([cursor, cursor + node.end - node.start, parent, 0])
        cursor = table[-1][1]
        stack += [(child, index) for child in sorted(node.children, key=lambda c: c.first_row, reverse=True)]
    if cursor > MAX_TOKENS:
        raise ValueError(
            f"a packed row of {cursor:,} tokens is longer than {MAX_TOKENS:,}: share fewer or shorter rows"
        )
    for index in range(len(table) - 1, -1, -1):  # children come after their parent: one backward pass closes subtrees
        _, end, parent, last = table[index]
        table[index][3] = last = max(last, end)
        if parent >= 0:
            table[parent][3] = max(table[parent][3], last)
    return nodes, np.array(table, dtype=np.int32)


def _row_index(nodes: Sequence[_Node], segments: np.ndarray, num_rows: int) -> np.ndarray:
    """Packed position of every transition, row after row."""
    per_row = [np.empty(0, dtype=np.int64)] * num_rows
    path: list[tuple[int, np.ndarray]] = []  # (segment, its packed positions), from the root down
    for index, node in enumerate(nodes):
        start, end, parent, _ = segments[index]
        while path and path[-1][0] != parent:
            path.pop()
        path.append((index, np.arange(start, end, dtype=np.int64)))
        if node.rows:
            positions = np.concatenate([part for _, part in path])
            for row in node.rows:
                per_row[row] = positions
    return np.concatenate(per_row)
