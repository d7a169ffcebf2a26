"""The reward of the demo: how many different lower-case letters a response has.

Dense, and within reach of a tiny model that starts from random weights: at first one token in ten is a letter, and in
a dozen steps it learns to write letters, and not always the same one.
"""

from string import ascii_lowercase
from typing import Any

FULL_MARKS = 16


def compute_score(data_source: str, solution_str: str, ground_truth: str, **kwargs: Any) -> float:
    """Score a response from 0 to 1; the signature is verl's."""
    return min(len(set(solution_str) & set(ascii_lowercase)) / FULL_MARKS, 1.0)
