"""Rows with images: which of them share, and the inputs of a packed forward of a vision-language model.

Images are shared as prompts are. The vision tower sees the images of one row of each group, in the order in which the
prompts are in the packed row, because models put image features into placeholder tokens one after the other. Two
rules make this exact:

- Rows share only if their prompts *and* their images are equal: equal placeholder tokens may stand for different images.
- Rows share only if all their placeholders lie in the shared part: a branch repeats the prompt's last token, and a
  placeholder that occurs twice would need its feature twice.

Positions are those that the model's own rope index gives to the rows (multimodal RoPE, Qwen2-VL, arXiv 2409.12191,
section 2.1). They are packed like the tokens.

What is checked in total by an ordinary forward is checked for each row here (:func:`check_placeholders`): the totals of
a packed row are those of its groups, in which the errors of two rows may cancel where those of the batch do not.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3

from prefix_grouper_plugins.attention.bidirectional import blocks_of
from prefix_grouper_plugins.batch import GroupedBatch, prompt_group
from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.anatomy import is_multimodal, transformers_model
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.inputs import packed_inputs
from prefix_grouper_plugins.modeling.model_types import known_of

# What processors return for images, and for each token.
IMAGE_TENSORS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "image_sizes",
    "spatial_shapes",
    "image_position_ids",
    "image_pixel_values",
    "image_attention_mask",
)
TOKEN_TENSORS = ("token_type_ids", "mm_token_type_ids")


SHARES_NOTHING = object()  # the first part of the key of a row whose images keep it from sharing

RowTensors = Mapping[str, Tensor]  # image tensors of one row; empty for a row without images


def why_not_pack(model: nn.Module, names: Sequence[str]) -> str | None:
    """Why rows that bring the tensors ``names`` cannot be packed; None where they can."""
    if videos := [name for name in names if "video" in name]:
        return f"`{videos[0]}` belongs to rows with videos, which are not packed"
    if unknown := [name for name in names if name not in IMAGE_TENSORS + TOKEN_TENSORS]:
        return f"`{unknown[0]}` is an input that packed rows of images do not know"
    config = transformers_model(model).config
    kind = config.model_type
    # Kinds of tokens too: a model may read text both ways by them, which the self-check, without them, does not see.
    brings = set(names) & {*IMAGE_TENSORS, *(TOKEN_TENSORS if is_multimodal(config) else ())}
    if brings and not known_of(kind).verified_with_images:
        return f"images of {kind} have not been compared with single rows"
    if "image_grid_thw" in names and "mm_token_type_ids" not in names and _rope_index(model) is not None:
        return "`mm_token_type_ids` is missing, without which the positions of images are unknown"
    return None


def split_images(
    tensors: Mapping[str, Tensor], num_images: Sequence[int], num_tiles: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Each row's share of the image tensors of a batch.

    Args:
        tensors: what the processor returned, by the names in :data:`IMAGE_TENSORS`. The leading axis of each counts
            patches (``pixel_values`` with ``image_grid_thw``), tiles, images or rows.
        num_images: images of each row.
        num_tiles: tiles of each row, for models that cut images into tiles (InternVL, LFM2-VL).

    Raises:
        ValueError: the leading axis of a tensor counts none of these.
    """
    rows: list[dict[str, Tensor]] = [{} for _ in num_images]
    for name, tensor in tensors.items():
        sizes = _sizes(name, tensors, list(num_images), None if num_tiles is None else list(num_tiles))
        for row, images, (start, end) in zip(rows, num_images, pairwise(accumulate(sizes, initial=0)), strict=True):
            if images:
                row[name] = tensor[start:end]
    return rows


def _sizes(name: str, tensors: Mapping[str, Tensor], images: list[int], tiles: list[int] | None) -> list[int]:
    """Entries of each row along the leading axis of ``tensors[name]``."""
    length, rows = len(tensors[name]), [1] * len(images)
    if name == "pixel_values" and "image_grid_thw" in tensors:
        patches = tensors["image_grid_thw"].prod(-1).tolist()
        candidates = [[sum(patches[start:end]) for start, end in pairwise(accumulate(images, initial=0))]]
    elif "pixel_attention_mask" in tensors and "spatial_shapes" not in tensors:
        candidates = [rows]  # Idefics pads to the most images of a row
    else:
        candidates = [images, rows] if tiles is None else [tiles, images]
    for sizes in candidates:
        if sum(sizes) == length:
            return sizes
    raise ValueError(
        f"{name} has {length} entries for {len(images)} rows of {images} images"
        + (f" and {tiles} tiles" if tiles else "")
        + ": which row each belongs to is not known"
    )


def merge_images(rows: Sequence[RowTensors]) -> dict[str, Tensor]:
    """The image tensors of ``rows``, one row after the other: the opposite of :func:`split_images`."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in names}


def first_alike(images: Sequence[RowTensors], among: Sequence[Hashable]) -> list[int | None]:
    """For each row with images, the first row that has the same ones; None for a row without images.

    Args:
        images: the image tensors of each row: pixels, grids, sizes, masks. All of them must be equal.
        among: what else must be equal, one entry for each row. Only rows with equal entries are compared, which is
            fast where the entries identify prompts.
    """
    distinct: dict[Hashable, list[int]] = {}
    found: list[int | None] = []
    for i, (row, key) in enumerate(zip(images, among, strict=True)):
        if not row:
            found.append(None)
            continue
        others = distinct.setdefault(key, [])
        first = next((j for j in others if same_images(row, images[j])), i)
        if first == i:
            others.append(i)
        found.append(first)
    return found


def same_images(one: RowTensors, other: RowTensors) -> bool:
    """Whether two rows have equal image tensors."""
    return one.keys() == other.keys() and all(_equal(x, other[name]) for name, x in one.items())


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # The same memory need not be read, for which a GPU would be waited for.
    is_same = (one.data_ptr(), one.stride(), one.device) == (other.data_ptr(), other.stride(), other.device)
    return is_same or torch.equal(one, other)


def sharing_keys(
    keys: Sequence[Hashable],
    rows: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    images: Sequence[RowTensors],
    placeholders: Collection[int],
) -> list[tuple[Hashable, int | None]]:
    """Keys that are equal for two rows only if everything they would share is equal, images included.

    Rows with images share if their keys, whole prompts and images are equal: equal placeholders may stand for different
    images. A row shares nothing if it has placeholders after the shared part of its prompt (an image in the response,
    or at the very end of the prompt): a placeholder that is laid out twice would need its feature twice.

    Args:
        keys: what else must be equal, one entry for each row.
        rows: token ids of each row, on the CPU.
        prompt_lengths: how many of each row's tokens are its prompt.
        images: the image tensors of each row.
        placeholders: token ids that stand for images. Without any, rows with images share nothing.
    """
    tokens = torch.tensor(sorted(placeholders), dtype=torch.long)
    prompts = [prompt_group(key, row[:length]) for key, row, length in zip(keys, rows, prompt_lengths, strict=True)]
    found: list[tuple[Hashable, int | None]] = []
    for i, first in enumerate(first_alike(images, prompts)):
        branch = rows[i][prompt_lengths[i] - 1 :]
        shares_nothing = first is not None and (not len(tokens) or bool(torch.isin(branch, tokens).any()))
        found.append((SHARES_NOTHING, i) if shares_nothing else (keys[i], first))
    return found


def check_placeholders(
    rows: Sequence[Tensor], images: Sequence[RowTensors], placeholders: Collection[int], merge_size: int | None = None
) -> None:
    """Compare the placeholders of each row with its images.

    With grids and ``merge_size`` the number of features is known. Otherwise rows are compared with each other: the
    number of placeholders is proportional to what a row shows, and the model's own check of the totals fixes the
    factor. Models that cut images into pieces by their shape (``image_sizes``) are compared among rows of equal shapes.

    Args:
        rows: token ids of each row without padding, on the CPU.
        images: the image tensors of each row.
        placeholders: token ids that stand for images.
        merge_size: side of the square of patches that makes one feature, for models with grids.

    Raises:
        ValueError: a row has more or fewer placeholders than its images have features, with the words of transformers.
    """
    if not any(images):
        return
    tokens = torch.tensor(sorted(placeholders), dtype=torch.long)
    first: dict[Hashable, tuple[int, int, int]] = {}
    for i, (row, shown) in enumerate(zip(rows, images, strict=True)):
        count = int(torch.isin(row, tokens).sum())
        size, shapes = _size(shown)
        if not shown or (shapes is None and merge_size is not None):
            features = size // (merge_size or 1) ** 2
            if count != features:
                raise _mismatch(f"in row {i}, tokens: {count}, features: {features}", tokens)
            continue
        other, other_count, other_size = first.setdefault(shapes, (i, count, size))
        if count * other_size != other_count * size:
            raise _mismatch(
                f"in row {other} or in row {i}, tokens: {other_count} and {count}, for images of {other_size} and {size} "
                "units",
                tokens,
            )


def _mismatch(where: str, tokens: Tensor) -> ValueError:
    ids = tokens.tolist()
    return ValueError(
        f"Image features and image tokens do not match {where}. Either truncation cut an image off (raise the length of "
        f"prompts) or a completion has a placeholder (forbid it: generation_kwargs={{'suppress_tokens': {ids}}})"
    )


def _size(images: RowTensors) -> tuple[int, Hashable]:
    """How much a row shows, and what must be equal for two rows to have placeholders in proportion to it.

    The second is None for patches counted by a grid, which all have the same number of features.
    """
    grids = [images[name] for name in ("image_grid_thw", "video_grid_thw") if name in images]
    if grids or not images:
        return int(sum(grid.prod(-1).sum() for grid in grids)), None
    if (patches := images.get("image_position_ids")) is not None:  # -1 where an image is padded
        return int((patches != -1).all(-1).sum()), "patches"
    if (shown := images.get("image_attention_mask")) is not None:  # of the patches of each crop (phi4_multimodal)
        return 1, (tuple(images["image_sizes"].flatten().tolist()), shown.cpu().numpy().tobytes())
    pixels = images.get("pixel_values")
    if pixels is None:
        return 1, tuple(images)
    sizes = tuple(
        tuple(images[name].flatten().tolist()) for name in ("image_sizes", "spatial_shapes") if name in images
    )
    if sizes:
        return 1, sizes
    if pixels.dim() == 5:  # Idefics pads a row to the most images with zeros
        return int((pixels != 0).flatten(2).any(-1).sum()), "images"
    return len(pixels), "images"


def image_token_id(model: nn.Module) -> int | None:
    """The placeholder token of an image; None if the model's config names none."""
    config: Any = transformers_model(model).config
    vision = getattr(config, "vision_config", None)
    places = ((config, "image_token_id"), (config, "image_token_index"), (vision, "image_token_id"))
    return next((found for owner, name in places if (found := getattr(owner, name, None)) is not None), None)


def multimodal_positions(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    images: RowTensors,
    mm_token_type_ids: Tensor | None,
) -> Tensor | None:
    """The positions that the model gives to padded rows with images, ``LongTensor[3, B, L]``.

    None where it numbers tokens as it does in text: for models without a rope index, and batches without images.

    Args:
        model: the vision-language model.
        input_ids, attention_mask, mm_token_type_ids: ``[B, L]``.
        images: the image tensors of all rows.

    Raises:
        ValueError: there are images, but no ``mm_token_type_ids``.
    """
    rope_index, grid = _rope_index(model), images.get("image_grid_thw")
    if rope_index is None or grid is None:
        return None
    if mm_token_type_ids is None:
        raise ValueError("rows with images need `mm_token_type_ids`, which the processor returns with `input_ids`")
    positions: Tensor = rope_index(
        input_ids, image_grid_thw=grid, attention_mask=attention_mask, mm_token_type_ids=mm_token_type_ids
    )[0]
    return positions


def merge_size(model: nn.Module) -> int | None:
    """Side of the square of patches that makes one feature; None for models without grids."""
    vision = getattr(transformers_model(model).config, "vision_config", None)
    return getattr(vision, "spatial_merge_size", None)


def _kinds_read_by(model: nn.Module) -> dict[str, bool]:
    """Which tensors in :data:`TOKEN_TENSORS` change what the model computes."""
    read = {"mm_token_type_ids": _rope_index(model) is not None, "token_type_ids": False}
    if (kind := kind_of_blocks(model)) is not None:
        read[kind] = True
    return read


def kind_of_blocks(model: nn.Module) -> str | None:
    """The token tensor that marks images whose tokens see each other both ways; None for models without such images."""
    config: Any = transformers_model(model).config
    known = known_of(config.model_type)
    if known.images_both_ways:
        return "token_type_ids"
    text = config.get_text_config(decoder=True)
    asked = getattr(text, "use_bidirectional_attention", None) == "vision"
    return "mm_token_type_ids" if asked and known.images_both_ways_in is not None else None


def _rope_index(model: nn.Module) -> Any:
    base = transformers_model(model)
    return getattr(getattr(base, "model", base), "get_rope_index", None)


def first_rows(layout: PrefixLayout) -> list[int]:
    """For each tree of the layout, in packed order, the first row that it holds: its images are those of the tree."""
    real = layout.segments[layout.segments[:, 0] < layout.num_tokens - layout.num_padding]
    starts = real[real[:, 2] < 0, 0].long()
    ends = torch.tensor(list(accumulate(layout.row_lengths)))
    return torch.searchsorted(ends, layout.source_index.cpu()[starts], right=True).tolist()  # type: ignore[no-any-return]


class ImageRows:
    """Padded rows with images, and the inputs of their packed forward.

    Args:
        model: the vision-language model.
        prompt_ids, prompt_mask: ``[B, P]``, left-padded.
        completion_ids, completion_mask: ``[B, C]``, right-padded.
        images: the image tensors of each row, see :func:`split_images`.
        token_tensors: by the names in :data:`TOKEN_TENSORS`, ``[B, P]`` or ``[B, P + C]``; zero in completions where
            not given.

    Attributes:
        keys: one for each row, for :class:`~prefix_grouper_plugins.batch.GroupedBatch`.
        positions (`LongTensor[3, B, P + C]`): the model's own, or None, see :func:`multimodal_positions`.
        block_ids (`LongTensor[B, P + C]`): images whose tokens see each other in both directions, or None.

    Raises:
        UnsupportedModelError: a row ends within such an image.
        ValueError: a row has more or fewer placeholders than its images have features, or its token kinds mark other
            tokens than its placeholders.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        images: Sequence[RowTensors],
        token_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        mask = torch.cat([prompt_mask, completion_mask], dim=1)
        self.images = list(images)
        self.token_tensors = {name: _fill(x, input_ids.shape[1]) for name, x in (token_tensors or {}).items()}
        token = image_token_id(model)
        if token is not None and any(self.images):
            real = [row[own != 0].cpu() for row, own in zip(input_ids, mask, strict=True)]
            check_placeholders(real, self.images, {token}, merge_size(model))
            self._check_kinds(model, (input_ids == token) & (mask != 0))
        self.positions = multimodal_positions(
            model, input_ids, mask, merge_images(self.images), self.token_tensors.get("mm_token_type_ids")
        )
        columns = torch.arange(input_ids.shape[1], device=mask.device)
        kinds = self.token_tensors.get(kind_of_blocks(model) or "")
        self.block_ids = None if kinds is None else _blocks_by_row(kinds, torch.where(mask != 0, columns, 0).amax(1))
        self._blocks_in = known_of(transformers_model(model).config.model_type).images_both_ways_in
        self.keys = self._keys(token, input_ids.cpu(), mask.cpu() != 0, prompt_ids.shape[1])

    @classmethod
    def from_processor(
        cls,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        tensors: Mapping[str, Tensor],
        num_images: Sequence[int],
        num_tiles: Sequence[int] | None = None,
    ) -> ImageRows:
        """From the tensors of a whole batch, those of images and those of tokens."""
        images = split_images({k: v for k, v in tensors.items() if k in IMAGE_TENSORS}, num_images, num_tiles)
        per_token = {k: v for k, v in tensors.items() if k in TOKEN_TENSORS}
        return cls(model, prompt_ids, prompt_mask, completion_ids, completion_mask, images, per_token)

    def _check_kinds(self, model: nn.Module, placeholders: Tensor) -> None:
        """Compare where the token kinds mark images with the placeholders ``[B, P + C]``, where the model reads kinds."""
        read = [name for name, used in _kinds_read_by(model).items() if used and name in self.token_tensors]
        for name in read:
            wrong = ((self.token_tensors[name] == 1) != placeholders).any(1).nonzero()
            if len(wrong):
                raise ValueError(
                    f"`{name}` of row {int(wrong[0])} marks other tokens than its image placeholders. The processor pads "
                    "the two on different sides: set `padding_side='left'` in the processor and its tokenizer"
                )

    def _keys(self, token: int | None, ids: Tensor, mask: Tensor, width: int) -> list[Hashable]:
        per_token = [x.cpu() for x in self.token_tensors.values()]
        per_token += [] if self.positions is None else list(self.positions.cpu())
        # These are equal in rows with equal prompts and images. If they ever differ, the rows must not share.
        along = [
            tuple(x[i, :width][mask[i, :width]].numpy().tobytes() for x in per_token) if row else ()
            for i, row in enumerate(self.images)
        ]
        rows = [row[own] for row, own in zip(ids, mask, strict=True)]
        return [
            *sharing_keys(along, rows, mask[:, :width].sum(1).tolist(), self.images, [] if token is None else [token])
        ]

    def packed_inputs(self, batch: GroupedBatch) -> dict[str, Any]:
        """Keyword arguments of the packed forward of ``batch``, which was made from these rows with :attr:`keys`."""
        self.set_blocks(batch.layout, batch)
        positions, kinds = self.of_tokens(batch)
        return {**packed_inputs(batch.layout, batch.input_ids, positions), **kinds, **self.shown(batch)}

    def of_tokens(self, batch: GroupedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions, ``LongTensor[T]`` or ``[3, T]``, and token kinds, each ``[1, T]``, of the packed row of ``batch``."""
        positions = batch.position_ids if self.positions is None else batch.pack(self.positions.movedim(0, -1)).T
        return positions, {name: batch.pack(x)[None] for name, x in self.token_tensors.items()}

    def shown(self, batch: GroupedBatch) -> dict[str, Tensor]:
        """The image tensors that the placeholders in the packed row of ``batch`` stand for."""
        return merge_images([self.images[batch.kept[row]] for row in first_rows(batch.layout)])

    def set_blocks(self, layout: PrefixLayout, batch: GroupedBatch) -> None:
        """Let the tokens of each image see each other, where the model reads images both ways.

        Args:
            layout: of the first tokens in the packed row of ``batch``, at least all of those of images. Changed in place.
            batch: made from these rows.
        """
        if self.block_ids is not None:
            set_blocks(layout, batch.pack(self.block_ids)[: layout.num_tokens], self._blocks_in)


def image_blocks(model_type: str, token_type_ids: Tensor | None, last_tokens: Tensor) -> Tensor | None:
    """``LongTensor[B, L]``: the number of the image where tokens of an image see each other both ways, -1 elsewhere.

    None for models whose image tokens are causal.

    Args:
        model_type: of the vision-language model.
        token_type_ids: ``[B, L]``, 1 on images. Without them such a model is causal.
        last_tokens: the column of each row's last token.

    Raises:
        UnsupportedModelError: a row ends within such an image.
    """
    if token_type_ids is None or not known_of(model_type).images_both_ways:
        return None
    return _blocks_by_row(token_type_ids, last_tokens)


def _blocks_by_row(token_type_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """:func:`image_blocks` of a model whose images are read both ways."""
    image = token_type_ids == 1
    if bool(image.gather(1, last_tokens[:, None]).any()):
        raise UnsupportedModelError("a row ends within an image, whose last token is not forwarded but would be seen")
    return number_runs(image)


def number_runs(image: Tensor) -> Tensor:
    """``LongTensor[B, L]``: 0, 1, ... at the runs of ``image [B, L]`` that are true, row after row; -1 elsewhere."""
    first = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return (first.flatten().cumsum(0).view_as(image) - 1).where(image, -1)


def set_blocks(layout: PrefixLayout, block_ids: Tensor, blocks_in: str | None = None) -> None:
    """Set the tokens of ``layout`` that see each other in both directions.

    Args:
        layout: of the packed row. Changed in place.
        block_ids: ``LongTensor[T]``, the result of :func:`image_blocks`, or of :func:`number_runs`, at the tokens of the
            packed row.
        blocks_in: the layers in which they do, `images_both_ways_in` of the model's type.
    """
    layout.blocks = blocks_of(block_ids, layout)
    layout.blocks_in_windows_only = blocks_in == "windows"
    layout.blocks_cut_by_window = _window_cuts_blocks() if blocks_in is None else blocks_in == "windows"


def _window_cuts_blocks() -> bool:
    """Whether the sliding window of the installed transformers also cuts blocks."""
    return hasattr(modeling_gemma3, "create_masks_for_vision_model")


def _fill(values: Tensor, length: int) -> Tensor:
    return nn.functional.pad(values, (0, length - values.shape[1]))
