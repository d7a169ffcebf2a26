"""Tiny vision-language models and rows with images, in the form in which verl's agent loop hands them to an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.integrations.verl.vision import other_families as others

MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", *others.MODELS)
LIKE_QWEN3 = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
IMAGE, VIDEO, START, END = 252, 253, 254, 255  # of the byte-level tokenizer, whose other tokens stand for text
PER_TOKEN = ("response", "mask", "old", "ref", "advantage")
PATCH, MERGE, WIDTH = 4, 2, 64


def make_model(kind: str, tokenizer: Any, tied: bool) -> Any:
    """Two text layers, two vision blocks, random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    if kind in others.MODELS:
        return others.make_model(kind, tokenizer, tied)
    config = AutoConfig.for_model(
        kind,
        text_config=text_config(kind, tokenizer),
        vision_config=vision_config(kind),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def text_config(kind: str, tokenizer: Any) -> dict[str, Any]:
    interleaved: dict[str, Any] = {"mrope_interleaved": True} if kind in LIKE_QWEN3 else {}
    own: dict[str, Any] = {"head_dim": WIDTH // 4} if kind in LIKE_QWEN3 else {}
    if kind.endswith("moe"):
        own |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "decoder_sparse_step": 1}
    if kind.startswith("qwen3_5"):
        own |= {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": WIDTH}
        own |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        own |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        interleaved["partial_rotary_factor"] = 1.0
    return own | {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 3, 3],
            "rope_theta": 100.0,
            **interleaved,
        },
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def vision_config(kind: str) -> dict[str, Any]:
    common = {"depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": PATCH, "spatial_merge_size": MERGE}
    return (
        common
        | {
            "qwen2_vl": {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2},
            "qwen2_5_vl": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": WIDTH,
                "fullatt_block_indexes": [1],
                "window_size": 2 * MERGE * PATCH,
            },
            "qwen3_vl": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": WIDTH,
                "num_position_embeddings": 16,
                **({} if kind.startswith("qwen3_5") else {"deepstack_visual_indexes": [0]}),
            },
            "glm4v": {"hidden_size": 32, "out_hidden_size": WIDTH, "intermediate_size": 64, "image_size": 16},
        }["qwen3_vl" if kind in LIKE_QWEN3 else kind]
    )


# ------------------------------------------------------------------------------------------------------------- the rows


def image(height: int, width: int, seed: int) -> dict[str, Tensor]:
    """What a processor makes of one picture of ``height`` x ``width`` patches."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(height * width, 3 * 2 * PATCH**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "images_seqlens": torch.tensor([height * width]),
    }


def video(frames: int, height: int, width: int, seed: int) -> dict[str, Tensor]:
    pixels = image(frames * height, width, seed)["pixel_values"]
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[frames, height, width]])}


def picture(kind: str, height: int, width: int, seed: int) -> Any:
    """One picture: of ``height`` x ``width`` patches, or one of the two sizes of the other families."""
    return others.picture(kind, width > 4, seed) if kind in others.MODELS else image(height, width, seed)


def row_inputs(kind: str, shown: list[Any], ids: Tensor) -> dict[str, Tensor]:
    """What belongs to the pictures of one row with the tokens ``ids``."""
    if kind in others.MODELS:
        return others.row_inputs(kind, shown, ids)
    return {name: torch.cat([one[name] for one in shown]) for name in (shown[0] if shown else ())}


def placeholders(kind: str, shown: Any) -> Tensor:
    """The tokens that stand for one picture or video, between their markers; Qwen3-VL marks each frame."""
    if kind in others.MODELS:
        return others.placeholders(shown)
    token, grid = (VIDEO, shown["video_grid_thw"]) if "video_grid_thw" in shown else (IMAGE, shown["image_grid_thw"])
    count = int(grid.prod()) // MERGE**2
    parts = int(grid[0, 0]) if kind in LIKE_QWEN3 else 1
    return torch.tensor([START, *[token] * (count // parts), END] * parts)


def add_images(kind: str, what: str, rows: list[dict[str, Any]]) -> None:
    """Put pictures before the text of prompts, and what comes with them into the rows.

    Args:
        kind: the model.
        what: ``one`` picture in each prompt, of another size in each group; ``two``; ``mixed``: one or two; ``some`` groups without; ``few``, those of one group's second half, without; ``twins``:
            one text and one size for all groups, which then differ by their pictures alone; ``response``: also one and
            the same in two responses of each group; ``end``: at the very end of the prompt; ``video``; ``unknown``: with a tensor
            that no model takes; ``shifted``: with positions of their own in some rows; ``even``: rows of one length.
        rows: of all groups.
    """
    first = rows[0]["prompt"]
    for row in rows:
        group = int(row["uid"][1:])
        shown: list[Any] = [picture(kind, 4, 4 + 2 * group, seed=group)]
        if what == "twins":
            row["uid"], row["prompt"], shown = "g0", first, [picture(kind, 4, 4, seed=group)]
        if what == "even":
            row["prompt"], shown = first, [picture(kind, 4, 4, seed=group)]
            for name in PER_TOKEN:
                row[name] = torch.cat([row[name]] * 6)[:6]
        if what == "two" or (what == "mixed" and group):
            shown.append(picture(kind, 6, 4, seed=10 + group))
        if what == "video":
            shown = [video(2, 4, 4 + 2 * group, seed=group)]
        if (what == "some" and group == 1) or (what == "few" and group == 1 and row["order"] >= 6):
            shown = []
        blocks = [placeholders(kind, one) for one in shown]
        row["prompt"] = torch.cat([row["prompt"], *blocks] if what == "end" else [*blocks, row["prompt"]])
        if what == "end":
            row["prompt"] = row["prompt"][:-1]  # so that the last token is a placeholder
        if what == "response" and row["order"] < 6:
            shown.append(picture(kind, 4, 4, seed=20 + group))
            lengthen(row, placeholders(kind, shown[-1]))
        ids = torch.cat([row["prompt"], row["response"]])
        row["inputs"] = row_inputs(kind, shown, ids)
        row["positions"] = position_ids(kind, ids, row["inputs"])
        if what == "unknown":
            row["inputs"]["pixel_mask"] = torch.ones(1)
        if what == "shifted":
            row["positions"][1:] += row["order"] % 2


def lengthen(row: dict[str, Any], tokens: Tensor) -> None:
    """Put ``tokens``, which a tool gave, before a response."""
    row["response"] = torch.cat([tokens, row["response"]])
    for name in PER_TOKEN[1:]:
        row[name] = torch.cat([row[name].new_zeros(len(tokens)), row[name]])


def position_ids(kind: str, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """``[4, L]``, as in verl: text positions, then those that the model's own rope index gives; ``[L]`` without one."""
    if kind in others.MODELS:
        return torch.arange(len(ids))
    text = torch.arange(len(ids))[None]
    if not inputs:
        return text.expand(4, -1)
    model = rope_model(kind)
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    found, _ = model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **grids)
    return torch.cat([text, found[:, 0]])


def rope_model(kind: str) -> Any:
    """Enough of a model to ask it for positions."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_MAPPING
    from verl_on_cpu.tiny import make_tokenizer

    config = AutoConfig.for_model(
        kind, text_config=text_config(kind, make_tokenizer()), vision_config=vision_config(kind)
    )
    model = MODEL_MAPPING[type(config)]
    bare = model.__new__(model)
    torch.nn.Module.__init__(bare)
    bare.config = config
    return bare


def patched_classes() -> list[Any]:
    """Model classes whose forward verl replaces."""
    from transformers.models.glm4v import modeling_glm4v as glm4v
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen3_5_moe
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen3_moe

    parts = "Model TextModel ForConditionalGeneration Attention TextAttention DecoderLayer GatedDeltaNet".split()
    names = [f"{{}}{part}" for part in parts]
    kinds = [(qwen2, "Qwen2VL"), (qwen2_5, "Qwen2_5_VL"), (qwen3, "Qwen3VL"), (qwen3_moe, "Qwen3VLMoe")]
    kinds += [(qwen3_5, "Qwen3_5"), (qwen3_5_moe, "Qwen3_5Moe"), (glm4v, "Glm4v")]
    found = [getattr(module, name.format(kind), None) for module, kind in kinds for name in names]
    return [cls for cls in found if cls is not None] + others.classes()


def stand_in_for_flash_attention() -> None:
    """Let verl's own attention of Qwen2-VL and Qwen2.5-VL, which calls flash-attn directly, run on a CPU."""
    from verl.models.transformers import qwen2_vl

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **kwargs: Any) -> Tensor:
        lengths = cu_seqlens_q.diff().tolist()
        assert kwargs["causal"] and torch.equal(cu_seqlens_q, cu_seqlens_k)
        rows = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([scaled_dot_product_attention(*row, is_causal=True) for row in rows], dim=1).transpose(0, 1)

    def one_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, length: int, **kwargs: Any) -> Tensor:
        assert mask is None
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=kwargs["is_causal"]).transpose(1, 2)

    qwen2_vl.flash_attn_varlen_func, qwen2_vl._flash_attention_forward = varlen, one_row
    qwen2_vl._flash_use_top_left_mask = qwen2_vl._flash_supports_deterministic = False
    qwen2_vl._flash_supports_window_size = False
    qwen2_vl.fa_peft_integration_check = lambda q, k, v, **kwargs: (q, k, v)  # rounds to bfloat16


@contextmanager
def watched_tower(model: torch.nn.Module) -> Iterator[list[int]]:
    """How many patches, tiles or pictures the vision tower of ``model`` gets, call by call."""
    calls: list[int] = []
    names = ("visual", "vision_tower", "vision_model")
    towers = [module for name, module in model.named_modules() if name.endswith(names)][:1]  # the outermost

    def note(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(len(args[0] if args else kwargs["pixel_values"]))

    hooks = [tower.register_forward_pre_hook(note, with_kwargs=True) for tower in towers]
    yield calls
    for hook in hooks:
        hook.remove()
