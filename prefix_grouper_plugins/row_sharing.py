"""``share_rows``: any head and any loss over ordinary padded rows, while the decoder forwards what rows have in common once.

There are two hooks on the decoder (the model without its head). The one before its forward finds what the rows of a batch begin
alike with and calls it with one packed row; the one after it gives every real token its hidden state back, ``[B, W, H]``.
Whatever calls the decoder (a language-model head, a fused head, a score head, a trainer's loss) stays as it is. Hidden states
at padding are zeros there, where an ordinary forward leaves values without meaning.

In a vision-language model they are on the part that takes token ids and images, and equal images of rows that begin alike go
through the vision tower once (modeling/padded_images.py).

What cannot be shared exactly takes the ordinary path: counted, and its reason logged once.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_grouper_plugins.generation import CACHES, cache_in
from prefix_grouper_plugins.metrics import UPDATE, Counts
from prefix_grouper_plugins.modeling.anatomy import Anatomy, decoder_of, text_part, transformers_model
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, given_layout
from prefix_grouper_plugins.modeling.enable import disable_prefix_grouper, has_layers_enabled
from prefix_grouper_plugins.modeling.inputs import packed_inputs, row_positions
from prefix_grouper_plugins.modeling.padded_images import PaddedImages, image_arguments, why_not_images
from prefix_grouper_plugins.modeling.self_check import why_not_yet
from prefix_grouper_plugins.modeling.self_check.changes import is_checking
from prefix_grouper_plugins.modeling.support.report import SupportReport, numbers_padded_columns, report_on
from prefix_grouper_plugins.padded_rows import PaddedRows, why_not_rows
from prefix_grouper_plugins.sharing import SharingGate

# Arguments of a decoder that say nothing about rows, or that the packed call sets itself. `margin` is of the loss: TRL's
# reward trainer hands its whole batch to the model, which hands on what it does not know, and no decoder reads it.
_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", "num_items_in_batch", "margin"}
_KINDS = ("token_type_ids", "mm_token_type_ids")  # of tokens, 0 for text
_OF_TOWERS = ("vision_feature_layer", "vision_feature_layers", "vision_feature_select_strategy")  # alike for all images
# What a forward may be asked for by its arguments or by the config, one place for each packed token.
_OUTPUTS = {"last_hidden_state", *CACHES}
_IMAGE_OUTPUTS = ("image_outputs", "image_hidden_states")  # of the images that the tower has seen, equal ones once
_FOR_GENERATION = "rope_deltas"  # an output of vision-language models that tells where generation goes on
_EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@contextmanager
def share_rows(
    model: nn.Module,
    *,
    share: str = "auto",
    backend: str = "auto",
    self_check: bool = True,
    on_unsupported: str = "error",
) -> Iterator[RowSharing]:
    """In this context, forwards of ``model`` with padded rows forward what the rows have in common once. Exact.

    The model is called as usual, with ``input_ids [B, W]`` and ``attention_mask [B, W]``, padded on either side; its head and
    your loss see hidden states ``[B, W, H]``, which are zeros at padding. Run the backward inside of the context, too:
    checkpointed layers run again in it.

    A forward that cannot be shared takes the ordinary path; its reason is logged once and counted in ``meter.fallbacks``.
    Rows that have nothing in common, or too little to pay, take it as well, which is no fallback. No cache is kept unless ``use_cache=True`` asks for
    one, which is such a reason.

    Args:
        model: a transformers model with any head or none, bare or wrapped (PEFT, DDP, FSDP).
        share: ``"tree"`` shares whatever rows begin alike with, ``"auto"`` what is long enough to pay.
        backend: attention backend of every layer, see :func:`~prefix_grouper_plugins.shared_prefix_attention`.
        self_check: compare packed rows with ordinary ones on a few tokens first, and the first batch of a model type that
            no test has compared; such types are refused without it.
        on_unsupported: ``"error"`` raises for a model that cannot be shared exactly, ``"fallback"`` leaves it to the
            ordinary path.

    Yields:
        what was shared and why not: ``meter`` and ``reason``.

    Raises:
        UnsupportedModelError: ``model`` cannot be shared exactly, and ``on_unsupported`` is ``"error"``.
        ValueError: the rows of ``model`` are being shared already, or there is no such ``share`` or backend.

    Example:
        >>> with share_rows(model) as sharing:
        ...     loss = my_loss(model(input_ids=ids, attention_mask=mask).logits, labels)
        ...     loss.backward()
        >>> sharing.meter.token_ratio
        0.41
    """
    gate = SharingGate(backend=backend, self_check=self_check, on_unsupported=on_unsupported)
    sharing = RowSharing([model], gate, share=share)
    with sharing:
        sharing.self_check_now()
        if gate.reason is None:
            gate.say_what_differs()
        yield sharing


class RowSharing:
    """The models whose rows are shared, from :meth:`open` to :meth:`close`; a context as well.

    Args:
        models: each a transformers model with any head or none, bare or wrapped.
        gate: decides whether forwards are shared.
        share: ``"auto"`` or ``"tree"``.
        reasons: the caller's own reasons why nothing can be shared.
        during: the pass that a forward belongs to (``metrics.PASSES``), by the model that runs.
        takes_over: whether :meth:`open` ends the sharing of others on these models, where it would be an error.

    Attributes:
        gate (`SharingGate`): its models are the decoders of ``models``.
        meter (`SharingMeter`): all forwards so far.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        gate: SharingGate,
        *,
        share: str = "auto",
        reasons: Sequence[str] = (),
        during: Callable[[nn.Module], str] | None = None,
        takes_over: bool = False,
    ) -> None:
        if share not in ("auto", "tree"):
            raise ValueError(
                f"share is {share!r}: choose 'auto' or 'tree'; which tokens are prompts a decoder does not know"
            )
        self.gate, self.meter, self._share = gate, gate.meter, share
        self.paused = False
        self._models, self._reasons = list(models), list(reasons)
        self._during = during or (lambda model: UPDATE)
        self._takes_over, self._is_open = takes_over, False
        self._hooks = ExitStack()

    @property
    def reason(self) -> str | None:
        """Why nothing is shared; None where forwards are."""
        return self.gate.reason

    def __enter__(self) -> RowSharing:
        self.open()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def open(self) -> None:
        """Enable the decoders and put the hooks on them, unless they are there.

        Raises:
            UnsupportedModelError, ValueError: see :func:`share_rows`.
        """
        if self._is_open:
            return
        decoders = [_decoder(model) for model in self._models]
        for decoder in decoders:
            for other in _sharing_of(decoder):
                if not (self._takes_over and other._takes_over):
                    raise ValueError(
                        f"the rows of {type(decoder).__name__} are being shared already: leave that share_rows(model) first"
                    )
                other.close()
        self._is_open = True
        reasons = list(self._reasons)
        for model in self._models:  # what surrounds the decoder: PEFT's wrapper, an encoder
            reasons += report_on(Anatomy(model)).reasons
        for decoder in decoders:
            if isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
                reasons.append(
                    f"{type(decoder).__name__} has no decoder apart from its head, whose hidden states could be had"
                )
        before = [has_layers_enabled(Anatomy(decoder)) for decoder in decoders]
        self.gate.enable(decoders, reasons)
        for model, anatomy, report, was_enabled in zip(
            self._models, self.gate.anatomies, self.gate.reports, before, strict=True
        ):
            decoder = anatomy.model
            if not was_enabled and self.gate.reason is None:
                self._hooks.callback(disable_prefix_grouper, decoder)
            hooks = _DecoderHooks(self, model, anatomy, report)
            before_forward = decoder.register_forward_pre_hook(hooks.pack, with_kwargs=True, prepend=True)
            behind_forward = decoder.register_forward_hook(hooks.unpack, prepend=True)
            self._hooks.callback(before_forward.remove)
            self._hooks.callback(behind_forward.remove)

    def self_check_now(self) -> None:
        """Compare packed rows of each model with ordinary ones, where its weights are there and whole.

        Elsewhere the first packed forward does.
        """
        for anatomy in self.gate.anatomies:
            ready = self.gate.needs_self_check(anatomy.model) and why_not_yet(anatomy) is None
            if ready and not anatomy.is_sharded:
                self.gate.self_check(anatomy.model, alone=True, anatomy=anatomy)

    def close(self) -> None:
        """Leave the models as they were."""
        self._is_open = False
        self._hooks.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """In this context the decoders run as they are, uncounted: for generation."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def min_level(self, device: torch.device) -> int:
        """Tokens that rows have to begin alike with to share them."""
        return self.gate.min_level(self._share, device.type) or 1

    def pass_of(self, model: nn.Module) -> str:
        """The pass that a forward of ``model``, one of the models, belongs to now."""
        return self._during(model)


class _NoCache:
    """Stands for the cache that an ordinary forward returns where nobody has said ``use_cache=False``."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "this forward shared the rows of its batch and kept no cache: call the model with use_cache=True for one, or "
            "outside of share_rows"
        )


class _NoImageOutputs:
    """Stands for what an ordinary forward returns of its images."""

    def to_tuple(self) -> _NoImageOutputs:
        """Asked for by outputs that are read by number, such as the hidden states at 0."""
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "this forward shared the rows of its batch and encoded equal images once, so there is no output for each image: "
            "call the model outside of share_rows"
        )


class _OfPackedRow:
    """Stands for another output of the decoder, such as one that it pools from the first token of a row."""

    _named = "an output"  # of a copy that is being made

    def __init__(self, name: str, decoder: nn.Module) -> None:
        self._named = f"{name} of {type(decoder).__name__}"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self._named} is that of a packed row, and is not brought back to the rows of this forward: call the model outside "
            "of share_rows"
        )


class _DecoderHooks:
    """In front of and behind the forward of one decoder. On a copied or unpickled one they do nothing."""

    is_copy = True  # unless it was built

    def __init__(self, sharing: RowSharing, model: nn.Module, anatomy: Anatomy, report: SupportReport) -> None:
        self.is_copy = False
        self._sharing, self._model, self._anatomy = sharing, model, anatomy
        self._left_padding_reasons = report.left_padding_reasons
        known = anatomy.base is not None and anatomy.numbers_positions is None
        self._numbers_columns = known and numbers_padded_columns(anatomy.base)
        signature = inspect.signature(type(anatomy.model).forward).parameters
        self._names = list(signature)[1:]
        self._takes_positions = "position_ids" in signature or bool(anatomy.column_positions)
        self._running = threading.local()  # the rows of a packed forward that has begun, in this thread

    def __reduce__(self) -> tuple[Any, tuple[type]]:
        return _DecoderHooks.__new__, (
            _DecoderHooks,
        )  # else a copy would count for this model, and copy all that are shared

    def pack(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward pre-hook: one packed row in place of the padded ones."""
        if self.is_copy or is_checking():  # a self-check, within a forward of which the rows are waiting
            return None
        self._running.rows = None  # of a forward that has raised
        if self._sharing.paused:
            return None
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if given_layout(inputs.get(LAYOUT_KWARG), inputs.get("attention_mask")) is not None:
            return None  # packed by somebody else
        rows, images, reason = self._read(decoder, inputs)
        if rows is not None and reason is None:
            reason = self._checked(decoder, inputs, rows, images)
        meter, during = self._sharing.meter, self._sharing.pass_of(self._model)
        if rows is None or reason is not None:
            meter.count_fallback(reason or "", _lengths(inputs), during=during)
            return None
        if not rows.has_something_in_common:
            meter.count_rows(rows.lengths, during=during)
            return None
        meter.count_packed(
            Counts(
                tokens_forwarded=rows.layout.num_tokens,
                row_tokens=rows.num_row_tokens,
                rows=len(rows.lengths),
                groups=rows.num_roots,
            )
            + Counts.of_levels(rows.layout.shared_by_level),
            during=during,
        )
        wants_cache = inputs.get("use_cache") is None and getattr(decoder.config, "use_cache", False)
        self._running.rows, self._running.wants_cache = rows, wants_cache
        return (), self._packed(decoder, inputs, rows, images)

    def unpack(self, decoder: Any, args: Any, output: Any) -> Any:
        """Forward hook: hidden states of the rows in place of the packed ones."""
        if self.is_copy or is_checking() or (rows := getattr(self._running, "rows", None)) is None:
            return None
        self._running.rows = None
        if getattr(output, _FOR_GENERATION, None) is not None:
            setattr(output, _FOR_GENERATION, None)
        for name in _IMAGE_OUTPUTS:
            if isinstance(output, dict) and output.get(name) is not None:
                output[name] = _NoImageOutputs()
        if isinstance(output, dict):
            known = {*_OUTPUTS, *_IMAGE_OUTPUTS}
            for name in [name for name, value in output.items() if name not in known and value is not None]:
                output[name] = _OfPackedRow(f"`{name}`", decoder)
        cache = _NoCache() if self._running.wants_cache else None
        if isinstance(output, tuple):
            others = [_OfPackedRow(f"output {i}", decoder) for i in range(1, len(output))]
            return (rows.unpack(output[0][0]), *([cache] if cache is not None else []), *others)
        output.last_hidden_state = rows.unpack(output.last_hidden_state[0])
        if cache is not None:
            output.past_key_values = cache
        return output

    def _read(self, decoder: Any, inputs: dict[str, Any]) -> tuple[PaddedRows | None, PaddedImages | None, str | None]:
        """The rows of a call and their images, if it has any, or the reason why it is not shared."""
        reason = self._sharing.gate.reason or _why_not_call(decoder.config, inputs)
        if reason is not None:
            return None, None, reason
        ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        here = ids.cpu()
        real = torch.ones_like(here, dtype=torch.bool) if mask is None else mask.cpu() != 0
        numbers = None if positions is None else positions.cpu().expand(here.shape)
        if (reason := why_not_rows(here, real, numbers)) is not None:
            return None, None, reason
        limit = self._anatomy.row_limit
        if limit is not None and here.shape[1] + 1 >= limit.length:
            return (
                None,
                None,
                (
                    f"the rows have {here.shape[1]} columns, and from {limit.length} on rope_type {limit.kind!r} changes the "
                    "angles of the whole batch"
                ),
            )
        if self._left_padding_reasons and not bool(real[:, 0].all()):
            return None, None, self._left_padding_reasons[0]
        images = None
        if image_arguments(inputs):
            if (reason := why_not_images(decoder, inputs, real)) is not None:
                return None, None, reason
            images = PaddedImages(decoder, inputs)
        rows = PaddedRows(
            ids,
            mask,
            positions,
            padded_positions=self._numbers_columns and (images is None or images.positions is None),
            min_level=self._sharing.min_level(ids.device),
            beginnings=None if images is None else images.beginnings,
        )
        return rows, images, None

    def _checked(
        self, decoder: Any, inputs: dict[str, Any], rows: PaddedRows, images: PaddedImages | None
    ) -> str | None:
        """The checks that are due before a packed forward; the reason why there must be none."""
        gate = self._sharing.gate
        if not rows.has_something_in_common:
            return None
        if gate.needs_self_check(decoder):
            anatomy = Anatomy(decoder)
            if not anatomy.is_sharded:  # there the hook of enabling decides, which knows no other process
                gate.self_check(decoder, alone=True, anatomy=anatomy)
        gate.check_changes(decoder)
        if gate.needs_first_batch(decoder):
            self._compare_first_batch(decoder, inputs, rows, images)
        return gate.reason

    def _compare_first_batch(
        self, decoder: Any, inputs: dict[str, Any], rows: PaddedRows, images: PaddedImages | None
    ) -> None:
        probe: list[Tensor] = []

        def scores(hidden: Tensor) -> Tensor:
            """``[B, W]`` of hidden states ``[B, W, H]``."""
            if not probe:
                generator = torch.Generator().manual_seed(0)
                probe.append(torch.randn(hidden.shape[-1], generator=generator).to(hidden.device))
            return hidden.float() @ probe[0] / hidden.shape[-1] ** 0.5

        packed = self._packed(decoder, inputs, rows, images)
        mask = rows.unpack(torch.ones_like(rows.input_ids))
        self._sharing.gate.first_batch(
            decoder,
            lambda inner: scores(inner(**inputs)[0]),
            {"shared": lambda inner: scores(rows.unpack(inner(**packed)[0][0]))},
            mask,
            alone=True,
        )

    def _packed(
        self, decoder: Any, inputs: dict[str, Any], rows: PaddedRows, images: PaddedImages | None
    ) -> dict[str, Any]:
        positions = rows.position_ids
        if inputs.get("position_ids") is None and self._anatomy.numbers_positions is not None:
            positions = row_positions(decoder, rows.layout, rows.input_ids)
        packed = packed_inputs(rows.layout, rows.input_ids, positions)
        if not self._takes_positions:
            del packed["position_ids"]
        packed |= {name: torch.zeros_like(packed["input_ids"]) for name in _KINDS if inputs.get(name) is not None}
        return inputs | packed | ({} if images is None else images.packed(rows))


def _decoder(model: nn.Module) -> nn.Module:
    """The module of ``model`` that returns hidden states; ``model`` itself or its base where there is no other.

    Of a vision-language model it is the one that takes token ids: its text part is given embeddings.
    """
    base = transformers_model(model)
    if base is None:
        return model
    return base.base_model if text_part(base) is not base else decoder_of(base) or base  # type: ignore[no-any-return]


def _why_not_call(config: Any, inputs: dict[str, Any]) -> str | None:
    """Why a decoder's forward with these arguments is not shared, before its rows are looked at; None if it may be."""
    if inputs.get("use_cache") or cache_in(inputs) is not None:
        return "the forward reads or returns a cache (`past_key_values`, `cache`, `use_cache=True`), as generation does"
    if inputs.get("input_ids") is None:
        return "the decoder is given `inputs_embeds` and no token ids, as with images and learned prompts"
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        return f"attention_mask has {kind}, not [rows, tokens]"
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return f"position_ids has {positions.dim()} dimensions, not [rows, tokens]"
    for name in _EXTRA_OUTPUTS:
        wanted = inputs.get(name)
        if wanted or (wanted is None and getattr(config, name, False)):
            return f"{name}=True asks for one entry for each token of each row"
    images = image_arguments(inputs)
    marked = (name for name in _KINDS if inputs.get(name) is not None and bool(inputs[name].any()))
    if not images and (found := next(marked, None)) is not None:
        return f"`{found}` marks tokens that are not text"
    for name, value in inputs.items():
        # Models hand on arguments of their heads, too: `logits_to_keep=0` asks for nothing.
        given = value is not None and not (isinstance(value, int) and not value)
        if given and name not in {*_KNOWN, *_EXTRA_OUTPUTS, *_KINDS, *images, *_OF_TOWERS}:
            return f"`{name}` is an argument of the forward that is not known here"
    return None


def _lengths(inputs: dict[str, Any]) -> list[int]:
    """Tokens of each row, as far as the arguments of a forward say."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return [int(length) for length in (mask != 0).sum(1).tolist()]
    return [ids.shape[1]] * ids.shape[0] if isinstance(ids, Tensor) and ids.dim() == 2 else []


def _sharing_of(decoder: nn.Module) -> list[RowSharing]:
    """Whose hooks are on ``decoder``."""
    found = (getattr(hook, "__self__", None) for hook in decoder._forward_hooks.values())
    return [hooks._sharing for hooks in found if isinstance(hooks, _DecoderHooks) and not hooks.is_copy]
