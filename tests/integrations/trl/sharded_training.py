"""A training with FSDP2 on two processes, part of distributed_training.py, against two stock processes without sharding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import DistributedType

from prefix_grouper_plugins import UnsupportedModelError
from tests.integrations.trl.training import largest_difference, make_trainer, train, trained_weights
from tests.logs import messages

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_steps": 2,
    "beta": 0.04,
    "lora": True,
    "gradient_checkpointing": True,
}
FSDP2: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


@contextmanager
def sharding() -> Iterator[None]:
    """In here accelerate shards by FSDP2, which it would not do on a CPU, though torch does."""

    def on_cpu(state: PartialState) -> None:
        state.device = torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(PartialState, "set_device", on_cpu)
        yield
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate leaves behind


def trains_sharded(path: str) -> None:
    """LoRA, layers that run again, a reference without adapters, and `verify` before each step, which runs sharded as well."""
    with messages() as said:
        stock, _ = train(path, shared=False, **SETTINGS)
        with sharding():
            trainer = make_trainer(path, shared=True, prefix_grouper_verify="1", **FSDP2, **SETTINGS)
            torch.manual_seed(5)
            trainer.train()
        assert trainer.accelerator.distributed_type == DistributedType.FSDP
        shared = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in trained_weights(trainer).items()}
        assert largest_difference(stock, shared) <= 1e-12, largest_difference(stock, shared)
        assert trainer.sharing.packed > 0 and not trainer.sharing.fallbacks, trainer.sharing.fallbacks
        if trainer.accelerator.is_main_process:
            verified = [line for line in said if "verified the first micro-batch" in line]
            assert len(verified) == SETTINGS["max_steps"] and "not covered" not in "".join(verified), said
    refuses_a_hook_that_leaks(trainer)


def refuses_a_hook_that_leaks(trainer: Any) -> None:
    """Checking the model again needs all processes."""
    layer = next(m for m in trainer.model.modules() if type(m).__name__ == "FSDPQwen3DecoderLayer")
    layer.register_forward_hook(lambda _, args, out: out + 0.5 * F.pad(out, (0, 0, 1, 0))[..., :-1, :])
    ids = torch.full((2, 9), 4)
    with pytest.raises(
        UnsupportedModelError, match=r"has changed since it was checked.* depends on tokens of other rows"
    ):
        trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)
