"""TRL's fused head on the scored positions of a packed row alone.

``add_fused_lm_head`` (TRL 1.15 and newer) projects the positions that have a label, in tiles. It picks them out of the others
only where Triton runs; on a CPU it projects every position, those of prompts too, forward and backward, and sets the results to
zero afterwards. So there the backbone hands it nothing but what is scored: the same log-probs of the same hidden states.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling import transformers_model
from prefix_grouper_plugins.modeling.self_check.changes import modules_of

HAS_FUSED_HEAD = hasattr(trl_utils, "add_fused_lm_head")
# Whether log-probs of padding are 0, and not those of the padding token.
MASKS_PADDING = HAS_FUSED_HEAD or "row_mask" in inspect.signature(trl_utils.selective_log_softmax).parameters


def fused_scores(
    model: Any, batch: GroupedBatch, inputs: dict[str, Any], entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies ``[N]`` of the completion tokens of ``batch``.

    Args:
        model: bare or wrapped, with TRL's fused head.
        batch: the packed row.
        inputs: of its forward.
        entropy: whether the model's head returns entropies and they are wanted.
    """
    positions, labels = batch.positions, batch.labels[None]
    if _scores_everything(model, labels):
        labels = labels[:, positions]
        with _hidden_states_at(positions, transformers_model(model).base_model):
            output = model(**inputs, shift_labels=labels, fused_lm_head=True)
        return output.log_probs[0], output.entropy[0] if entropy else None
    output = model(**inputs, shift_labels=labels, fused_lm_head=True)
    return output.log_probs[0, positions], output.entropy[0, positions] if entropy else None


def _scores_everything(model: nn.Module, labels: Tensor) -> bool:
    """Whether the head would project all positions, and its backbone can be made to hand on less."""
    base = transformers_model(model)
    if not labels.is_cpu or base.base_model is base:
        return False
    # A traced forward knows no hook that came later, nor where its positions come from.
    return not any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in modules_of(model))


@contextmanager
def _hidden_states_at(positions: Tensor, backbone: nn.Module) -> Iterator[None]:
    """In this context ``backbone`` returns the last hidden states ``[1, N, H]`` at ``positions [N]`` of ``[1, T, H]``.

    To this thread alone: others may forward the same model meanwhile, with positions of their own. What a compiled forward
    traces takes the hook as it is, for Dynamo does not know threads.
    """
    thread = threading.get_ident()

    def select(module: Any, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() == thread:
            output.last_hidden_state = output.last_hidden_state[:, positions]
        return output

    hook = backbone.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()
