"""The one gate: whether a model's forwards are shared. It is the code of the two rules, for every caller.

*Never silently wrong.* A model is checked (:func:`check_support`), enabled, and compared with its own rows on a few tokens
(:func:`self_check`) before its first packed forward. What fails is refused with all reasons in one message, or it takes the
ordinary path from then on and the reason is in :attr:`SharingGate.reason`.

*Never silently off.* Forwards are counted in :attr:`SharingGate.meter`, fallbacks by reason; what a user should know is
said once, by one process; and one line at the start says that sharing is on (:meth:`SharingGate.announce`).

A trainer goes through a gate like this:

    gate = SharingGate(backend="auto", on_unsupported="fallback", is_main=rank == 0)
    gate.enable([policy, reference], reasons)   # once the models are built and have their adapters; before sharding
    ...
    if gate.needs_self_check(model):            # before a pass, when weights are loaded and sharded as they will be
        with autocast:
            gate.self_check(model, device)      # every process at the same point, with the outermost module
    gate.check_changes(model)                   # before each pass
    if gate.reason is not None:                 # the ordinary path
        gate.meter.count_fallback(gate.reason, lengths)
    else:                                       # the packed one
        gate.meter.count_packed(counts)

:func:`enable_prefix_grouper` is the same for one model of one process.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prefix_grouper_plugins.attention.levels import least_level
from prefix_grouper_plugins.attention.registry import BACKENDS, check_backend_name
from prefix_grouper_plugins.metrics import SharingMeter, logger
from prefix_grouper_plugins.modeling.anatomy import Anatomy, transformers_model
from prefix_grouper_plugins.modeling.attention import is_ours
from prefix_grouper_plugins.modeling.carrier import LAYOUT_KWARG, given_layout
from prefix_grouper_plugins.modeling.enable import disable_prefix_grouper, enable_layers, has_layers_enabled
from prefix_grouper_plugins.modeling.errors import UnsupportedModelError
from prefix_grouper_plugins.modeling.mixers.state_forking import ON_ROWS
from prefix_grouper_plugins.modeling.self_check import (
    SelfCheck,
    checked_before,
    on_all_ranks,
    on_any_rank,
    self_check,
    why_not_yet,
)
from prefix_grouper_plugins.modeling.self_check.changes import (
    Watch,
    fingerprint,
    forget,
    has_changed,
    is_checking,
    remember,
)
from prefix_grouper_plugins.modeling.self_check.first_batch import compare_first_batch
from prefix_grouper_plugins.modeling.self_check.micro_batch import Compared
from prefix_grouper_plugins.modeling.support.report import SupportReport, report_on


class SharingGate:
    """Whether the models that one trainer runs are shared.

    Args:
        backend: attention backend of every layer.
        self_check: compare packed rows of each model with its rows before its first packed forward. Without it, model
            types that no test has compared are refused.
        on_unsupported: ``"error"`` raises for a model that cannot be shared exactly, ``"fallback"`` leaves all models to
            the ordinary path.
        refusal: makes the error's message from the reasons: name the remedy in the caller's own terms.
        is_main: whether this process is the one that talks.

    Attributes:
        reason (`str | None`): why nothing is shared; None where forwards are shared.
        meter (`SharingMeter`): all forwards so far, on this process.
        models (`list[nn.Module]`): what :meth:`enable` was given.
        anatomies (`list[Anatomy]`): the parts of each, as they were then.
        reports (`list[SupportReport]`): of each of them.
    """

    def __init__(
        self,
        *,
        backend: str = "auto",
        self_check: bool = True,
        on_unsupported: str = "error",
        refusal: Callable[[str], str] = str,
        is_main: bool = True,
    ) -> None:
        self.reason: str | None = None
        self.meter = SharingMeter(warn=is_main)
        self.models: list[nn.Module] = []
        self.anatomies: list[Anatomy] = []
        self.reports: list[SupportReport] = []
        self._backend, self._self_check = backend, self_check
        self._on_unsupported, self._refusal = on_unsupported, refusal
        self._is_main = is_main
        self._left_padding = False
        self._first_batches: dict[str, bool] = {}  # classes whose first batch has been compared: with gradients?
        self._said: set[str] = set()

    # ------------------------------------------------------------------------------------------------ check and enable

    def enable(self, models: Sequence[nn.Module], reasons: Sequence[str] = (), *, left_padding: bool = False) -> None:
        """Check ``models`` and let them take packed rows; their self-check waits for :meth:`self_check`.

        Args:
            models: bare or wrapped by PEFT, before they are sharded.
            reasons: the caller's own reasons why nothing can be shared.
            left_padding: whether the caller's ordinary path pads batches on the left, and packed rows have to equal that.

        Raises:
            UnsupportedModelError: some model cannot be shared exactly, and ``on_unsupported`` is ``"error"``.
            ValueError: there is no such backend.
        """
        check_backend_name(self._backend)
        self._left_padding = left_padding
        self.models, self.anatomies = list(models), [Anatomy(model) for model in models]
        self.reports = [report_on(anatomy) for anatomy in self.anatomies]
        of_models: list[str] = []
        for report in self.reports:
            of_models += report.reasons
            of_models += report.left_padding_reasons if left_padding else ()
            of_models += () if self._self_check else report.unverified
        if found := [*reasons, *of_models]:
            self._stop(found, self.models if of_models else ())  # the caller's own reasons do not concern others
            return
        for anatomy, report in zip(self.anatomies, self.reports, strict=True):
            enable_layers(anatomy, self._backend)
            _stop_waiting(anatomy.base)
            if self._self_check:
                _wait_for_packed_forward(anatomy.base, report.unverified)
            _watch(anatomy, self._self_check, left_padding)

    def min_level(self, share: str, device: str) -> int | None:
        """The ``min_level`` of `PrefixLayout.from_rows` for the setting ``share``.

        Args:
            share: ``"prompt"``, ``"tree"`` or ``"auto"``.
            device: type of the device that forwards run on.
        """
        if share != "auto":
            return 1 if share == "tree" else None
        layers = [layer.backend for report in self.reports for layer in report.layers]
        named = layers if self._backend == "auto" else [self._backend if name in BACKENDS else name for name in layers]
        return least_level((name for name in named if name != ON_ROWS), device)  # rows do not get dearer by levels

    def needs_self_check(self, model: nn.Module) -> bool:
        """Whether ``model``, bare or wrapped, has to go through :meth:`self_check` before its next packed forward."""
        return self.reason is None and self_check_pending(model)

    def self_check(
        self,
        model: nn.Module,
        device: torch.device | None = None,
        *,
        alone: bool = False,
        anatomy: Anatomy | None = None,
    ) -> None:
        """Compare packed rows of ``model`` with its rows on a few tokens. Where it fails, on any process, it is refused on all.

        A collective: every process calls it at the same point, with the outermost module, and under the autocast that
        forwards will have.

        Args:
            model: one of :attr:`models`, as it is wrapped by now.
            device: where token ids go and collectives run, by default where the model's embeddings are.
            alone: leave the other processes out. For callers that cannot know what those do.
            anatomy: the parts of `model`, where the caller knows them already.

        Raises:
            UnsupportedModelError: packed rows are not the rows, or nothing could be compared for a model that is refused
                without, and ``on_unsupported`` is ``"error"``.
        """
        unverified = _stop_waiting(transformers_model(model) if anatomy is None else anatomy.base)
        result = self_check(model, device, left_padding=self._left_padding, anatomy=anatomy)
        if not alone:
            result = on_all_ranks(result, device or next(model.parameters()).device)
        if reasons := _why_not_after(result, unverified):
            self.refuse(reasons)
        elif self._is_main:
            logger.log(logging.INFO if result.passed else logging.WARNING, "prefix grouper: %s", result)

    def check_changes(self, model: nn.Module, device: torch.device | None = None, *, alone: bool = True) -> None:
        """Check ``model`` again if it has changed since it was checked. Where that fails, it is refused.

        Call it before each pass: within a forward (see `_check_what_has_changed`) it is too late for the ordinary path.

        Args:
            model: one of :attr:`models`, as it is wrapped by now.
            device: where collectives run.
            alone: leave the other processes out: their forwards do not depend on whether this one shares. Otherwise it is a
                collective.

        Raises:
            UnsupportedModelError: what it has become cannot be shared exactly, and ``on_unsupported`` is ``"error"``.
        """
        if self.reason is not None or self_check_pending(model):
            return
        base = transformers_model(model)
        disabled = self._why_disabled(base)
        changed = disabled is not None or has_changed(base)
        device = device or next(model.parameters()).device
        if not (changed if alone else on_any_rank(changed, device)):
            return
        anatomy = Anatomy(base if alone else model)
        if not alone and anatomy.is_sharded and on_any_rank(not changed, device):
            # Its forwards need every process, and these would not make the same ones in a self-check.
            reasons = ["it is sharded and has changed on some processes only: make the same change on all of them"]
        elif disabled:
            reasons = [disabled]
        else:
            reasons = _why_not_any_longer(anatomy, self._self_check, self._left_padding, alone=alone)
        if not alone and on_any_rank(bool(reasons), device) and not reasons:
            reasons = ["another process found a difference"]
        if reasons:
            self.refuse([_changed(base, reasons)])
        elif changed:
            remember(base)

    def _why_disabled(self, base: Any) -> str | None:
        """Why ``base``, which was enabled, takes no packed rows any longer; None if it does."""
        anatomy = next((anatomy for anatomy in self.anatomies if anatomy.base is base), None)
        if anatomy is None:
            return None
        names = [config._attn_implementation for config in anatomy.configs if not is_ours(config)]
        if names and anatomy.attention_layers:
            return f"its attention implementation has become {names[0]!r}, by disable_prefix_grouper(model) or by hand"
        return None if has_layers_enabled(anatomy) else "disable_prefix_grouper(model) was called"

    def needs_first_batch(self, model: nn.Module) -> bool:
        """Whether ``model`` is of a class that no test has compared, and its first batch has not been run both ways yet.

        A pass without gradients compares log-probs; the first pass with gradients compares both.
        """
        if self.reason is not None or not self._self_check or not any(report.unverified for report in self.reports):
            return False
        compared = self._first_batches.get(type(transformers_model(model)).__name__)
        return compared is None or (torch.is_grad_enabled() and not compared)

    def first_batch(
        self,
        model: nn.Module,
        ordinary: Callable[[Any], torch.Tensor],
        shared: Mapping[str, Callable[[Any], torch.Tensor]],
        mask: torch.Tensor,
        backward: Callable[[torch.Tensor], Mapping[str, torch.Tensor]] | None = None,
        *,
        alone: bool = False,
        scores: str = "log-probs",
    ) -> None:
        """Run the first micro-batch both ways, before its results are used; where they differ, refuse on all processes.

        A collective: every process calls it at the same point, also one whose rows take the ordinary path. Where that is so
        on all of them, the comparison waits for the next micro-batch.

        Args:
            model, ordinary, mask, backward: as in
                :func:`~prefix_grouper_plugins.modeling.self_check.first_batch.compare_first_batch`.
            shared: likewise; empty where the rows of this process take the ordinary path.
            alone: leave the other processes out. For callers that cannot know what those do.
            scores: what is compared, for the log.

        Raises:
            UnsupportedModelError: they differ by more than rounding explains, and ``on_unsupported`` is ``"error"``.
        """
        if not mask.any():
            shared = {}
        if not (shared if alone else on_any_rank(bool(shared), mask.device)):
            return
        self._first_batches[type(transformers_model(model)).__name__] = torch.is_grad_enabled()
        # A sharded model needs every process for its forwards.
        shared = shared or {"ordinary": ordinary}
        result = compare_first_batch(model, ordinary, shared, mask, mask.device, backward)
        if not alone:
            result = on_all_ranks(result, mask.device)
        if result.reason is not None:
            self.refuse([str(result)])
        elif self._is_main:
            said = f"differ by {result.outputs:.1e} in {scores}"
            if not result.passed:
                said = f"could not be compared: {result.not_covered}"
            elif result.not_covered is not None:
                said += f"; not covered: {result.not_covered}"
            elif torch.is_grad_enabled():
                said += f", by {result.gradient:.1e} in gradients"
            logger.log(
                logging.INFO if result.passed else logging.WARNING,
                "prefix grouper: the first batch of %s, ordinary and shared (%.2f s): %s",
                result.model,
                result.seconds,
                said,
            )

    def verified(self, result: Compared, what: str, device: torch.device, *, shared: bool) -> bool:
        """Say what the option ``verify`` has found, and refuse to share where paths differ. A collective.

        Args:
            result: of this process.
            what: was compared.
            device: where collectives run.
            shared: whether rows of this process were shared in it.

        Returns:
            whether the comparison shows something, the same on all processes: rows were shared, and gradients are not zero.

        Raises:
            UnsupportedModelError: they differ by more than rounding explains, and ``on_unsupported`` is ``"error"``.
        """
        result = on_all_ranks(result, device)
        somewhere = on_any_rank(shared, device)
        complete = not on_any_rank(not result.passed, device)
        result = result.over_ranks(device)
        if result.reason is not None:
            self.refuse([f"{what}, run on both paths, differs: {result}"])
            return True
        if not complete:
            why = "another process could not" if result.passed else result.not_covered
            self.warn(f"verify: {what} could not be compared: {why}")
        elif not somewhere:
            self.warn(f"verify: no rows of {what} are shared, so there is nothing to compare yet")
        elif self._is_main:
            log_visibly(f"prefix grouper: verified {what} in {result.seconds:.2f} s: {result.in_words()}")
        return somewhere and complete and (result.has_gradients or result.not_covered is not None)

    def refuse(self, reasons: Sequence[str]) -> None:
        """Share nothing from here on: every model becomes what it was.

        Raises:
            UnsupportedModelError: ``on_unsupported`` is ``"error"``.
        """
        self._stop(reasons, self.models)

    def _stop(self, reasons: Sequence[str], disabled: Sequence[nn.Module]) -> None:
        self.reason = "; ".join(dict.fromkeys(reasons))
        for model in disabled:
            if transformers_model(model) is not None:
                _stop_waiting(transformers_model(model))
                disable_prefix_grouper(model)
        if self._on_unsupported == "error":
            raise UnsupportedModelError(self._refusal(self.reason))

    # -------------------------------------------------------------------------------------------------------- say so

    def warn(self, *remarks: str) -> None:
        """Log ``remarks`` as one warning, each of them once, and on the main process."""
        new = [remark for remark in dict.fromkeys(remarks) if remark not in self._said]
        if self._is_main and new:
            logger.warning("prefix grouper: %s", "; ".join(new))
        self._said.update(new)

    def say_what_differs(self) -> None:
        """Warn, once, of what is shared and gives other numbers than the ordinary path all the same: dropout."""
        self.warn(*(note for report in self.reports for note in report.notes))

    def announce(self, expected: str, limits: Sequence[str] = ()) -> str:
        """Say in one line at INFO, on the main process, that sharing is on.

        Args:
            expected: what will be shared, by the sizes of batches.
            limits: what keeps rows from sharing more, if anything.

        Returns:
            the line.
        """
        models = " and ".join(
            f"{type(transformers_model(model)).__name__} ({_layers_in_words(report)})"
            for model, report in zip(self.models, self.reports, strict=True)
        )
        line = f"prefix grouper is on for {models}: {expected}"
        if limits:
            line += f"; limited: {'; '.join(limits)}"
        if self._is_main:
            log_visibly(line)
        return line


def enable_prefix_grouper(
    model: nn.Module, *, backend: str = "auto", self_check: bool | Literal["later"] = True
) -> nn.Module:
    """Let ``model`` (a transformers causal LM, bare or wrapped by PEFT) take packed rows. In place and idempotent.

    Nothing changes for ordinary calls. Packed calls are made with :func:`packed_inputs`. A warning says what gives other
    numbers in them all the same, such as dropout.

    Args:
        model: the model.
        backend: attention backend of every layer, see :func:`~prefix_grouper_plugins.shared_prefix_attention`.
        self_check: compare a tiny packed forward and backward with forwards of the rows (:func:`~prefix_grouper_plugins.self_check`)
            at once, or before the first packed forward where weights are not loaded yet; ``"later"`` waits for it in any
            case. Without the self-check, model types that no test has compared are refused.

    Returns:
        the same model.

    Raises:
        UnsupportedModelError: the packed result could differ from the ordinary one, or did in the self-check; the message
            says why.
        ValueError: there is no such backend.
    """
    gate = SharingGate(backend=backend, self_check=bool(self_check))
    gate.enable([model])
    if self_check is True:
        (anatomy,) = gate.anatomies
        if why_not_yet(anatomy) is None and not anatomy.is_sharded:
            gate.self_check(model, alone=True, anatomy=anatomy)
    gate.say_what_differs()
    return model


def self_check_pending(model: nn.Module) -> bool:
    """Whether the self-check of ``model`` waits for its first packed forward."""
    base = transformers_model(model)
    return base is not None and bool(_waiting_hooks(base))


def log_visibly(message: str) -> None:
    """Log ``message`` at INFO, and see to it that it reaches the terminal.

    Python drops INFO of loggers for which nobody has set up anything; there it goes to stderr, where warnings go too. Who
    has set up logging decides.
    """
    if logger.hasHandlers() or logger.level != logging.NOTSET:
        logger.info(message)
    else:
        print(message, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- the self-check


def _why_not_after(result: SelfCheck, unverified: Sequence[str]) -> tuple[str, ...]:
    """Why a model is refused after its self-check: it failed, or it was needed and could not be made."""
    if result.reason is not None:
        return (str(result),)
    return (*unverified, str(result)) if unverified and not result.passed else ()


def _wait_for_packed_forward(base: Any, unverified: Sequence[str]) -> None:
    hook = functools.partial(_self_check_first, unverified=tuple(unverified))
    base.register_forward_pre_hook(hook, with_kwargs=True)


def _waiting_hooks(base: Any) -> dict[int, Any]:
    hooks = base._forward_pre_hooks.items()  # not by the handle: that of a copied model belongs to the original
    return {key: hook for key, hook in hooks if getattr(hook, "func", None) is _self_check_first}


def _stop_waiting(base: Any) -> tuple[str, ...]:
    """No self-check waits for ``base`` any longer; why the model would be refused without one."""
    unverified: tuple[str, ...] = ()
    for key, hook in _waiting_hooks(base).items():
        unverified = hook.keywords["unverified"]
        # Not `_forward_pre_hooks_with_kwargs`: a hook in front may take this one away while torch goes through them.
        del base._forward_pre_hooks[key]
    return unverified


def _self_check_first(base: Any, args: Any, kwargs: dict[str, Any], unverified: tuple[str, ...]) -> None:
    """Forward pre-hook: check a model that could not be checked when it was enabled, before its first packed forward."""
    if is_checking() or not self_check_pending(base):  # made by hand, or by a hook in front
        return
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is None:
        return
    gate = SharingGate()
    gate.models, anatomy = [base], Anatomy(base)
    if not anatomy.is_sharded or checked_before(anatomy) is not None:
        gate.self_check(base, alone=True, anatomy=anatomy)
        return
    # Only some layers may be sharded, and this process cannot know what others do.
    _stop_waiting(base)
    if unverified:
        raise UnsupportedModelError("; ".join([*unverified, "call self_check(model) on every process first"]))
    gate.warn(
        f"{type(base).__name__} is sharded, so it is not self-checked on its own: call self_check(model) on every process"
    )


def _watch(anatomy: Anatomy, checks: bool, left_padding: bool) -> None:
    """See to it that a model is checked again before a packed forward if it has changed since."""
    base = anatomy.base
    forget(base)
    remember(base, anatomy.base_modules)
    hook = functools.partial(_check_what_has_changed, watch=Watch(base), checks=checks, left_padding=left_padding)
    base.register_forward_pre_hook(hook, with_kwargs=True)


def _check_what_has_changed(
    base: Any, args: Any, kwargs: dict[str, Any], watch: Watch, checks: bool, left_padding: bool
) -> None:
    """Forward pre-hook: other layers, forwards, hooks or adapters than were checked are checked too, or refused.

    Raises:
        UnsupportedModelError: the model that it has become cannot be shared exactly.
    """
    if given_layout(kwargs.get(LAYOUT_KWARG), kwargs.get("attention_mask")) is None or not watch.has_changed():
        return
    _check_again(base, checks, left_padding)


@torch.compiler.disable(
    reason="the model has changed since it was checked: run one packed forward without torch.compile first"
)
def _check_again(base: Any, checks: bool, left_padding: bool) -> None:
    """Outside of any graph that is being compiled, which breaks it.

    Raises:
        UnsupportedModelError: see `_check_what_has_changed`.
    """
    anatomy = Anatomy(base)
    if reasons := _why_not_any_longer(anatomy, checks, left_padding, alone=True):
        raise UnsupportedModelError(f"{_changed(base, reasons)}. Undo that, or call disable_prefix_grouper(model)")
    if not (checks and anatomy.is_sharded):  # else nothing was checked: it is when all processes come to one point
        remember(base)


# Of sharded models that have changed: the state of which it was told that nobody has checked it.
_TOLD: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def _why_not_any_longer(anatomy: Anatomy, checks: bool, left_padding: bool, *, alone: bool) -> list[str]:
    """Why a model that has changed cannot be shared; it is self-checked where nothing else is known against it.

    Args:
        anatomy: of the model, as it is wrapped where every process calls this at the same point.
        checks: whether there are self-checks.
        left_padding: as in :meth:`SharingGate.enable`.
        alone: whether other processes may not call this now. Forwards of a sharded model need all.
    """
    base = anatomy.base
    report = report_on(anatomy)
    reasons = [*report.reasons, *(report.left_padding_reasons if left_padding else ())]
    cannot_check = anatomy.is_sharded and alone
    if cannot_check or not checks:
        reasons += report.unverified
    if reasons or not checks:
        return reasons
    if cannot_check:
        remark = (
            f"{type(base).__name__} has changed since it was checked. It is sharded, so it is not checked again on its own: "
            "call self_check(model) on every process"
        )
        if _TOLD.get(base) != (state := fingerprint(base)):
            _TOLD[base] = state
            logger.warning("prefix grouper: %s", remark)
        return []
    return list(
        _why_not_after(self_check(anatomy.model, left_padding=left_padding, anatomy=anatomy), report.unverified)
    )


def _changed(base: Any, reasons: Sequence[str]) -> str:
    return (
        f"{type(base).__name__} has changed since it was checked, and cannot be shared any longer: {'; '.join(reasons)}"
    )


_check_what_has_changed.belongs_to_enabling = True  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------- in one line


def _layers_in_words(report: SupportReport) -> str:
    """How the layers run: "24 layers: auto, merged_lse" and the like."""
    kinds = Counter(layer.backend for layer in report.layers)
    return ", ".join(f"{number} layer{'s' * (number > 1)}: {backend}" for backend, number in kinds.items())
