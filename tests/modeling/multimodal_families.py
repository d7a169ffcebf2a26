"""A tiny vision-language model of each family, and rows with images for it: no hub, no image processor."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE = 5  # the placeholder token
FIRST_WORD = 12  # smaller ids are kept for special tokens
VOCABULARY = 40
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@dataclass
class Image:
    """One image: its placeholder tokens and its tensors with a leading axis."""

    tokens: int
    tensors: dict[str, Tensor]
    tiles: int = 1


@dataclass
class Family:
    """How a model of the family is built, and what an image is to it.

    Attributes:
        config: of the whole model.
        image: ``(generator, large) -> Image``.
        tiled: whether images are cut into tiles, which the processor counts.
        token_tensor: which name the per-token kinds go by, if any.
        row_tensors: how the images of one row become the row's tensors, by default end to end.
    """

    config: dict[str, Any]
    image: Callable[[torch.Generator, bool], Image]
    token_tensor: str | None = None
    tiled: bool = False
    row_tensors: Callable[[list[Image]], dict[str, Tensor]] = field(default=lambda images: _end_to_end(images))


def _end_to_end(images: list[Image]) -> dict[str, Tensor]:
    return {name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors}


def _qwen_image(generator: torch.Generator, large: bool) -> Image:
    height, width = (4, 8) if large else (4, 4)
    return Image(
        height * width // 4,
        {
            "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        },
    )


def _qwen(rope: dict[str, Any], vision: dict[str, Any]) -> Family:
    return Family(
        {
            "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}},
            "vision_config": {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, **vision},
            "image_token_id": IMAGE,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
        _qwen_image,
        "mm_token_type_ids",
    )


_SECTIONS = {"mrope_section": [2, 1, 1]}
FAMILIES: dict[str, Family] = {
    "qwen2_vl": _qwen(_SECTIONS, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": _qwen(
        _SECTIONS,
        {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": _qwen(
        {**_SECTIONS, "mrope_interleaved": True},
        {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}


def _square(tokens: int, size: int = 8) -> Callable[[torch.Generator, bool], Image]:
    """One square picture; nothing is larger."""
    return lambda generator, large: Image(tokens, {"pixel_values": torch.randn(1, 3, size, size, generator=generator)})


def _tiles(generator: torch.Generator, large: bool) -> Image:
    """InternVL: a larger picture is more tiles."""
    tiles = 3 if large else 1
    return Image(4 * tiles, {"pixel_values": torch.randn(tiles, 3, 16, 16, generator=generator)}, tiles)


def _anyres(newlines: int, generator: torch.Generator, large: bool) -> Image:
    """LLaVA-NeXT: an overview of 2x2 patches, then a grid of pictures that is cut to the image's true shape."""
    height, width = (16, 16) if large else (8, 16)  # of pictures of 8x8 pixels
    rows, columns = height // 4, width // 4
    pictures = 1 + (height // 8) * (width // 8)
    pixels = torch.zeros(1, 5, 3, 8, 8)
    pixels[:, :pictures] = torch.randn(1, pictures, 3, 8, 8, generator=generator)
    return Image(
        4 + rows * (columns + newlines), {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    )


def _idefics(images: list[Image]) -> dict[str, Tensor]:
    """All images of a row along a second axis."""
    return {name: torch.cat([image.tensors[name] for image in images])[None] for name in images[0].tensors}


def _idefics_image(generator: torch.Generator, large: bool) -> Image:
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[:, 8:] = not large  # a flat picture, padded below
    return Image(4, {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator), "pixel_attention_mask": mask})


def _vision(model_type: str, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": model_type, **sizes, "image_size": 8, "patch_size": 4, **changes}


_LLAVA = {"text_config": {"model_type": "llama", **TEXT}, "image_token_index": IMAGE}
_PINPOINTS = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
_IDEFICS = {
    "vision_config": _vision("idefics3_vision", image_size=16),
    "text_config": {"model_type": "llama", **TEXT},
    "scale_factor": 2,
    "image_token_id": IMAGE,
    "pad_token_id": 0,
}
FAMILIES |= {
    "llava": Family({**_LLAVA, "vision_config": _vision("clip_vision_model"), "vision_feature_layer": -2}, _square(4)),
    "llava_next": Family(
        {**_LLAVA, **_PINPOINTS, "vision_config": _vision("clip_vision_model"), "vision_feature_layer": -2},
        functools.partial(_anyres, 1),
    ),
    "llava_onevision": Family(
        {
            **_LLAVA,
            **_PINPOINTS,
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": _vision("siglip_vision_model", vision_use_head=False),
            "vision_feature_layer": -1,
        },
        functools.partial(_anyres, 1),
    ),
    "internvl": Family(
        {
            "vision_config": _vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
            "text_config": {"model_type": "qwen2", **TEXT},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        _tiles,
        tiled=True,
    ),
    "gemma3": Family(
        {
            "text_config": {
                **TEXT,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 3,  # shorter than an image
                "query_pre_attn_scalar": 8,
            },
            "vision_config": _vision("siglip_vision_model", image_size=16, vision_use_head=False),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        _square(4, 16),
        "token_type_ids",
    ),
    "idefics3": Family(_IDEFICS, _idefics_image, row_tensors=_idefics),
    "smolvlm": Family(
        {**_IDEFICS, "vision_config": _vision("smolvlm_vision", image_size=16)}, _idefics_image, row_tensors=_idefics
    ),
}

_QWEN3 = FAMILIES["qwen3_vl"].config
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = {
    **TEXT,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
    "rope_parameters": {**_QWEN3["text_config"]["rope_parameters"], "partial_rotary_factor": 0.5},
}
_QWEN3_5 = {**_QWEN3, "vision_config": {k: v for k, v in _QWEN3["vision_config"].items() if "deepstack" not in k}}
_COHERE = {
    "text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 5},
    "vision_config": _vision("siglip_vision_model", image_size=16, vision_use_head=False),
    "downsample_factor": 2,
}


def _with_size(generator: torch.Generator, large: bool) -> Image:
    image = _square(4, 16)(generator, large)
    image.tensors["image_sizes"] = torch.tensor([[16, 16]])
    return image


FAMILIES |= {
    "qwen3_vl_moe": dataclasses.replace(
        FAMILIES["qwen3_vl"],
        config={**_QWEN3, "text_config": {**_QWEN3["text_config"], **_EXPERTS, "decoder_sparse_step": 1}},
    ),
    "qwen3_5": dataclasses.replace(FAMILIES["qwen3_vl"], config={**_QWEN3_5, "text_config": _HYBRID}),
    "qwen3_5_moe": dataclasses.replace(
        FAMILIES["qwen3_vl"],
        config={**_QWEN3_5, "text_config": {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 16}},
    ),
    "glm4v": _qwen(_SECTIONS, {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "image_size": 16}),
    "mistral3": Family(
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": _vision("pixtral", image_size=16, head_dim=8),
            "spatial_merge_size": 2,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        _with_size,
    ),
    "vipllava": Family(
        {
            **_LLAVA,
            "vision_config": _vision("clip_vision_model", num_hidden_layers=3),
            "vision_feature_layers": [-2, -3],
        },
        _square(4),
    ),
    "idefics2": Family(
        {
            "vision_config": _vision("idefics2_vision", image_size=16),
            "text_config": {"model_type": "mistral", **TEXT},
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
                "hidden_size": 32,
            },
            "image_token_id": IMAGE,
        },
        _idefics_image,
        row_tensors=_idefics,
    ),
    "aya_vision": Family({**_COHERE, "image_token_index": IMAGE, "vision_feature_layer": -1}, _square(4, 16)),
    "cohere2_vision": Family({**_COHERE, "image_token_id": IMAGE, "alignment_intermediate_size": 32}, _square(4, 16)),
}


def _patches(kernel: int, generator: torch.Generator, large: bool) -> Image:
    """Gemma 4: patches with their places, padded to as many as the largest image has; ``kernel`` x ``kernel`` are a token."""
    rows, columns, most = 4, 8 if large else 4, 32
    places = torch.tensor([[x, y] for y in range(rows) for x in range(columns)])
    pixels, places_padded = torch.zeros(1, most, 3 * 4 * 4), torch.full((1, most, 2), -1)
    pixels[0, : len(places)] = torch.rand(len(places), 3 * 4 * 4, generator=generator)
    places_padded[0, : len(places)] = places
    return Image(len(places) // kernel**2, {"pixel_values": pixels, "image_position_ids": places_padded})


_GEMMA4 = {
    "text_config": {
        **TEXT,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 3,  # shorter than an image
        "global_head_dim": 16,
        "final_logit_softcapping": 3.0,
    },
    "image_token_id": IMAGE,
    "video_token_id": 6,
    "audio_token_id": 7,
    "boi_token_id": 8,
    "eoi_token_id": 9,
    "boa_token_id": 10,
}
FAMILIES |= {
    "gemma4": Family(
        {
            **_GEMMA4,
            "text_config": {
                **_GEMMA4["text_config"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 0,
            },
            "vision_config": {
                **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2},
                "position_embedding_size": 16,
            },
        },
        functools.partial(_patches, 2),
        "mm_token_type_ids",
    ),
    "gemma4_unified": Family(
        {
            **_GEMMA4,
            "vision_config": {
                **{"patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 16, "mm_posemb_size": 16},
                "output_proj_dims": 16,
            },
        },
        functools.partial(_patches, 1),
        "mm_token_type_ids",
    ),
    "got_ocr2": Family(
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                **{"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"image_size": 32, "patch_size": 4, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 24},
            },
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
        _square(4, 32),
    ),
}


def _crops(generator: torch.Generator, large: bool) -> Image:
    """Phi-4: an overview of 2x2 features, then crops of which only the part that the image fills counts."""
    crops, rows, columns = (2, 2, 3) if large else (1, 2, 2)  # features of 2x2 patches
    mask = torch.zeros(1, 3, 4, 4, dtype=torch.long)
    mask[:, : 1 + crops] = 1
    if large:
        mask[:, 2, :, 2:] = 0
    pixels = torch.randn(1, 3, 3, 16, 16, generator=generator)
    tensors = {
        "image_pixel_values": pixels,
        "image_attention_mask": mask,
        "image_sizes": torch.tensor([[16, 16 * crops]]),
    }
    return Image(rows * (columns + 1) + 1 + 2 * 3, tensors)


class _Tower(torch.nn.Module):
    """In place of Gemma 3n's, which needs timm: one feature for each square of 4x4 pixels, ``[B, 16, 2, 2]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 16, 4, stride=4)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))


FAMILIES |= {
    "phi4_multimodal": Family(
        {
            **TEXT,
            "original_max_position_embeddings": 256,
            "vision_config": _vision("phi4_multimodal_vision", image_size=16, crop_size=16, image_token_id=IMAGE),
            "audio_config": {
                **{"hidden_size": 8, "intermediate_size": 8, "num_blocks": 2, "num_attention_heads": 2},
                **{"ext_pw_out_channel": 8, "depthwise_separable_out_channel": 8, "nemo_conv_channels": 8},
                "audio_token_id": 7,
            },
        },
        _crops,
    ),
    "gemma3n": Family(
        {
            "text_config": {
                **TEXT,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "sliding_window": 3,
                "num_kv_shared_layers": 2,
                "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "laurel_rank": 4,
            },
            "vision_config": {"hidden_size": 16, "vocab_size": 2, "vocab_offset": VOCABULARY},
            "audio_config": {
                **{"hidden_size": 16, "vocab_size": 2, "vocab_offset": VOCABULARY + 2, "input_feat_size": 16},
                **{"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "sscp_conv_channel_size": [8, 4]},
            },
            "vision_soft_tokens_per_image": 4,
            "image_token_id": IMAGE,
            "audio_token_id": 7,
        },
        _square(4),
    ),
}


def configure(model_type: str, **text: Any) -> Any:
    """Its tiny config. ``text`` are settings of its text part."""
    settings = {**FAMILIES[model_type].config}
    if "text_config" in settings:
        settings["text_config"] = {**settings["text_config"], **text}
    else:
        settings |= text
    return AutoConfig.for_model(model_type, **settings)


def make(config: Any) -> PreTrainedModel:
    """A model of ``config``, as transformers makes it."""
    if config.model_type == "phi4_multimodal":
        return AutoModelForCausalLM.from_config(config)
    if config.model_type != "gemma3n":
        return AutoModelForImageTextToText.from_config(config)
    own = AutoModel.from_config
    with mock.patch.object(
        AutoModel, "from_config", lambda part: _Tower() if part is config.vision_config else own(part)
    ):
        return AutoModelForImageTextToText.from_config(config)


def build(model_type: str, **text: Any) -> PreTrainedModel:
    """In float64, with weights large enough that positions, masks and images matter."""
    # Decays of recurrent layers are drawn; with some, their float32 kernels round too much for a float64 model's self-check.
    torch.manual_seed(1)
    model = make(configure(model_type, **text))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product takes no float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3, generator=generator)
    return model.double().eval()


def compute_vision_rotary_in_input_dtype(monkeypatch: Any, model: PreTrainedModel) -> None:
    """transformers' vision towers rotate queries and keys in float32; let those of a float64 model compute in float64."""
    code: Any = sys.modules[type(model).__module__]
    if not hasattr(code, "apply_rotary_pos_emb_vision"):
        return

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return q * cos + code.rotate_half(q) * sin, k * cos + code.rotate_half(k) * sin

    monkeypatch.setattr(code, "apply_rotary_pos_emb_vision", rotate)


@dataclass
class Row:
    """Token ids of a prompt and of a response, and the prompt's images."""

    prompt: Tensor
    response: Tensor
    images: list[Image]

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt, self.response])


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator)


def prompt(images: list[Image], generator: torch.Generator, words: int = 4) -> Tensor:
    parts = [_words(2, generator)]
    for image in images:
        parts += [torch.full((image.tokens,), IMAGE), _words(2, generator)]
    return torch.cat([*parts, _words(words, generator)])


def rows(model_type: str, dtype: torch.dtype = torch.float64) -> list[Row]:
    """Two groups with equal token ids and different images, one with two images, one without any; not in order."""
    generator = torch.Generator().manual_seed(1)
    make = FAMILIES[model_type].image
    one, other, third = (make(generator, large) for large in (False, False, True))
    for image in (one, other, third):
        image.tensors |= {name: x.to(dtype) for name, x in image.tensors.items() if name.endswith("pixel_values")}
    same = prompt([one], generator)
    groups = [
        (same, [one], [3, 5]),
        (same, [other], [4, 2]),
        (prompt([third, one], generator, words=1), [third, one], [2, 3]),
        (prompt([], generator), [], [4, 1]),
    ]
    made = [Row(ids, _words(length, generator), images) for ids, images, lengths in groups for length in lengths]
    return made[::2] + made[1::2]


def model_inputs(model_type: str, row: Row) -> dict[str, Tensor]:
    """An ordinary forward of one row."""
    family = FAMILIES[model_type]
    inputs = {"input_ids": row.ids[None], **(family.row_tensors(row.images) if row.images else {})}
    if family.token_tensor:
        inputs[family.token_tensor] = (row.ids == IMAGE).int()[None]
    return inputs


def _batched(family: Family, made: list[Row]) -> dict[str, Tensor]:
    """What a processor returns for all rows: images end to end, or rows padded to the most images."""
    if family.row_tensors is not _idefics:
        return family.row_tensors([image for row in made for image in row.images])
    rows = [family.row_tensors(row.images) if row.images else {} for row in made]
    example, most = next(row for row in rows if row), max(len(row.images) for row in made)
    shapes = {name: (1, most, *tensor.shape[2:]) for name, tensor in example.items()}
    batch = {name: torch.zeros(len(rows), *shape[1:], dtype=example[name].dtype) for name, shape in shapes.items()}
    for i, row in enumerate(rows):
        for name, tensor in row.items():
            batch[name][i, : tensor.shape[1]] = tensor[0]
    return batch


def batch_inputs(
    model_type: str, made: list[Row]
) -> tuple[list[Tensor], dict[str, Tensor], list[int], list[int] | None]:
    """``[prompt_ids, prompt_mask, completion_ids, completion_mask]``, processor outputs, images and tiles by row."""
    family = FAMILIES[model_type]

    def padded(parts: list[Tensor], side: str) -> list[Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        return [pad(x, batch_first=True, padding_side=side) for x in (parts, [torch.ones_like(part) for part in parts])]

    blocks = [*padded([row.prompt for row in made], "left"), *padded([row.response for row in made], "right")]
    tensors = _batched(family, made)
    if family.token_tensor:
        tensors[family.token_tensor] = (blocks[0] == IMAGE).int()
    counts = [len(row.images) for row in made]
    tiles = [sum(image.tiles for image in row.images) for row in made]
    return blocks, tensors, counts, tiles if family.tiled else None
