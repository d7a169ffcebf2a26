"""TRL's asynchronous trainer, on any device: its prefix tree with our attention, packed without loops over tokens.

``trl.experimental.async_grpo`` folds the samples of a micro-batch into a prefix tree of its own, which lies as ours does, and
runs it with FlashAttention-3 on copies of each path's keys and values. So it needs a Hopper GPU. Here the model keeps an
attention implementation of transformers, takes packed rows as in every other trainer (checked, self-checked, windows,
softcap and LoRA included), and TRL's description of the tree becomes a layout before each forward. The loss, the
planner, the rollout worker and the metrics are TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from torch import Tensor

if not (Path(trl.__file__).parent / "experimental" / "async_grpo" / "packing.py").exists():
    raise ImportError(
        f"TRL {trl.__version__} has no asynchronous trainer that packs prefix trees, upgrade it to 1.16 or later"
    )

from trl.experimental.async_grpo import AsyncGRPOTrainer, async_grpo_trainer
from trl.experimental.async_grpo.packing import TreeRow

from prefix_grouper_plugins.layout import IGNORE_INDEX, PrefixLayout, common_prefix
from prefix_grouper_plugins.modeling import packed_inputs, transformers_model
from prefix_grouper_plugins.sharing import SharingGate

_TREE = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k", "tree_max_seqlen_q", "tree_max_seqlen_k")


class PrefixGrouperAsyncGRPOTrainer(AsyncGRPOTrainer):  # type: ignore[misc]
    """:class:`trl.experimental.async_grpo.AsyncGRPOTrainer` with shared-prefix attention. Takes the same arguments.

    Args:
        prefix_grouper_backend: attention backend, as in the other trainers.
        attn_implementation: of transformers: what the model runs where there is no tree.

    Attributes:
        gate (`SharingGate`): what is known of the model.

    Raises:
        UnsupportedModelError: the model cannot be shared exactly.
        ValueError: TRL refuses it itself: recurrent layers, attention sinks.
    """

    def __init__(
        self, *args: Any, prefix_grouper_backend: str = "auto", attn_implementation: str = "sdpa", **kwargs: Any
    ) -> None:
        with _our_parts(attn_implementation):
            super().__init__(*args, **kwargs)
        self.gate = SharingGate(backend=prefix_grouper_backend, is_main=self.accelerator.is_main_process)
        policy: Any = self.model
        self.gate.enable([policy])
        if self.aux_loss_enabled:
            self.gate.refuse(
                ["the router loss would count a token that samples share once: set router_aux_loss_coef=0"]
            )
        hooked = transformers_model(policy)
        hooked.register_forward_pre_hook(_layout_in_front, with_kwargs=True, prepend=True)  # before the self-check's
        self.gate.announce("samples of a micro-batch share whatever they begin alike with, as TRL plans them")

    def get_train_dataloader(self) -> Any:
        """TRL's, whose planner looks the class of its rows up while it runs."""
        vars(async_grpo_trainer)["TreeRow"] = PackedTreeRow  # the same results, for every trainer of the process
        return super().get_train_dataloader()


@contextmanager
def _our_parts(attn_implementation: str) -> Iterator[None]:
    """While TRL builds its trainer: it loads the model with ``attn_implementation``, and needs no kernel and no GPU."""
    module: Any = async_grpo_trainer
    peak_of_gpu = module.get_peak_flops_per_device

    def peak(accelerator: Any, dtype: Any) -> Any:  # None: TRL logs no share of the peak
        return peak_of_gpu(accelerator, dtype) if accelerator.device.type == "cuda" else None

    ours = {
        "TREE_ATTENTION": attn_implementation,
        "register_tree_attention": lambda: None,
        "get_peak_flops_per_device": peak,
    }
    stock = {name: getattr(module, name) for name in ours}
    vars(module).update(ours)
    try:
        yield
    finally:
        vars(module).update(stock)


def _layout_in_front(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook: a layout in place of TRL's description of the tree."""
    if _TREE[0] not in kwargs:
        return None
    kwargs = dict(kwargs)
    index, queries, keys, *_ = (kwargs.pop(name) for name in _TREE)
    layout = layout_of_tree(index, queries, keys)
    ids, positions = kwargs.pop("input_ids"), kwargs.pop("position_ids")
    return args, {**kwargs, **packed_inputs(layout.to(ids.device), ids[0], positions[0])}


def layout_of_tree(kv_index: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> PrefixLayout:
    """The layout of a tree that `TreeRow.pack` describes, a row for each leaf.

    Args:
        kv_index: ``[K]``, packed positions of each segment's path from its root, end to end.
        cu_seqlens_q, cu_seqlens_k: ``[S + 1]``, where segments, and their paths, begin.
    """
    index, queries, keys = (x.cpu().long() for x in (kv_index, cu_seqlens_q, cu_seqlens_k))
    lengths = queries.diff()
    above = keys[1:] - lengths - 1  # where the parent's last token is in the path, if there is a parent
    has_parent = above >= keys[:-1]
    last = index[above.clamp(min=0)]
    parents = (torch.searchsorted(queries, last, right=True) - 1).where(has_parent, -1)
    return PrefixLayout.from_segments(lengths.tolist(), parents.tolist())


class PackedTreeRow(TreeRow):  # type: ignore[misc]
    """:class:`TreeRow` that compares whole samples, where TRL's walks its tree token by token. The same results."""

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []
        self.groups: set[Any] = set()
        self.trained = self.load = 0
        self.tokens: Sequence[int] = range(0)  # type: ignore[assignment]  # TRL reads its length
        self._rows: list[np.ndarray] = []  # tokens of each sample, and an end that no token is

    def fits(self, sample: dict[str, Any], budget: int) -> bool:
        """Whether the row stays within ``budget`` unique tokens and ``budget`` trained ones with ``sample`` added."""
        novel = len(sample["input_ids"]) - self._shared(_with_end(sample))
        trained = self.trained + int(sample["completion_mask"].sum())
        return len(self.tokens) + novel <= budget and trained <= budget

    def add(self, sample: dict[str, Any]) -> None:
        """Take ``sample`` in."""
        row, length = _with_end(sample), len(sample["input_ids"])
        shared = self._shared(row)
        self.load += length * (length + 1) // 2 - shared * (shared + 1) // 2
        self.tokens = range(len(self.tokens) + length - shared)
        self._rows.append(row)
        self.samples.append(sample)
        self.groups.add(sample["group_id"])
        self.trained += int(sample["completion_mask"].sum())

    def _shared(self, row: np.ndarray) -> int:
        """Tokens of ``row`` that the tree holds already, each with the one that follows it."""
        return max([0, *(common_prefix(row, other) - 1 for other in self._rows)])

    def pack(self) -> dict[str, Tensor]:
        """The packed row, as `TreeRow.pack` returns it."""
        rows = [torch.from_numpy(row) for row in self._rows]
        layout = PrefixLayout.from_rows(rows)
        ids = layout.pack(rows)
        targets = [torch.as_tensor(sample["completion_mask"])[1:] != 0 for sample in self.samples]
        paths = layout.row_index.split([len(row) - 1 for row in rows])
        index = torch.cat([path[:-1][own] for path, own in zip(paths, targets, strict=True)])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[index] = torch.cat([row[1:-1][own] for row, own in zip(rows, targets, strict=True)])
        old = [
            torch.as_tensor(s["old_log_probs"])[1:][own].float() for s, own in zip(self.samples, targets, strict=True)
        ]
        counts = torch.tensor([int(own.sum()) for own in targets])
        advantages = torch.tensor([float(sample["advantage"]) for sample in self.samples], dtype=torch.float32)
        return {
            "input_ids": ids,
            "position_ids": layout.position_ids,
            "shift_labels": labels,
            **_description(layout),
            "token_index": index,
            "old_log_probs": torch.cat(old),
            "advantages": advantages.repeat_interleave(counts),
            "segment_id": torch.arange(len(rows)).repeat_interleave(counts),
        }


def _with_end(sample: dict[str, Any]) -> np.ndarray:
    return np.append(np.asarray(sample["input_ids"], dtype=np.int64), -1)


def _description(layout: PrefixLayout) -> dict[str, Tensor]:
    """What TRL's attention gets to know of the tree."""
    paths: list[np.ndarray] = []
    segments = layout.segments.tolist()
    for start, end, parent, _ in segments:
        own = np.arange(start, end)
        paths.append(np.concatenate([paths[parent], own]) if parent >= 0 else own)
    lengths = [len(path) for path in paths]
    return {
        "tree_kv_index": torch.from_numpy(np.concatenate(paths)),
        "tree_cu_seqlens_q": torch.tensor([0, *(end for _, end, *_ in segments)], dtype=torch.int32),
        "tree_cu_seqlens_k": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "tree_max_seqlens": torch.tensor([max(end - start for start, end, *_ in segments), max(lengths)]),
    }
