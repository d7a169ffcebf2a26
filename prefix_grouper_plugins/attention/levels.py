"""How many tokens a level of the tree must have for ``share="auto"`` to share it.

Each level costs attention a call and a merge of partial outputs for all tokens below it, so a level of very few tokens
costs more than it saves. What prompts have in common is shared whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterable

# By backend and type of device. Measured on the CPU by `benchmarks/trees.py levels`, which writes
# benchmarks/results/trees-levels-cpu.csv: the shortest level from which on sharing was at least 5% faster.
MEASURED = {("merged_lse", "cpu"): 4, ("blockwise", "cpu"): 4}
# Of everything else, CUDA included: not measured. On a GPU a level costs launches that a few tokens do not fill.
NOT_MEASURED = 64


def least_level(backends: Iterable[str], device: str) -> int:
    """The shortest level that pays in all layers of a model.

    Args:
        backends: of its layers, by name; names of other ways to run a layer count as not measured.
        device: its type: ``"cpu"``, ``"cuda"``.
    """
    return max((MEASURED.get((backend, device), NOT_MEASURED) for backend in backends), default=NOT_MEASURED)
