"""Vision-language models whose forwards verl leaves as they are: tiny ones, and rows with images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.modeling.multimodal_families import FAMILIES, Image

MODELS = ("llava", "llava_next", "llava_onevision", "gemma3", "internvl", "smolvlm", "idefics3", "vipllava")
IMAGE, START, END = 252, 254, 255  # as in vision.py


def make_model(kind: str, tokenizer: Any, tied: bool) -> Any:
    """Two text layers, two vision layers, random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = {**FAMILIES[kind].config, "tie_word_embeddings": tied}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config["text_config"] = {**config["text_config"], "vocab_size": len(tokenizer), **special}
    for name in config.keys() & {"image_token_id", "image_token_index"}:
        config[name] = IMAGE
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config), dtype=torch.float32)


def classes() -> list[Any]:
    """Whose forward verl replaces for fused kernels."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    return [AutoModelForImageTextToText._model_mapping[AutoConfig.for_model(kind).__class__] for kind in MODELS]


def picture(kind: str, large: bool, seed: int) -> Image:
    """One picture, as the family's processor would return it."""
    return FAMILIES[kind].image(torch.Generator().manual_seed(seed), large)


def placeholders(shown: Image) -> Tensor:
    return torch.tensor([START, *[IMAGE] * shown.tokens, END])


def row_inputs(kind: str, shown: list[Image], ids: Tensor) -> dict[str, Tensor]:
    """What belongs to the images of one row with the tokens ``ids``."""
    family = FAMILIES[kind]
    inputs = dict(family.row_tensors(shown)) if shown else {}
    if family.token_tensor:
        inputs[family.token_tensor] = (ids == IMAGE).long()[None]
    if "image_sizes" in inputs:  # the processor pads to the most pictures of an image of the row, and knows no others
        used = inputs["pixel_values"].flatten(2).abs().sum((0, 2)).nonzero().max() + 1
        inputs["pixel_values"] = inputs["pixel_values"][:, :used]
    if kind == "llava_onevision" and shown:
        inputs["batch_num_images"] = torch.ones(len(shown), dtype=torch.long)
    return inputs
