"""One micro-batch of verl as one packed row.

verl's engines work on nested tensors: the rows' tokens end to end, and offsets. A packed row is put before verl's own
code as a micro-batch of a single, long row; what comes out of it is spread over the rows again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from verl.utils import tensordict_utils as tu

from prefix_grouper_plugins.batch import prompt_group
from prefix_grouper_plugins.integrations.verl.planning import tokens_of_rows
from prefix_grouper_plugins.integrations.verl.vision.dummy_image import dummy_image
from prefix_grouper_plugins.integrations.verl.vision.images import (
    TOKEN_TYPES,
    images_of,
    merged,
    row_inputs,
    token_types,
)
from prefix_grouper_plugins.layout import IGNORE_INDEX, PrefixLayout, on_device
from prefix_grouper_plugins.metrics import Counts
from prefix_grouper_plugins.micro_batches import RowSize, sizes_in
from prefix_grouper_plugins.modeling.images import (
    SHARES_NOTHING,
    check_placeholders,
    first_rows,
    image_blocks,
    set_blocks,
    sharing_keys,
)
from prefix_grouper_plugins.token_budget import pays_to_pack

# Entries of a micro-batch that concern all of its rows, and that verl's prepare_model_inputs/outputs read.
_SETTINGS = (
    "use_remove_padding",
    "pad_mode",
    "pad_token_id",
    "use_fused_kernels",
    "temperature",
    "calculate_entropy",
    "calculate_sum_pi_squared",
    "distillation_only",
)


def row_lengths(data: TensorDict) -> tuple[list[int], list[int]]:
    """Tokens of each row, and of each row's prompt.

    Args:
        data: with nested ``input_ids``, and ``prompts`` either nested (verl's V1 trainer) or padded on the left next to
            an ``attention_mask`` (V0).
    """
    prompts = data["prompts"]
    if prompts.is_nested:
        prompt_lengths = prompts.offsets().diff()
    else:
        prompt_lengths = data["attention_mask"][:, : prompts.shape[1]].sum(1)
    return data["input_ids"].offsets().diff().tolist(), prompt_lengths.tolist()


def mend_positions(data: TensorDict) -> None:
    """Make the token axis of mRoPE positions the ragged one. In place.

    Rows have positions ``[4, L]``. Where all rows have the same length, or there is one row only, ``as_nested_tensor``
    makes the axis of 4 the ragged one, and verl 0.9.1 stops when it selects rows. Whole groups on one rank, cut off at
    the longest response, have the same length more often than verl's mixture of rows.
    """
    positions, lengths = data["position_ids"], data["input_ids"].offsets().diff()
    if not positions.is_nested or positions.dim() != 3:
        return
    values = positions.values()
    if bool((lengths == values.shape[-1]).all()):
        rows = values.unflatten(0, (len(data), -1)).unbind()
        data["position_ids"] = tu.nested_tensor_from_tensor_list(list(rows))


def why_positions_jump(data: TensorDict) -> str | None:
    """Why verl's own forward of rows without padding is not that of texts: transformers separates where positions do not go on by one.

    None also where rows keep their padding, and for mRoPE, whose positions jump at images.
    """
    positions = data["position_ids"]
    if positions.dim() != 2 or not positions.is_nested or not tu.get_non_tensor_data(data, "use_remove_padding", True):
        return None
    steps, offsets = positions.values().diff(), positions.offsets()
    goes_on = steps == 1
    goes_on[offsets[1:-1] - 1] = True  # from one row to the next
    if bool(goes_on.all()):
        return None
    return "positions of a row do not go on by one, and verl takes what follows for another text"


def _pays(packed: int, lengths: Sequence[int], removes_padding: bool) -> bool:
    """Whether ``packed`` tokens in one row are worth more than verl's own forward of rows of ``lengths``."""
    return pays_to_pack(packed, tokens_of_rows(lengths, removes_padding), len(lengths))


def lengths_of_rows_apart(micro_batch: TensorDict, *, forward_last: bool) -> list[int] | None:
    """Tokens of each row, of rows that share nothing with each other and that it does not pay to pack; None where it may.

    Told by their lengths alone, for rows of text.
    """
    if any(row_inputs(micro_batch)) or dummy_image(micro_batch) is not None:
        return None
    lengths: list[int] = micro_batch["input_ids"].offsets().diff().tolist()
    packed = sum(lengths) - (0 if forward_last else len(lengths))
    return None if _pays(packed, lengths, tu.get(micro_batch, "use_remove_padding", True)) else lengths


class _KeyedRows:
    """Rows on the CPU, the lengths of their prompts, what belongs to their images, and what they share by.

    Text is shared by token ids alone, whatever the ``uid``. Images are compared within one ``uid`` only, which saves time.
    """

    def __init__(self, data: TensorDict, placeholders: Collection[int], forward_last: bool) -> None:
        self._forward_last = forward_last
        self.lengths, self.prompt_lengths = row_lengths(data)
        self.rows = data["input_ids"].values().cpu().split(self.lengths)
        self.inputs = row_inputs(data)
        images = list(map(images_of, self.inputs))
        uids = tu.get(data, "uid")
        own = [None if uids is None or not row else str(uids[i]) for i, row in enumerate(images)]
        self.keys = sharing_keys(own, self.rows, self.prompt_lengths, images, placeholders)
        prompts = (row[:prompt] for row, prompt in zip(self.rows, self.prompt_lengths, strict=True))
        self.groups = list(map(prompt_group, self.keys, prompts))

    def layout(self, min_level: int | None) -> PrefixLayout:
        """Of all rows, see `PrefixLayout.from_rows`.

        A layout counts transitions from one token to the next. Where each row's last token is forwarded too, the rows get one
        token in front, so that the transitions are those into each token of the row.
        """
        rows, prompt_lengths = self.rows, self.prompt_lengths
        if self._forward_last:
            rows = [pad(row, (1, 0)) for row in rows]
            prompt_lengths = [length + 1 for length in prompt_lengths]
        return PrefixLayout.from_rows(rows, self.keys, shareable=prompt_lengths, min_level=min_level)

    def source_index(self, layout: PrefixLayout) -> Tensor:
        """``LongTensor[T]``: which of the rows' tokens, end to end, each packed position of :meth:`layout` is."""
        if not self._forward_last:
            return layout.source_index
        ends = torch.tensor(layout.row_lengths).cumsum(0)
        return layout.source_index - torch.bucketize(layout.source_index, ends, right=True)  # less the tokens in front


def row_sizes(
    data: TensorDict, placeholders: Collection[int] = (), min_level: int | None = None, *, forward_last: bool = False
) -> list[RowSize]:
    """What planning needs to know of each row; rows of one group have equal prompts and images.

    Args:
        data: the rows.
        placeholders: token ids that stand for images and videos.
        min_level: as in `PrefixLayout.from_rows`.
        forward_last: as for :class:`PackedMicroBatch`.
    """
    keyed = _KeyedRows(data, placeholders, forward_last)
    return sizes_in(keyed.layout(min_level), keyed.groups, keyed.prompt_lengths)


class PackedMicroBatch:
    """A micro-batch whose prompts are laid out once.

    Args:
        micro_batch: on the model's device.
        placeholders: token ids that stand for images and videos.
        min_level: as in `PrefixLayout.from_rows`.
        forward_last: forward the last token of each row as well, whose output a value function has and a policy does not.
            The prompt then counts ``P`` tokens instead of ``P - 1``.

    Attributes:
        layout (`PrefixLayout`): of the rows, on that device. With ``forward_last`` its rows have one token more, in front.
        surrogate (`TensorDict`): the packed row in the form of a micro-batch of one row, with the settings of the
            original one.
        num_tokens: of the surrogate: those that are forwarded, and then the placeholders of a dummy image.
        labels (`LongTensor[T]`): next token of each packed position; with ``forward_last``, where there may be none, -100.
        images (`dict[str, Tensor]`): those whose placeholders the packed row holds, as the model takes them.
        row_lengths (`list[int]`): tokens of each row.
        some_share_nothing (`bool`): whether the images of some rows keep them from sharing.
        reason_not_to_share: None, unless rows differ in what they should share.
        counts (`Counts`): what is forwarded, and what would have been.
        ids, positions (`LongTensor[T]`, with mRoPE ``[4, T]``): of the packed row.
    """

    def __init__(
        self,
        micro_batch: TensorDict,
        placeholders: Collection[int] = (),
        min_level: int | None = None,
        *,
        forward_last: bool = False,
    ) -> None:
        ids = micro_batch["input_ids"]
        keyed = _KeyedRows(micro_batch, placeholders, forward_last)
        check_placeholders(keyed.rows, list(map(images_of, keyed.inputs)), placeholders)
        self.some_share_nothing = any(key[0] is SHARES_NOTHING for key in keyed.keys)
        layout = keyed.layout(min_level)
        self.images = merged([keyed.inputs[row] for row in first_rows(layout)])
        self.row_lengths = keyed.lengths
        self.counts = Counts.of_rows(keyed.lengths)
        self.counts.tokens_forwarded = layout.num_tokens
        self.counts.squares = 2 * int(layout.position_ids.sum()) + layout.num_tokens  # here, while it is on the host
        self.counts.groups = len(set(keyed.groups))
        self.counts += Counts.of_levels(layout.shared_by_level)
        self._prompt_length = keyed.prompt_lengths[0]
        self._prompt_outputs: dict[str, Tensor] = {}
        self._source = on_device(keyed.source_index(layout), ids.device)
        self._whole = self.layout = layout = layout.to(ids.device)
        positions = micro_batch["position_ids"].values()  # [tokens], with mRoPE [4, tokens]
        packed_positions = positions[..., self._source]
        self._offsets = ids.offsets()
        is_read = torch.ones(len(ids.values()), dtype=torch.bool, device=ids.device)
        if not forward_last:
            is_read[self._offsets[1:] - 1] = False
        self._read = is_read.nonzero().squeeze(1)  # the tokens of the rows whose outputs are read
        self._places = torch.full(
            (len(is_read),), -1, device=ids.device
        )  # in the packed row, of each token of the rows
        self._places[self._read] = layout.row_index
        self._types = token_types(keyed.inputs, keyed.lengths)
        self.reason_not_to_share: str | None = None
        if not self._agree(positions):
            self.reason_not_to_share = "rows that share a prompt number its tokens differently"
        elif self._types is not None and not self._agree(torch.cat(self._types).to(ids.device)):
            self.reason_not_to_share = "rows that share a prompt do not agree which of its tokens are images"
        packed_ids = ids.values()[self._source]
        self.labels = torch.full_like(packed_ids, IGNORE_INDEX) if forward_last else ids.values()[self._source + 1]
        if (dummy := dummy_image(micro_batch)) is not None:
            packed_ids = torch.cat([packed_ids, dummy.placeholders.to(packed_ids)])
            packed_positions = pad(packed_positions, (0, len(dummy.placeholders)))
            self.images = merged([dummy.inputs])
            self.counts.tokens_forwarded += len(dummy.placeholders)
            self.counts.squares += len(dummy.placeholders) ** 2
        self.ids, self.positions = packed_ids, packed_positions
        self._settings = {key: tu.get(micro_batch, key) for key in _SETTINGS if key in micro_batch}

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def pays(self) -> bool:
        """Whether this is worth more than verl's own forward of the rows, see `pays_to_pack`; with images it is."""
        removes_padding = self._settings.get("use_remove_padding", True)
        return bool(self.images) or _pays(self.num_tokens, self.row_lengths, removes_padding)

    @property
    def surrogate(self) -> TensorDict:
        packed = TensorDict({"input_ids": _one_row(self.ids), "position_ids": _one_row(self.positions)}, batch_size=[1])
        tu.assign_non_tensor(packed, **self._settings)
        return packed

    def behind_prompt(self) -> PackedMicroBatch:
        """This micro-batch, of one prompt, with the prompt's first ``P - 1`` tokens given: see `PrefixLayout.given`.

        All of its images are in those. Its counts are of the part alone.

        Raises:
            ValueError: the micro-batch has several prompts, or a dummy image.
        """
        if self.counts.groups != 1 or self.num_tokens != self.layout.num_tokens:
            raise ValueError(f"a part has one prompt and no dummy image, this one {self.counts.groups} prompts")
        part, given = copy(self), self._prompt_length - 1
        part.layout, part.images = self.layout.given(given), {}
        part.labels, part.ids, part.positions = self.labels[given:], self.ids[given:], self.positions[..., given:]
        part._source = self._source[given:]
        part.counts = self.counts + Counts(-given, squares=-(given**2), groups=-1, shared_1=given)
        return part

    def with_prompt_outputs(self, outputs: dict[str, Tensor]) -> PackedMicroBatch:
        """This part, to whose outputs :meth:`unpack` adds those of the prompt, by name: ``[P - 1]``, from another forward."""
        part = copy(self)
        part._prompt_outputs = outputs
        return part

    def _agree(self, values: Tensor) -> bool:
        """Whether the rows' ``values [..., tokens]`` are equal where they share."""
        packed = values[..., self._source]
        return torch.equal(packed[..., self._whole.row_index], values[..., self._read])

    def token_inputs(self, model_type: str, layout: PrefixLayout) -> dict[str, Tensor]:
        """What the model takes for each token apart from its id and position; images that see themselves go to ``layout``.

        Args:
            model_type: of the model.
            layout: :attr:`layout`, with any padding.
        """
        if self._types is None:
            return {}
        last = torch.tensor([len(row) for row in self._types]) - 1
        padded = pad_sequence(self._types, batch_first=True)
        blocks = image_blocks(model_type, padded, last)
        if blocks is not None:
            rows = blocks[torch.arange(padded.shape[1]) <= last[:, None]].to(layout.position_ids.device)
            set_blocks(layout, self._packed(rows, layout, -1))
        types = torch.cat(self._types).to(layout.position_ids.device)
        return {TOKEN_TYPES: self._packed(types, layout, 0)[None]}

    def _packed(self, rows: Tensor, layout: PrefixLayout, padding: int) -> Tensor:
        return pad(rows[self._source], (0, layout.num_padding), value=padding)

    def unpack(self, name: str, values: Tensor) -> Tensor:
        """Packed values ``[T]`` as a nested tensor of the rows. Differentiable.

        Without ``forward_last`` they are zero at each row's last token.

        Args:
            name: of the model's output. In a part its given positions are those of :meth:`with_prompt_outputs`, by default
                zero.
            values: for each token of the surrogate.
        """
        if (given := self.layout.num_given) > 0:
            prompt = self._prompt_outputs.get(name, values.new_zeros(given, *values.shape[1:]))
            values = torch.cat([prompt, values])
        rows = torch.cat([values, values.new_zeros(1, *values.shape[1:])])[self._places]
        return torch.nested.nested_tensor_from_jagged(rows, self._offsets)


def _one_row(values: Tensor) -> Tensor:
    """``[..., T]`` as a nested tensor of one row, its last axis the ragged one."""
    return tu.nested_tensor_from_tensor_list([values])  # type: ignore[no-any-return]
