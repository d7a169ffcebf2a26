"""The rows of a model, the ways to forward them, and what differs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prefix_grouper_plugins.layout import PrefixLayout
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.inputs import packed_inputs, row_positions
from prefix_grouper_plugins.modeling.self_check.isolation import mode, rounding, untouched
from prefix_grouper_plugins.modeling.self_check.measures import Pass, difference, differences, excess, projected
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck
from prefix_grouper_plugins.modeling.self_check.rows import (
    PROMPTS_DIFFER_BY,
    longest_row,
    special_tokens,
    tree_of_rows,
)
from prefix_grouper_plugins.modeling.self_check.tolerances import CHAOS, LEAK, coarsest_dtype
from prefix_grouper_plugins.modeling.support.report import numbers_padded_columns, without_router_loss

LONGEST_WINDOW = 64  # longer sliding windows are not reached by the rows, so that the self-check stays cheap
_SHORTEST = 30  # tokens of the longest row, below which nothing can be compared
_SPIKE = 4.0  # norms of an embedding


class Comparison:
    """Five rows of a model: one by one, padded on the left, and as one packed row.

    Args:
        anatomy: of the model as it was given, bare or wrapped.
        device: where token ids go.
        left_padding: also compare with a batch that is padded on the left, without positions.
        long_rows: go beyond 256 tokens, for classes that no test has compared.

    Attributes:
        rows_failed (`bool`): whether the model could not run the rows by themselves.
    """

    def __init__(
        self, anatomy: Anatomy, device: torch.device | None, left_padding: bool, *, long_rows: bool = False
    ) -> None:
        model, base = anatomy.model, anatomy.base
        self.base, self.left_padding, self.rows_failed = base, left_padding, False
        self.sharded = anatomy.is_sharded
        # DDP would wait for a backward through all parameters; the model inside of it is whole.
        self.model = model if self.sharded else base
        self.embedding = base.get_input_embeddings()
        self.device = device or next((self.embedding if not self.sharded else model).parameters()).device
        # The gradients of sharded parameters are reduced over processes, which only a full backward does.
        self.parameters = {} if self.sharded else {name: p for name, p in base.named_parameters() if _has_gradient(p)}
        self.generator = torch.Generator().manual_seed(0)
        config = base.config.get_text_config(decoder=True)
        configs = [config, base.config, *filter(None, [getattr(base, "generation_config", None)])]
        self.window = anatomy.largest_window
        self.limit = anatomy.row_limit
        reach = self.window if self.window is not None and self.window <= LONGEST_WINDOW else 0
        # Columns of padding count towards the limit: the shorter prompt has as many as the prompts differ by.
        limit = None if self.limit is None else self.limit.length - (PROMPTS_DIFFER_BY if left_padding else 0)
        tables = [m for _, m in anatomy.modules if isinstance(m, nn.Embedding) and m is not self.embedding]
        usual = longest_row(configs[:2], limit, reach)
        self.longest = usual
        if long_rows:
            self.longest = longest_row(configs[:2], limit, reach, [table.num_embeddings for table in tables])
        self.vocabulary = config.vocab_size
        if not self.sharded:
            self.vocabulary = min(self.vocabulary, self.embedding.weight.shape[0])
        self.special = [token for token in special_tokens(configs) if 0 <= token < self.vocabulary]
        rows, self.prompt_lengths = tree_of_rows(
            self._words(config), self.special, reach, usual, self.longest, self.generator
        )
        self.rows = [row.to(self.device) for row in rows]
        self.pad = next((t for t in (getattr(c, "pad_token_id", None) for c in configs) if t is not None), None)
        self.layout = PrefixLayout.from_rows(self.rows).to(self.device)
        self.weights = [
            torch.randn(len(row) - 1, generator=self.generator, dtype=torch.float32).to(self.device)
            for row in self.rows
        ]
        takes = inspect.signature(base.forward).parameters
        # verl's fused heads demand the first, and return log-probs of the second.
        self.settings = {"return_dict": True} if "return_dict" in takes else {}
        self.settings |= without_router_loss(base)
        self.takes_labels = "shift_labels" in takes
        self.probe: Tensor | None = None
        self.dtype = coarsest_dtype(base, self.device)
        self.has_experts = anatomy.has_experts
        self.scans = bool(anatomy.mixers)

    def run(self) -> SelfCheck:
        """Make the comparison, and leave the model as it was."""
        start = time.perf_counter()
        result = SelfCheck(type(self.base).__name__, not_covered=self._uncovered())
        if self.limit is not None and self.longest < _SHORTEST:
            return replace(
                result,
                not_covered=f"its rows are shared below {self.limit.length} tokens only (rope_type {self.limit.kind!r})",
            )
        with untouched(self.base, self.device):
            try:
                result = self._in_both_modes(result)
            except torch.OutOfMemoryError:
                result = replace(result, not_covered="there is not enough memory for a few rows")
        return replace(
            result,
            tokens=self.layout.num_tokens,
            row_tokens=self.layout.num_row_tokens,
            seconds=time.perf_counter() - start,
        )

    # ------------------------------------------------------------------------------------------------------ the stages

    def _in_both_modes(self, result: SelfCheck) -> SelfCheck:
        """Training mode with gradients, then outputs in evaluation mode, then the padded batch."""
        with mode(self.base, training=True):
            try:
                ordinary = self._rows_alone()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever it is, the trainer's own forward will say it better
                self.rows_failed = True
                return replace(result, not_covered=f"the ordinary forward failed with {_named(error)}")
            result, packed = self._against_rows(result, ordinary)
            if result.reason is not None or not result.passed:
                return result
            noise: list[dict[str, float] | None] = []
            reason = self._reach_of_other_rows(packed, ordinary, noise)
        if reason is None:
            result = self._evaluation(result)
            reason = result.reason
        if reason is None and self.left_padding:
            with mode(self.base, training=True):
                reason = self._padded_on_the_left(ordinary, noise)
        return replace(result, passed=reason is None, reason=reason)

    def _against_rows(self, result: SelfCheck, ordinary: Pass) -> tuple[SelfCheck, Pass]:
        try:
            packed, leak = self._packed()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return replace(result, reason=f"the packed forward failed with {_named(error)}"), ordinary
        assert packed.embeddings is not None and ordinary.embeddings is not None
        result = replace(
            result,
            outputs=difference(packed.outputs, ordinary.outputs),
            gradient=difference(packed.embeddings, ordinary.embeddings),
        )
        if not leak <= LEAK:
            reason = f"a row depends on tokens of other rows ({leak:.1e} of its gradient lies there)"
            return replace(result, reason=reason), packed
        found = self._differences(packed, ordinary)
        if excess(found, self.dtype, None) is None:
            return replace(result, passed=True), packed
        random = self._randomness(ordinary)
        if random is not None:  # else what it keeps or draws would count as rounding
            return replace(result, passed=False, reason=random), packed
        noise = self._noise(ordinary)
        chaos = max((v for k, v in noise.items() if "parameter" not in k), default=0.0) if noise else 0.0
        if chaos > CHAOS:
            why = f"rounding in {self.dtype} alone changes what this model computes by {chaos:.0%}"
            return replace(result, not_covered=why), packed
        beyond = excess(found, self.dtype, noise, scans=self.scans)
        return replace(result, passed=beyond is None, reason=beyond), packed

    def _reach_of_other_rows(self, packed: Pass, ordinary: Pass, noise: list[dict[str, float] | None]) -> str | None:
        """Whether a row's outputs change when all tokens of other rows become extreme: what a gradient does not show."""
        chosen = 3  # there are rows before it and after it
        own = torch.zeros(self.layout.num_tokens, dtype=torch.bool, device=self.device)
        own[self._places()[chosen]] = True
        with torch.no_grad():
            output, _ = self._forward_packed(self.layout, spikes=~own)
        before, after = packed.outputs[own], output[own]
        change = float((after - before).norm(dim=-1).median() / before.norm(dim=-1).median().clamp(min=1e-30))
        name = "outputs of a typical token" if self._typical_only else "outputs"
        change = change if self._typical_only else difference(after, before)
        if excess({name: change}, self.dtype, None) is None:
            return None
        if excess({name: change}, self.dtype, self._noise_once(ordinary, noise)) is None:
            return None
        return f"a row depends on tokens of other rows (its outputs change by {change:.1e} with them)"

    def _evaluation(self, result: SelfCheck) -> SelfCheck:
        with mode(self.base, training=False), torch.no_grad():
            try:
                ordinary = self._rows_alone()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # bitsandbytes packs weights for the CPU there, and needs 64 of them in a row
                missing = f"evaluation mode, in which the ordinary forward failed with {_named(error)}"
                return replace(result, not_covered="; ".join(filter(None, [result.not_covered, missing])))
            try:
                packed = Pass(self._forward_packed(self.layout)[0])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return replace(result, reason=f"in evaluation mode the packed forward failed with {_named(error)}")
            reason = self._unexplained(packed, ordinary, self.layout, [])
        return result if reason is None else replace(result, reason=f"in evaluation mode {reason}")

    def _padded_on_the_left(self, alone: Pass, noise: list[dict[str, float] | None]) -> str | None:
        """The batch of a trainer that pads prompts on the left and passes no positions."""
        pads = [max(self.prompt_lengths) - length for length in self.prompt_lengths]
        layout = PrefixLayout.from_rows(self.rows, pads).to(self.device)  # other columns, other positions
        start = pads if numbers_padded_columns(self.base) else [0] * len(pads)
        positions = [torch.arange(s, s + len(row), device=self.device) for s, row in zip(start, self.rows, strict=True)]
        try:
            ordinary = self._batch(pads, layout)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"the ordinary forward of a batch that is padded on the left failed with {_named(error)}"
        if ordinary.outputs.isnan().any() and not alone.outputs.isnan().any():
            # A token of padding sees nothing: transformers' eager softmax computes in float32, where the least number of
            # float64 is -inf, and the next layer multiplies that token's NaN by zero.
            return (
                f"its ordinary forward of a batch that is padded on the left returns NaN in {self.dtype}: train with "
                "attn_implementation='sdpa' or in float32"
            )
        output, leaf = self._forward_packed(layout, layout.pack(positions))
        gradients = self._gradients(self._total(layout.unpack(output)), leaf)
        packed = Pass(output.detach(), gradients[0][0].float(), gradients[1])
        reason = self._unexplained(packed, ordinary, layout, noise)
        if reason is None:
            return None
        of_rows = layout.pack(list(_with_last(self.layout.unpack(alone.outputs))))
        apart = difference(ordinary.outputs, of_rows)
        return (
            f"padded on the left, as this trainer's batches are, {reason} (the ordinary batch differs from its own rows "
            f"alone by {apart:.1e})"
        )

    def _unexplained(
        self, found: Pass, expected: Pass, layout: PrefixLayout, noise: list[dict[str, float] | None]
    ) -> str | None:
        apart = self._differences(found, expected, layout)
        if excess(apart, self.dtype, None) is None:
            return None
        return excess(apart, self.dtype, self._noise_once(expected, noise, layout), scans=self.scans)

    def _noise_once(
        self, ordinary: Pass, noise: list[dict[str, float] | None], layout: PrefixLayout | None = None
    ) -> dict[str, float] | None:
        if not noise:
            noise.append(self._noise(self._rows_alone() if layout is not None else ordinary))
        return noise[0]

    def _noise(self, ordinary: Pass) -> dict[str, float] | None:
        """What rounding does: differences of the rows from themselves, every module's output moved within its precision."""
        with rounding(self.base, self.dtype):
            try:
                return self._differences(self._rows_alone(), ordinary)
            except Exception:  # a module whose output may not be touched; the plain tolerance holds
                return None

    def _randomness(self, ordinary: Pass) -> str | None:
        """Whether the rows differ from themselves when they are run again, with other random numbers."""
        again = excess(self._differences(self._rows_alone(), ordinary), self.dtype, None)
        return None if again is None else f"no two ordinary forwards agree, whatever is shared: {again}"

    @property
    def _typical_only(self) -> bool:
        return self.has_experts and self.dtype.itemsize < 4

    def _differences(self, found: Pass, expected: Pass, layout: PrefixLayout | None = None) -> dict[str, float]:
        return differences(found, expected, layout or self.layout, self._typical_only)

    # ------------------------------------------------------------------------------------------------------ the passes

    def _rows_alone(self) -> Pass:
        """Row by row; with gradients where they are enabled."""
        outputs, gradients = [], []
        parameters: dict[str, Tensor] = {}
        for i, row in enumerate(self.rows):
            output, leaf = self._forward(row.roll(-1)[None], input_ids=row[None], use_cache=False)
            outputs.append(output[0].detach())
            if torch.is_grad_enabled():
                gradient, of_parameters = self._gradients(self._objective(output[0, :-1], i), leaf)
                gradients.append(gradient[0, :-1])
                parameters = _sum(parameters, of_parameters)
        if not gradients:
            return Pass(self.layout.pack(outputs))
        return Pass(self.layout.pack(outputs), self._packed_sum(self.layout, gradients), parameters)

    def _batch(self, pads: list[int], layout: PrefixLayout) -> Pass:
        """All rows at once, as a trainer pads them: prompts on the left, responses on the right."""
        width = max(pad + len(row) for pad, row in zip(pads, self.rows, strict=True))
        shape = len(self.rows), width
        ids = torch.full(shape, self.pad if self.pad is not None else 0, device=self.device)
        mask = torch.zeros(shape, dtype=torch.long, device=self.device)
        for i, (pad, row) in enumerate(zip(pads, self.rows, strict=True)):
            ids[i, pad : pad + len(row)], mask[i, pad : pad + len(row)] = row, 1
        output, leaf = self._forward(ids.roll(-1, 1), input_ids=ids, attention_mask=mask, use_cache=False)
        parts = [output[i, pad : pad + len(row)] for i, (pad, row) in enumerate(zip(pads, self.rows, strict=True))]
        gradient, parameters = self._gradients(self._total([part[:-1] for part in parts]), leaf)
        own = [gradient[i, pad : pad + len(row) - 1] for i, (pad, row) in enumerate(zip(pads, self.rows, strict=True))]
        return Pass(layout.pack([part.detach() for part in parts]), self._packed_sum(layout, own), parameters)

    def _packed_sum(self, layout: PrefixLayout, gradients: list[Tensor]) -> Tensor:
        packed = torch.zeros(layout.num_tokens, gradients[0].shape[-1], device=self.device, dtype=torch.float32)
        return packed.index_add_(0, layout.row_index, torch.cat(gradients).float())

    def _packed(self) -> tuple[Pass, float]:
        """As one packed row; and the largest gradient of one row's outputs at tokens of others, over that at its own."""
        chosen = len(self.rows) // 2  # there are rows before it and after it
        output, leaf = self._forward_packed(self.layout)
        objective = self._objective(self.layout.unpack(output)[chosen], chosen)
        (of_one,) = torch.autograd.grad(objective, [leaf], retain_graph=not self.sharded, allow_unused=True)
        if of_one is None:
            raise RuntimeError("no gradient reaches the embeddings")
        again = output
        if self.sharded:  # the backward has freed gathered parameters that the graph needs
            again, leaf = self._forward_packed(self.layout)
        gradient, parameters = self._gradients(self._total(self.layout.unpack(again)), leaf)
        sizes = of_one[0].float().abs().amax(-1)
        own = torch.zeros_like(sizes, dtype=torch.bool)
        own[self._places()[chosen]] = True
        leak = float(sizes[~own].max() / sizes[own].max().clamp(min=torch.finfo(torch.float32).tiny))
        return Pass(output.detach(), gradient[0].float(), parameters), leak

    def _places(self) -> tuple[Tensor, ...]:
        """The packed positions of each row."""
        return self.layout.row_index.split([len(row) - 1 for row in self.rows])

    def _forward_packed(
        self, layout: PrefixLayout, positions: Tensor | None = None, spikes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Outputs ``[T, V]`` and the embeddings ``[1, T, d]``."""
        ids = layout.pack(self.rows)
        positions = row_positions(self.base, layout, ids) if positions is None else positions
        output, leaf = self._forward(layout.labels(self.rows)[None], spikes, **packed_inputs(layout, ids, positions))
        return output[0], leaf

    def _forward(self, labels: Tensor, spikes: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, L, V]`` and the embeddings ``[B, L, d]`` that they are differentiated by.

        Args:
            labels: ``[B, L]``, for heads that return log-probs.
            spikes: ``[L]``, true at tokens that get an extreme embedding.
            inputs: of the forward.
        """
        leaves: list[Tensor] = []
        hidden: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if spikes is not None and output.shape[-2] == len(spikes):
                output = _with_spikes(output, spikes)
            leaves.append(output.detach().requires_grad_())
            return leaves[-1].clone()  # ctrl writes into it

        def take(module: nn.Module, args: Any, output: Any) -> None:
            hidden.append(output[0])

        with ExitStack() as hooks:
            hooks.callback(self.embedding.register_forward_hook(cut).remove)
            if (decoder := self.base.get_decoder()) is not None:
                hooks.callback(decoder.register_forward_hook(take).remove)
            shifted = {"shift_labels": labels} if self.takes_labels else {}
            output = self.model(**inputs, **self.settings, **shifted)
        logits, logps = getattr(output, "logits", None), getattr(output, "log_probs", None)
        if logits is None and logps is not None:
            logits = logps.unsqueeze(-1)
        elif logits is None or logits.dim() != 3:  # a reward model, or no head at all
            logits = hidden[0] if hidden else output[0]
        if logits.shape[:2] != inputs["input_ids"].shape or not leaves:
            raise TypeError(f"{type(self.base).__name__} returns nothing that has one place for each token")
        self.dtype = max(self.dtype, logits.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        logits = logits.float()
        return logits.masked_fill(logits.isinf(), 0.0), leaves[0]  # -inf hides words

    def _objective(self, output: Tensor, row: int) -> Tensor:
        if self.probe is None:
            self.probe = torch.randn(output.shape[-1], generator=self.generator, dtype=torch.float32).to(self.device)
        return self.weights[row] @ (output @ self.probe) / output.shape[-1] ** 0.5

    def _total(self, outputs: list[Tensor]) -> Tensor:
        objectives = [self._objective(output, i) for i, output in enumerate(outputs)]
        return sum(objectives[1:], objectives[0])

    def _gradients(self, objective: Tensor, leaf: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """By the embeddings ``[B, L, d]``, and by the parameters; nothing is added to any ``grad``."""
        by_embeddings, *rest = torch.autograd.grad(objective, [leaf, *self.parameters.values()], allow_unused=True)
        if by_embeddings is None:
            raise RuntimeError("no gradient reaches the embeddings")
        named = zip(self.parameters, rest, strict=True)
        return by_embeddings, {name: projected(gradient) for name, gradient in named if gradient is not None}

    # ------------------------------------------------------------------------------------------------------- the rows

    def _words(self, config: Any) -> list[int]:
        """Ordinary words: placeholders of images and the like mean something to the model."""
        named = [*vars(config).items(), *vars(self.base.config).items()]
        marks = {v for k, v in named if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        marks |= set(self.special)
        drawn = torch.randperm(self.vocabulary, generator=self.generator)[: 200 + len(marks)].tolist()
        return [token for token in drawn if token not in marks]

    def _uncovered(self) -> str | None:
        if self.window is None or self.window <= LONGEST_WINDOW:
            return None
        return f"the sliding window of {self.window}, which is longer than these rows"


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.is_floating_point() and parameter.numel() > 0


def _sum(total: dict[str, Tensor], added: dict[str, Tensor]) -> dict[str, Tensor]:
    return total | {name: value + total[name] if name in total else value for name, value in added.items()}


def _with_last(outputs: list[Tensor]) -> Iterator[Tensor]:
    """Each row's outputs and one more, which no layout reads."""
    return (torch.cat([output, output[-1:]]) for output in outputs)


def _with_spikes(embeddings: Tensor, where: Tensor) -> Tensor:
    """``[B, L, d]``: at ``where [L]`` all of an embedding lies in one coordinate, which norms do not take away."""
    chosen = where.nonzero()[:, 0]
    size = _SPIKE * embeddings.float().norm(dim=-1).median()
    coordinates = torch.arange(len(chosen), device=embeddings.device) * 7 % embeddings.shape[-1]
    spikes = torch.zeros(len(chosen), embeddings.shape[-1], device=embeddings.device, dtype=embeddings.dtype)
    spikes[torch.arange(len(chosen)), coordinates] = size.to(embeddings.dtype)
    return embeddings.index_copy(1, chosen, spikes.expand(embeddings.shape[0], -1, -1))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
