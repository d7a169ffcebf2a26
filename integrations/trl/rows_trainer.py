"""Any trainer of TRL whose decoder forwards what the rows of a micro-batch have in common once.

DPO, reward models and their kin call a model with padded rows, one for each completion of a prompt, and compute a loss of their
own from what follows the decoder. :func:`~prefix_grouper_plugins.share_rows` shares inside of the decoder, so
nothing of the trainer is overridden: heads, losses, reference models and metrics are TRL's, and no row changes its
micro-batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

from prefix_grouper_plugins.integrations.trl.generation import SharedGeneration
from prefix_grouper_plugins.integrations.trl.mixins import (
    SHARDED,
    is_reference,
    must_come_before_trainers,
    option,
    show_signature,
)
from prefix_grouper_plugins.metrics import REF_LOG_PROB, UPDATE
from prefix_grouper_plugins.modeling import transformers_model
from prefix_grouper_plugins.row_sharing import RowSharing
from prefix_grouper_plugins.sharing import SharingGate

# Of prompts and their rows, which a decoder does not know.
_NOT_LOGGED = "rows_per_group"


class ShareRowsMixin:
    """Put before a trainer of TRL that forwards padded rows: :class:`trl.DPOTrainer`, :class:`trl.RewardTrainer` and so on.

    Settings are the fields of :class:`~prefix_grouper_plugins.integrations.trl.config.ShareRowsArguments`; with a stock
    config their defaults hold.

    Attributes:
        gate (`SharingGate`): whether forwards are shared, and why not.
        sharing (`SharingMeter`): counts of all forwards so far, on this process.
        generation (`SharedGeneration`): counts of what was prefilled, in trainers that sample.
        rows_in_common (`str`): which rows of its micro-batches begin alike, in a few words.

    Raises:
        UnsupportedModelError: on construction, when the model or a setting cannot be shared exactly and
            ``prefix_grouper_on_unsupported`` is ``error``.
        ValueError: when a class is made, the mixin comes after the trainer that it should change.
    """

    # Of the trainer that comes after it among the bases.
    args: Any
    model: Any
    accelerator: Any
    add_callback: Callable[..., None]

    built = 0  # trainers made in this process; the launcher warns when a script made none
    rows_in_common = "rows that begin alike share their beginning"
    _row_sharing: RowSharing | None = None
    _is_reference = False  # whether TRL computes reference log-probs before training

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        must_come_before_trainers(ShareRowsMixin, cls)
        show_signature(ShareRowsMixin, cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ShareRowsMixin.built += 1
        self._share_rows()
        self.generation = SharedGeneration(warn=self.accelerator.is_main_process)
        self._prefills: defaultdict[str, list[float]] = defaultdict(
            list
        )  # since the last log, by the name of the metric
        if self._shares:
            self.add_callback(RowsWatch(self))

    @property
    def _shares(self) -> bool:
        return bool(option(self.args, "use_prefix_grouper"))

    def _share_rows(self) -> None:
        """Put the hooks on the decoders, once: TRL may run the reference model while the trainer is being built."""
        if self._row_sharing is not None:
            return
        self.gate = SharingGate(
            backend=option(self.args, "prefix_grouper_backend"),
            self_check=option(self.args, "prefix_grouper_self_check"),
            on_unsupported=option(self.args, "prefix_grouper_on_unsupported"),
            refusal=self._refusal,
            is_main=self.accelerator.is_main_process,
        )
        self.sharing = self.gate.meter
        self._policy = self.model
        share = option(self.args, "prefix_grouper_share")
        self._shared_models = self._models()
        self._row_sharing = RowSharing(
            self._shared_models,
            self.gate,
            share="auto" if share == "prompt" else share,  # a decoder does not know which tokens are prompts
            reasons=why_not_share_settings(self.args),
            during=self._pass_of,
            takes_over=True,  # another trainer may have been built on this model before
        )
        if not self._shares:
            return
        self.open_row_sharing()

    def open_row_sharing(self) -> None:
        """See to it that forwards count for this trainer, and not for another one of the same model that was built since."""
        assert self._row_sharing is not None
        self._row_sharing.open()
        for decoder in self.gate.models:
            if self.gate.needs_self_check(decoder) and self.accelerator.distributed_type not in SHARDED:
                with self.accelerator.autocast():  # every process at the same point
                    self.gate.self_check(decoder, self.accelerator.device)
        if self.gate.reason is None:
            self.gate.say_what_differs()
            known = [transformers_model(model) for model in self._shared_models]
            for base in map(transformers_model, self._models()):  # which may have been wrapped since
                if all(base is not other for other in known):
                    self.gate.warn(
                        f"{type(base).__name__} has become a model of this trainer after it was built, so its forwards are not "
                        "shared: give it to the trainer's constructor"
                    )

    def _models(self) -> list[Any]:
        """All models that forward rows, each once."""
        named = (getattr(self, name, None) for name in ("model", "ref_model", "teacher_model"))
        return list({id(model): model for model in named if model is not None}.values())

    def _refusal(self, reasons: str) -> str:
        return (
            f"prefix grouper cannot run {type(self.model).__name__} exactly: {reasons}. Change that, or set "
            "prefix_grouper_on_unsupported='fallback' to train on the stock path"
        )

    def _pass_of(self, model: Any) -> str:
        return REF_LOG_PROB if self._is_reference or model is not self._policy or is_reference(model) else UPDATE

    @property
    def min_level(self) -> int:
        """Tokens that rows have to begin alike with to share them."""
        assert self._row_sharing is not None
        return self._row_sharing.min_level(self.accelerator.device)

    def expected_sharing(self) -> str:
        """What the rows of a micro-batch can share. Which rows meet in one is up to TRL's sampler."""
        rows, order = self.args.per_device_train_batch_size, getattr(self.args, "train_sampling_strategy", "random")
        return (
            f"{self.rows_in_common}; micro-batches are of {rows} examples in TRL's order "
            f"(train_sampling_strategy={str(getattr(order, 'value', order))!r}), no row is moved to another one"
        )

    def _without_sharing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._row_sharing is None else self._row_sharing.pause()

    # ---------------------------------------------------------------------------- where TRL runs models by itself

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._share_rows()
        self._is_reference = True  # the policy itself, which has not learned anything yet
        try:
            return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._is_reference = False

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Stock generation, each distinct prompt prefilled once."""
        with ExitStack() as stack:
            stack.enter_context(self._without_sharing())
            if self._shares and self.gate.reason is None and option(self.args, "prefix_grouper_generation"):
                stack.enter_context(self.generation.sharing(self.model, self._prefills))
            return super()._generate(*args, **kwargs)  # type: ignore[misc]

    def generate_from_model(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_sharing():
            return super().generate_from_model(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Stock log, with what all processes have shared since the last one. Every process calls it."""
        if self._shares:
            prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
            logs |= {f"{prefix}{name}": fmean(values) for name, values in self._prefills.items()}
            self._prefills.clear()
            counts = self.sharing.take().summed(self.accelerator.device)
            self.sharing.warn_of(counts)
            if counts.total.row_tokens:
                metrics = counts.metrics(share=True).items()
                logs |= {f"{prefix}{name}": value for name, value in metrics if not name.endswith(_NOT_LOGGED)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class RowsWatch(TrainerCallback):
    """Says that sharing is on, and sees whether the first update shares.

    Args:
        trainer: the trainer that shares.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seen_update = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what will be shared, by the settings that hold now."""
        trainer = self._trainer
        trainer.open_row_sharing()
        if trainer.gate.reason is None:
            line = trainer.gate.announce(trainer.expected_sharing())
            state.log_history.append({"prefix_grouper": line, "epoch": state.epoch or 0.0, "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each optimizer step."""
        trainer = self._trainer
        if self._seen_update:
            return
        self._seen_update = True
        update = trainer.sharing.passes[UPDATE]
        if not update.row_tokens:
            trainer.sharing.count_fallback(
                trainer.gate.reason or "the decoder was not called in the first update: the loss runs another model"
            )
        elif not update.packed and not update.fallbacks:
            trainer.gate.warn(
                f"no two rows of a micro-batch began alike in the first update, with {trainer.min_level} tokens or more, so "
                "nothing was shared: rows of a prompt share if they are in one micro-batch, with equal token ids and equal "
                "padding on the left"
            )


def why_not_share_settings(args: Any) -> list[str]:
    """Settings under which a forward computes something from all its tokens, or other code than was compared."""
    reasons = []
    if (alpha := getattr(args, "neftune_noise_alpha", None)) is not None:
        reasons.append(
            f"neftune_noise_alpha={alpha} adds noise to embeddings by the length of a forward, which is that of all rows "
            "when they are packed: unset it"
        )
    if getattr(args, "use_liger_kernel", False):
        reasons.append("use_liger_kernel replaces layers by kernels that no test has compared: unset it")
    return reasons
