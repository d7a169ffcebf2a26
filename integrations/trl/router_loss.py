"""The load-balancing loss of a mixture of experts, over packed tokens, equal to the one over rows.

The loss (Switch Transformer, arXiv 2101.03961, eq. 4-6) is made of means over tokens. A packed token stands for as many
row tokens as rows share it, so it weighs that much; transformers' function takes such weights as its attention mask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from prefix_grouper_plugins.modeling import transformers_model

RouterLogits = list[tuple[Tensor, ...]]


@contextmanager
def capture_router_logits(model: Any, *, enabled: bool) -> Iterator[RouterLogits]:
    """Have the backbone return its router logits to the list that is yielded, and to nobody else.

    The causal LM around it must not see them: it would compute the loss with every packed token weighing the same.
    """
    captured: RouterLogits = []
    if not enabled:
        yield captured
        return
    backbone = transformers_model(model).base_model

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True}

    handles = [
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(lambda module, args, output: captured.append(output.router_logits)),
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(model: Any, captured: RouterLogits, weights: Tensor) -> Tensor:
    """The loss of one packed forward, as the model's own code computes it over rows.

    Args:
        model: the model that ran.
        captured: what :func:`capture_router_logits` yielded.
        weights: ``[T]``, how many rows share each packed token.
    """
    causal_lm = transformers_model(model)
    config = causal_lm.config.get_text_config()
    # FSDP2 makes a class of its own of a model's, in a module of torch.
    modules = [sys.modules.get(kind.__module__) for kind in type(causal_lm).__mro__]
    loss = next(found for own in modules if (found := getattr(own, "load_balancing_loss_func", None)) is not None)
    experts = getattr(causal_lm, "num_experts", None) or config.num_experts
    chosen = getattr(causal_lm, "num_experts_per_tok", None) or config.num_experts_per_tok
    # The last: a model that has changed is checked again inside of its forward, before it runs.
    return loss(captured[-1], experts, chosen, weights[None])  # type: ignore[no-any-return]
