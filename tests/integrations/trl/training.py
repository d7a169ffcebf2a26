"""Runs the stock and the shared trainer on the same tiny problem in float64, and compares what they have learned."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.utils as trl_utils
from packaging.version import Version
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig, PrefixGrouperGRPOTrainer
from prefix_grouper_plugins.modeling.anatomy import transformers_model
from prefix_grouper_plugins.modeling.self_check.changes import remember
from tests import tiny
from tests.processes import run_in_fork

TRL = Version(trl.__version__)
HAS_ROUTER_LOSS = Version("1.7") <= TRL  # in GRPO and RLOO


def skip_before(release: str, why: str) -> None:
    """Skip the test, or the module, on releases of TRL before ``release``, the first that we test of which ``why`` is not true."""
    if Version(release) > TRL:
        pytest.skip(f"TRL {TRL} {why}", allow_module_level=True)


def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Deterministic, and different for almost any two completions."""
    return [sum((int(i) * 7919) % 13 for i in ids) / 10.0 + 0.01 * len(ids) for ids in completion_ids]


def use_float64_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's fused head computes in float32; put a plain float64 one in its place, for both trainers."""

    def head(hidden, weight, bias, targets, temperature, chunk, softcap=None, scale=1.0, outputs=()):
        logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
        logps = (logits / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1) if "entropy" in outputs else None
        sum_of_squares = (2 * logps).logsumexp(-1).detach() if "log_sum_sq_probs" in outputs else None
        mean = (logits / temperature).mean(-1).detach() if "mean_logits" in outputs else None
        is_top1 = logits.argmax(-1) == targets if "is_top1" in outputs else None
        return logps.gather(-1, targets[:, None])[:, 0], entropy, sum_of_squares, mean, is_top1

    if hasattr(trl_utils, "_ChunkedLogProbFunction"):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", type("Head", (), {"apply": staticmethod(head)}))


def make_trainer(
    path: str,
    *,
    shared: bool,
    lora: bool = False,
    dtype: torch.dtype = torch.float64,
    output_dir: str | Path | None = None,
    trainer_class: Any = None,
    config_class: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    processing_class: Any = None,
    longest_prompt: int = 12,
    rollout: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    trainer_class = trainer_class or (PrefixGrouperGRPOTrainer if shared else GRPOTrainer)
    config_class = config_class or (PrefixGrouperGRPOConfig if shared else GRPOConfig)
    if not shared:
        settings = {k: v for k, v in settings.items() if not k.startswith("prefix_grouper")}
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir or Path(tempfile.gettempdir()) / "prefix_grouper_tests"),
        "max_completion_length": 10,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "temperature": 0.9,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
        "model_init_kwargs": {"dtype": dtype, "attn_implementation": "sdpa"},
    }
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_dropout=0.0)
    torch.manual_seed(0)
    trainer = trainer_class(
        model=path,
        reward_funcs=reward,
        args=config_class(**{**arguments, **settings}),
        train_dataset=train_dataset or tiny.prompts(longest=longest_prompt),
        eval_dataset=eval_dataset,
        processing_class=processing_class or tiny.tokenizer(),
        peft_config=adapter if lora else None,
        **(rollout or {}),  # rollout_func, tools or environment_factory
    )
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model.to(dtype)
            tiny.compute_norms_in_input_dtype(model)
            if shared:
                remember(transformers_model(model))  # or it would be checked again, as one that has changed
    return trainer


def train(path: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Trained weights by name, and the trainer."""
    trainer = make_trainer(path, **options)
    initial = trained_weights(trainer)
    torch.manual_seed(5)
    trainer.train()
    trained = trained_weights(trainer)
    assert largest_difference(initial, trained) > 0, "nothing was trained"
    return trained, trainer


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of those that require a gradient, by name."""
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def run_python(folder: Path, *command: str, in_fork: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` in ``folder`` with the checkout on its path; its errors are shown if it fails.

    ``in_fork``: see :func:`tests.processes.run_in_fork`.
    """
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    if in_fork:
        done = run_in_fork(*command, cwd=folder, env=environment)
    else:
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
