"""One chunk of TRL's rows as one packed row: forwarded, scored, and brought back to rows.

What differs between TRL releases is taken from the installed one by inspection: since 1.15 the model carries a fused head
that scores pre-shifted labels, before that the logits of the completion positions are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor, nn

from prefix_grouper_plugins.batch import Blocks, GroupedBatch, blocks_on_host
from prefix_grouper_plugins.integrations.trl.fused_head import HAS_FUSED_HEAD, fused_scores
from prefix_grouper_plugins.integrations.trl.images import RowsOfImages
from prefix_grouper_plugins.integrations.trl.router_loss import capture_router_logits, load_balancing_loss
from prefix_grouper_plugins.layout import PrefixLayout, on_device
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.modeling import numbers_padded_columns, packed_inputs
from prefix_grouper_plugins.modeling.images import ImageRows
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.self_check.leak import leak_one_key
from prefix_grouper_plugins.token_budget import pays_to_pack

Scores = tuple[Tensor, Tensor | None, Tensor | None]  # log-probs [B, C], entropies [B, C], router loss []
PieceScores = tuple[list[int], Tensor, Tensor | None]  # which rows, and their log-probs and entropies [N, C]


@dataclass(frozen=True)
class Rows:
    """What the stock method is given to score. Slicing selects rows.

    Attributes:
        input_ids, attention_mask: ``[B, P + C]``, prompts padded on the left and completions on the right.
        num_scored: ``C``, called ``logits_to_keep`` in TRL.
        images: the images and token kinds of each row.
        copied: :attr:`on_host`, where it is known already.
    """

    input_ids: Tensor
    attention_mask: Tensor
    num_scored: int
    images: RowsOfImages
    copied: Blocks | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> Rows:
        return self._select(rows, rows, self.images[rows])

    @classmethod
    def of_blocks(cls, blocks: Blocks, on_host: Blocks, images: RowsOfImages | None = None) -> Rows:
        """Rows by their prompts and completions; without ``images`` they have none."""
        prompts, prompt_mask, completions, completion_mask = blocks
        ids, mask = torch.cat([prompts, completions], dim=1), torch.cat([prompt_mask, completion_mask], dim=1)
        return cls(ids, mask, completions.shape[1], images or RowsOfImages({}, len(ids)), on_host)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of ``parts``, which are equally wide, one part after the other."""
        ids, mask = torch.cat([part.input_ids for part in parts]), torch.cat([part.attention_mask for part in parts])
        on_host = joined_blocks([part.on_host for part in parts])
        return cls(ids, mask, parts[0].num_scored, RowsOfImages.join([part.images for part in parts]), on_host)

    def holds(self, on_host: Blocks, images: RowsOfImages) -> bool:
        """Whether these are the rows of ``on_host`` and ``images``."""
        return all(map(torch.equal, self.on_host, on_host)) and self.images.equal(images)

    def take(self, rows: list[int]) -> Rows:
        """Rows by number."""
        places = torch.tensor(rows)
        return self._select(on_device(places, self.input_ids.device), places, self.images.take(rows))

    def _select(self, rows: slice | Tensor, rows_on_host: slice | Tensor, images: RowsOfImages) -> Rows:
        on_host: Blocks = tuple(block[rows_on_host] for block in self.on_host)  # type: ignore[assignment]
        return Rows(self.input_ids[rows], self.attention_mask[rows], self.num_scored, images, on_host)

    def chunks(self, size: int | None) -> Iterator[Rows]:
        """The stock method's chunks, so that every process makes the same number of forwards."""
        size = size or len(self)
        return (self[start : start + size] for start in range(0, len(self), size))

    @property
    def blocks(self) -> Blocks:
        ids, mask, scored = self.input_ids, self.attention_mask, self.num_scored
        return ids[:, :-scored], mask[:, :-scored], ids[:, -scored:], mask[:, -scored:]

    @cached_property
    def on_host(self) -> Blocks:
        """:attr:`blocks` on the CPU, see `blocks_on_host`: read once, since a read waits until the device has done its work."""
        return blocks_on_host(*self.blocks) if self.copied is None else self.copied

    @property
    def has_completions(self) -> bool:
        return bool(self.on_host[3].any())


def joined_scores(found: Iterable[PieceScores], count: int) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies ``[count, C]`` of rows whose scores were ``found`` piece by piece. Differentiable."""
    logps: Tensor | None = None
    entropies: Tensor | None = None
    for members, values, more in found:
        place = on_device(torch.tensor(members), values.device)
        logps = _placed(logps, values, place, count)
        entropies = None if more is None else _placed(entropies, more, place, count)
    assert logps is not None
    return logps, entropies


def _placed(total: Tensor | None, values: Tensor, place: Tensor, count: int) -> Tensor:
    """``values [N, C]`` as the rows ``place`` of ``[count, C]``, added to ``total``. Differentiable."""
    rows = values.new_zeros((count, values.shape[1])).index_copy(0, place, values)
    return rows if total is None else total + rows


def joined_blocks(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of equal widths, one part after the other."""
    return tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]


class ScoringCall(NamedTuple):
    """A call of TRL's scoring method, ``_get_per_token_logps_and_entropies``.

    Attributes:
        model: that is forwarded.
        input_ids, attention_mask: ``[B, P + C]``, prompts padded on the left and completions on the right.
        logits_to_keep: ``C``.
        batch_size: rows of a chunk; None for one chunk.
        compute_entropy: whether entropies are returned too.
        given: its other arguments that are not None: images, token kinds, ``compute_aux_loss``.
    """

    model: Any
    input_ids: Tensor
    attention_mask: Tensor
    logits_to_keep: int
    batch_size: int | None
    compute_entropy: bool
    given: dict[str, Any]

    @property
    def rows(self) -> Rows:
        images = RowsOfImages(self.given, len(self.input_ids))
        return Rows(self.input_ids, self.attention_mask, self.logits_to_keep, images)

    @property
    def scored_mask(self) -> Tensor:
        """``[B, C]``: 1 on real completion tokens."""
        return self.attention_mask[:, -self.logits_to_keep :]

    @property
    def has_images(self) -> bool:
        """Whether rows bring images or token kinds."""
        return any(name != "compute_aux_loss" for name in self.given)

    @property
    def aux_loss(self) -> bool:
        """Whether the router loss is returned too."""
        return bool(self.given.get("compute_aux_loss"))

    def run(self, stock: Callable[..., tuple[Any, ...]]) -> tuple[Any, ...]:
        """What ``stock``, the method of TRL, returns for it."""
        return stock(
            self.model,
            self.input_ids,
            self.attention_mask,
            self.logits_to_keep,
            batch_size=self.batch_size,
            compute_entropy=self.compute_entropy,
            **self.given,
        )


class PackedForward:
    """Runs rows through the model as one packed row.

    Args:
        trainer: whose accelerator, temperature and head are used.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def batch_worth_packing(self, model: Any, rows: Rows) -> GroupedBatch | None:
        """The batch of ``rows``, of text, to be scored; None where their forward as TRL pads them costs as much, see `pays_to_pack`."""
        real = sum(int(mask.sum()) for mask in (rows.on_host[1], rows.on_host[3]))
        padded = rows.input_ids.numel(), len(rows)
        if len(rows) == 1 and not pays_to_pack(real - 1, *padded):  # without laying it out
            return None
        batch = self._batch(model, rows.blocks, rows.on_host, None, forward_last=False)
        return batch if pays_to_pack(batch.layout.num_tokens, *padded) else None

    def score(
        self, model: Any, rows: Rows, *, entropy: bool, aux_loss: bool, batch: GroupedBatch | None = None
    ) -> tuple[Scores, Counts]:
        """What the stock method returns for ``rows``, and what was forwarded.

        Args:
            model: the model, as TRL passes it.
            rows: one chunk.
            entropy: also the entropy of each next-token distribution.
            aux_loss: also the router loss, over all tokens of the rows.
            batch: of the rows, where the caller has it from :meth:`batch_worth_packing`.
        """
        if not rows.has_completions and not aux_loss:
            return self.nothing_to_score(model, rows, entropy=entropy)
        images = rows.images.image_rows(model, rows.blocks)
        if batch is None:
            batch = self._batch(model, rows.blocks, rows.on_host, images, forward_last=aux_loss)
        inputs = _packed_inputs(batch, images)
        with capture_router_logits(model, enabled=aux_loss) as router_logits:
            logps, entropies = self._forward(model, batch, inputs, entropy)
        loss = load_balancing_loss(model, router_logits, batch.layout.rows_per_position) if aux_loss else None
        counts = Counts(
            tokens_forwarded=batch.layout.num_tokens,
            row_tokens=batch.num_row_tokens,
            rows=batch.num_rows,
            groups=batch.num_groups,
        ) + Counts.of_levels(batch.layout.shared_by_level)
        return (batch.scatter(logps), None if entropies is None else batch.scatter(entropies), loss), counts

    def score_part(
        self,
        model: Any,
        rows: Rows,
        cache: PromptCache | None,
        is_last: bool,
        *,
        entropy: bool,
        recompute: Sequence[nn.Module] = (),
    ) -> tuple[tuple[Tensor, Tensor | None], Counts, PromptCache]:
        """:meth:`score` of rows of one prompt, against the prompt in ``cache``.

        Args:
            model, rows, entropy: as in :meth:`score`; each row has a completion.
            cache: of the prompt; None where it has to be forwarded first.
            is_last: whether these are the prompt's last rows, so that their backward goes on through it.
            recompute: layers that run again in the backward of a prompt that is forwarded here, see `PromptCache.run`.

        Returns:
            log-probs and entropies ``[B, C]``, what was forwarded, and the prompt's cache.
        """
        images = rows.images.image_rows(model, rows.blocks)
        whole = self._batch(model, rows.blocks, rows.on_host, images, forward_last=False)
        part = whole.behind_prompt()
        positions, kinds = _of_tokens(whole, images)
        given = part.layout.num_given
        counts = Counts(
            part.layout.num_queries, part.num_row_tokens, rows=part.num_rows, shared_1=given * part.num_rows
        )
        counts += Counts.of_levels(part.layout.shared_by_level)
        if cache is None:
            cache, count = self._prompt(model, whole, images, given, positions, kinds, recompute)
            counts += count
        cache.prepare(part.layout, last=is_last)
        inputs = packed_inputs(part.layout, part.input_ids, positions[..., given:])
        inputs |= {name: kind[:, given:] for name, kind in kinds.items()}
        logps, entropies = self._forward(model, part, inputs, entropy)
        return (part.scatter(logps), None if entropies is None else part.scatter(entropies)), counts, cache

    def prompt(self, model: Any, rows: Rows) -> tuple[PromptCache, Counts]:
        """The forward of the prompt that ``rows`` have in common, for :meth:`score_part`. Arguments as there."""
        images = rows.images.image_rows(model, rows.blocks)
        whole = self._batch(model, rows.blocks, rows.on_host, images, forward_last=False)
        return self._prompt(model, whole, images, whole.behind_prompt().layout.num_given, *_of_tokens(whole, images))

    def _prompt(
        self,
        model: Any,
        whole: GroupedBatch,
        images: ImageRows | None,
        given: int,
        positions: Tensor,
        kinds: dict[str, Tensor],
        recompute: Sequence[nn.Module] = (),
    ) -> tuple[PromptCache, Counts]:
        """That of ``whole``, rows of one prompt, whose first ``given`` tokens are the prompt's; their positions and kinds."""
        cache, prompt = PromptCache(), PrefixLayout.from_groups([given], [[1]], device=whole.input_ids.device)
        more = {name: kind[:, :given] for name, kind in kinds.items()}
        if images is not None:
            images.set_blocks(prompt, whole)
            more |= images.shown(whole)
        with self._trainer.accelerator.autocast():
            cache.run(model, prompt, whole.input_ids[:given], positions[..., :given], more, recompute=recompute)
        return cache, Counts(tokens_forwarded=given, groups=1, shared_1=-given)

    def nothing_to_score(self, model: Any, rows: Rows, *, entropy: bool) -> tuple[Scores, Counts]:
        """Zeros, for rows whose completions are all masked, that hang on a forward of one token.

        Sharded and distributed models wait for every process in each layer, forward and backward, and for the gradient of
        every parameter: so this process runs them too. Rows with images need all of their prompt for that.
        """
        number = _row_with_images(rows)
        blocks, on_host = (_smallest(number, blocks) for blocks in (rows.blocks, rows.on_host))
        first = number or 0
        images = rows.images[first : first + 1].image_rows(model, blocks)
        batch = self._batch(model, blocks, on_host, images, forward_last=False)
        logps, _ = self._forward(model, batch, _packed_inputs(batch, images), False)
        zeros = (logps.sum() * 0).expand(len(rows), rows.num_scored)
        row_tokens = sum(int(mask.sum()) for mask in (rows.on_host[1], rows.on_host[3]))
        counts = Counts(tokens_forwarded=batch.layout.num_tokens, row_tokens=row_tokens)
        return (zeros, zeros.detach() if entropy else None, None), counts

    def _batch(
        self, model: Any, blocks: Blocks, on_host: Blocks, images: ImageRows | None, *, forward_last: bool
    ) -> GroupedBatch:
        batch = GroupedBatch(
            *blocks,
            keys=None if images is None else images.keys,
            padded_positions=numbers_padded_columns(model),  # TRL passes no position_ids
            min_level=self._trainer.min_level,
            forward_last=forward_last,
            on_host=on_host,
        )
        verification = self._trainer.verification
        if verification.leaks and (leaking := leak_one_key(batch.layout)) is not None:
            batch.layout = leaking
            verification.leaked()
        return batch

    def _forward(
        self, model: Any, batch: GroupedBatch, inputs: dict[str, Any], entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies ``[N]`` of the completion tokens, by the head that the installed TRL uses."""
        trainer = self._trainer
        if hasattr(trainer.accelerator.unwrap_model(model).config.get_text_config(), "output_router_logits"):
            inputs["output_router_logits"] = False  # else the model's config could ask for a loss over packed tokens
        if HAS_FUSED_HEAD:
            with trainer.accelerator.autocast():
                return fused_scores(model, batch, inputs, entropy)
        logits = model(**inputs, logits_to_keep=batch.positions).logits[0] / trainer.temperature
        logps = trl_utils.selective_log_softmax(logits, batch.labels[batch.positions])
        if not entropy:
            return logps, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(trainer, "_entropy_bonus_enabled", False)):
            return logps, trl_utils.entropy_from_logits(logits)


def _packed_inputs(batch: GroupedBatch, images: ImageRows | None) -> dict[str, Any]:
    if images is None:
        return packed_inputs(batch.layout, batch.input_ids, batch.position_ids)
    return images.packed_inputs(batch)


def _of_tokens(batch: GroupedBatch, images: ImageRows | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions of the packed tokens, and kinds of tokens by name, as the model takes them."""
    return (batch.position_ids, {}) if images is None else images.of_tokens(batch)


def _row_with_images(rows: Rows) -> int | None:
    """The first row that has images, or the first of all where there are token kinds; None where text alone is forwarded."""
    number = next((i for i, images in enumerate(rows.images.images) if images), None)
    return 0 if number is None and rows.images.token_tensors else number


def _smallest(number: int | None, blocks: Blocks) -> Blocks:
    """Blocks of a row whose forward uses every part of the model: one token, or of row ``number`` the prompt with images."""
    prompts, prompt_mask, completions, completion_mask = blocks
    if number is None:
        token, real = prompts[:1, -1:], torch.ones_like(prompt_mask[:1, -1:])
        return token, real, token, real
    row = slice(number, number + 1)
    first_scored = torch.zeros_like(completion_mask[row])
    first_scored[:, 0] = 1
    return prompts[row], prompt_mask[row], completions[row], first_scored
