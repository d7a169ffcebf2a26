"""Embeddings that number tokens by their columns, whatever positions their model is called with.

Decoders of encoder-decoder models (BART, Pegasus, Marian, ...) take no ``position_ids``: the embedding of their positions
counts columns, which a packed row counts through from one response to the next. The embedding itself does take
``position_ids``, so a packed forward hands it the positions of its call.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from prefix_grouper_plugins.modeling.carrier import MODEL_CALL


def counts_columns(module: nn.Module, parent: nn.Module) -> bool:
    """Whether ``module`` embeds positions that its ``parent`` makes of columns."""
    return (
        type(module).__name__.endswith("PositionalEmbedding")
        and _takes_positions(type(module))  # type: ignore[arg-type]
        and not _takes_positions(type(parent))  # type: ignore[arg-type]
    )


@functools.lru_cache(maxsize=256)
def _takes_positions(cls: type[nn.Module]) -> bool:
    own = getattr(cls, "_prefix_grouper_base", cls)  # of a class with `PackedPositions` mixed in
    return "position_ids" in inspect.signature(own.forward).parameters


class PackedPositions:
    """Mixed into the class of such an embedding."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = MODEL_CALL.call
        if call is not None and call.layout is not None:
            if call.positions is None:
                raise ValueError(
                    f"{type(self).__name__} runs in a packed call without `position_ids`, so that it would count the packed "
                    "row through: pass what packed_inputs(layout, input_ids) returns"
                )
            kwargs["position_ids"] = call.positions[0]
        return super().forward(*args, **kwargs)  # type: ignore[misc]
