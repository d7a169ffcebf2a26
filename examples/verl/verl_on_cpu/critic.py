"""Lets verl load a critic on a CPU: `VERL_USE_EXTERNAL_MODULES=verl_on_cpu.platform,verl_on_cpu.critic`.

verl 0.9.1 asks for flash-attn by name where it loads a critic, whatever the config says. Here it gets sdpa.
"""

from functools import wraps
from typing import Any

from transformers import AutoModelForTokenClassification

stock = AutoModelForTokenClassification.from_pretrained


@wraps(stock)
def from_pretrained(*args: Any, **kwargs: Any) -> Any:
    return stock(*args, **{**kwargs, "attn_implementation": "sdpa"})


AutoModelForTokenClassification.from_pretrained = from_pretrained
