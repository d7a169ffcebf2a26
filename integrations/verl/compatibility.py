"""What of verl we call and override, checked against the installed release.

All of it is private to verl ("Interface is subject to change"). A release that moved something must stop a run that
asks for sharing with a message that says so, and must not disturb any other run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from functools import reduce
from typing import Any

SUPPORTED = ("0.9.1",)
_FSDP = "verl.workers.engine.fsdp.transformer_impl"
_WORKERS = "verl.workers.engine_workers"
_SEPARATE = "verl.experimental.separation.engine_workers"
_V1 = "verl.trainer.ppo.v1.trainer_base"
_V0 = "verl.trainer.ppo.ray_trainer"
_BALANCE = ("self", "batch", "metrics", "logging_prefix", "keep_minibatch")

# module -> name in it -> its parameters
_SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    _FSDP: {
        "FSDPEngineWithLMHead.__init__": (
            "self",
            "model_config",
            "engine_config",
            "optimizer_config",
            "checkpoint_config",
        ),
        "FSDPEngineWithLMHead._build_module": ("self",),
        "FSDPEngineWithLMHead._build_fsdp_module": ("self", "module"),
        "FSDPEngineWithLMHead.forward_backward_batch": ("self", "data", "loss_function", "forward_only"),
        "FSDPEngineWithLMHead.forward_step": ("self", "micro_batch", "loss_function", "forward_only"),
        "FSDPEngineWithLMHead.prepare_model_inputs": ("self", "micro_batch"),
        "FSDPEngineWithLMHead.prepare_model_outputs": (
            "self",
            "output",
            "output_args",
            "micro_batch",
            "logits_processor_func",
        ),
        "FSDPEngineWithValueHead.prepare_model_outputs": (
            "self",
            "output",
            "output_args",
            "micro_batch",
            "logits_processor_func",
        ),
        "prepare_micro_batches": (
            "data",
            "dp_group",
            "num_batches_divided_by",
            "same_micro_num_in_dp",
            "min_num_micro_batch",
            "use_dynamic_bsz_balance",
        ),
        "postprocess_batch_func": ("output_lst", "indices", "data"),
        "ulysses_pad_and_slice_inputs": (
            "input_ids_rmpad",
            "position_ids_rmpad",
            "sp_size",
            "skip_position_ids_rmpad",
            "pad_value",
        ),
    },
    _WORKERS: {
        "ActorRolloutRefWorker.__init__": ("self", "config", "role", "distillation_config", "kwargs"),
        "TrainingWorker.__init__": ("self", "config"),
        "TrainingWorker.train_mini_batch": ("self", "data"),
        "maybe_fix_3d_position_ids": ("data",),
        "TrainingWorker._postprocess_output": (
            "self",
            "output",
            "global_token_num",
            "delta_time",
            "forward_only",
            "images_seqlens",
        ),
    },
    _SEPARATE: {
        "DetachActorWorker._get_strategy_handlers": ("self",),
        "DetachActorWorker.restore_model_from_cpu": ("self", "n"),
    },
    _V1: {
        "PPOTrainer._balance_batch": _BALANCE,
        "PPOTrainer._update_actor": ("self", "batch", "metrics"),
        "PPOTrainer._update_critic": ("self", "batch", "metrics"),
    },
    _V0: {
        "RayPPOTrainer._balance_batch": _BALANCE,
        "RayPPOTrainer._update_actor": ("self", "batch"),
        "RayPPOTrainer._update_critic": ("self", "batch"),
    },
}


def check(module: str) -> None:
    """Compare what we hook into in one module of verl with what is installed.

    Raises:
        ImportError: something is missing or takes other parameters; the message names it and the supported releases.
    """
    for name, parameters in _SIGNATURES[module].items():
        _check(module, name, parameters)


def check_all(*, v1: bool) -> None:
    """:func:`check` of all that a run with verl's V1 or V0 trainer needs. Imports it."""
    for module in (_FSDP, _WORKERS, _V1 if v1 else _V0):
        check(module)


def _check(module: str, name: str, parameters: tuple[str, ...]) -> None:
    try:
        function: Any = reduce(getattr, name.split("."), importlib.import_module(module))
        found = tuple(p for p in inspect.signature(function).parameters if p != "_ray_trace_ctx")  # Ray's own
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{module}.{name} is not there ({error}). {remedy()}") from error
    if found != parameters:
        raise ImportError(f"{module}.{name} takes {found}, expected {parameters}. {remedy()}")


def remedy() -> str:
    """Which releases of verl can be used, and what to type."""
    return (
        f"Installed is verl {importlib.metadata.version('verl')}; prefix-grouper-plugins supports verl "
        f"{', '.join(SUPPORTED)}: pip install verl=={SUPPORTED[-1]}, or train without model_engine=prefix_grouper"
    )
