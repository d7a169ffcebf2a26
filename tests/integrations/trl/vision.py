"""A tiny processor, saved vision-language models and prompts with images, for TRL's trainers. No hub, no torchvision."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, GenerationConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.modeling import multimodal_families as families

MARK = "<image>"
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<4>", MARK, *(f"w{i}" for i in range(6, families.VOCABULARY))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _qwen(image_processor: Any, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[int]]:
    made = dict(image_processor(images=images, return_tensors="pt"))
    return made, (made["image_grid_thw"].prod(-1) // image_processor.merge_size**2).tolist()


_QWEN = (lambda: Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256), _qwen)


def _four_tokens(image_processor: Any, images: list[Any]) -> tuple[dict[str, torch.Tensor], list[int]]:
    made = image_processor(images=images, return_tensors="pt")
    return {"pixel_values": made["pixel_values"]}, [4] * len(images)


IMAGES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_5": _QWEN,
    "llava": (
        lambda: LlavaImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        _four_tokens,
    ),
    "gemma3": (lambda: Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), _four_tokens),
}


class TinyProcessor(ProcessorMixin):
    """What the processors of the hub do, with the image processor of transformers: ``<image>`` becomes placeholders."""

    def __init__(self, image_processor=None, tokenizer=None, model_type="qwen2_vl"):
        self.image_processor, self.tokenizer, self.model_type = image_processor, tokenizer, model_type

    def __call__(self, images=None, text=None, padding=False, padding_side=None, return_tensors=None, **_):
        text = [text] if isinstance(text, str) else list(text)
        flat = [image for row in images or [] for image in row or []]
        tensors, counts = IMAGES[self.model_type][1](self.image_processor, flat) if flat else ({}, [])
        left = iter(counts)
        expanded = [
            " ".join(" ".join(["<4>", *[MARK] * next(left), "<4>"]) if word == MARK else word for word in row.split())
            for row in text
        ]
        sides = {} if padding_side is None else {"padding_side": padding_side}
        encoded = dict(self.tokenizer(expanded, padding=padding, return_tensors=return_tensors, **sides))
        encoded.pop("token_type_ids", None)
        kind = families.FAMILIES[self.model_type].token_tensor
        if kind:
            ids = encoded["input_ids"]
            if isinstance(ids, torch.Tensor):
                encoded[kind] = (ids == families.IMAGE).int()
            else:
                encoded[kind] = [[int(i == families.IMAGE) for i in row] for row in ids]
        return BatchFeature({**encoded, **tensors})

    def apply_chat_template(self, conversation, tokenize=False, **_):
        many = isinstance(conversation[0], list)
        rows = conversation if many else [conversation]
        parts = [[part for message in row for part in _parts(message["content"])] for row in rows]
        text = [" ".join(MARK if p["type"] == "image" else p["text"] for p in row) for row in parts]
        if not tokenize:
            return text if many else text[0]
        return self(images=[[p["image"] for p in row if p["type"] == "image"] for row in parts], text=text)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def processor(model_type: str) -> TinyProcessor:
    return TinyProcessor(IMAGES[model_type][0](), tokenizer(), model_type)


def saved_model(folder: Path, model_type: str) -> str:
    model = families.build(model_type).float()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    return str(folder)


def prompts(count: int = 16, mixed: bool = False, most: int = 2) -> Dataset:
    """Few texts and many images, so that equal ids stand for different images.

    ``mixed``: every third prompt has no image. The others have from one to ``most``.
    """
    source, noise = random.Random(0), np.random.default_rng(0)
    texts = [" ".join(source.choices(WORDS[12:], k=length)) for length in (3, 6)]
    rows = []
    for i in range(count):
        number = 0 if mixed and i % 3 == 2 else 1 + i % most
        images = [Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(number)]
        rows.append({"prompt": [{"role": "user", "content": texts[i % 2]}], "images": images})
    return Dataset.from_list(rows)
