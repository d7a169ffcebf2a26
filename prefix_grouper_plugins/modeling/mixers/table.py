"""Which classes mix tokens past transformers' attention interface, and how their calls are laid out.

The table is one of exact classes: a class that nobody has looked at is no mixer that we know. How mixers run is in
modeling/mixers/on_rows.py (on whole rows) and modeling/mixers/state_forking.py (on the packed row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from prefix_grouper_plugins.modeling.implementations import looks_up_attention
from prefix_grouper_plugins.modeling.mixers.state_forking import (
    DELTA_RULE,
    MAMBA2,
    SHORT_CONVOLUTION,
    Recipe,
    why_not_forked,
)


@dataclass(frozen=True)
class Mixer:
    """What is known about a class of mixers.

    Attributes:
        kind: a few words for the report.
        mask: ``(module, x [B, L, d], arguments) -> attention_mask`` that an ordinary batch of these rows would bring, or
            None for mixers that only use masks to blank padding.
        adapt: changes the remaining arguments, for mixers whose model hands them something that depends on the batch.
        whole: arguments with tensors that do not run along the sequence and are handed over as they are.
        of_all_heads: arguments of shape ``[1, 1, T, d]``, which run along the sequence.
        outputs_along: which outputs of several run along the sequence.
        layer_types: types of layers, beyond the common ones, that it accounts for.
        outputs_as_they_are: which outputs do not belong to rows at all.
        without_mask: whether the model cannot take the 4-D placeholder mask and gets the one of a row without padding.
        drops_cache: whether the model makes an empty cache for each of its forwards, which then stays outside.
        sequence_first: whether what runs along the sequence is ``[L, B, d]``.
        blanks_padding: whether it sets padding to zero and then mixes it into the tokens after it, so that a bias which
            is added in between makes left padding count.
        counts_columns: whether a module tells tokens apart by their columns, so that padding on the left moves them.
        applies: whether a module of the class is such a mixer; others of the class use the attention interface.
        recipes: how its code may be made to fork states, see modeling/mixers/state_forking.py.
    """

    kind: str
    mask: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor | None] | None = None
    adapt: Callable[[dict[str, Any], Tensor], None] | None = None
    whole: frozenset[str] = frozenset()
    of_all_heads: frozenset[str] = frozenset()
    outputs_along: frozenset[int] = frozenset({0})
    outputs_as_they_are: frozenset[int] = frozenset()
    layer_types: frozenset[str] = frozenset()
    without_mask: Callable[[nn.Module], bool] = lambda module: False
    drops_cache: bool = False
    sequence_first: bool = False
    blanks_padding: bool = False
    counts_columns: Callable[[Any], bool] = lambda module: False
    applies: Callable[[Any], bool] = lambda module: True
    recipes: tuple[Recipe, ...] = ()


def _additive_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """``[B, 1, L, L]``, for code that adds its mask to the scores and takes no None for "causal"."""
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
    return mask.expand(x.shape[0], 1, *hidden.shape)


def _falcon_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """FalconModel writes the ALiBi bias into the mask (``arguments["alibi"]`` is ``[B, H, 1, L]`` by now)."""
    mask = _additive_mask(module, x, arguments)
    alibi = arguments["alibi"]
    if alibi is None:
        return mask
    return torch.masked_fill(alibi / module.head_dim**0.5, mask < -1, torch.finfo(x.dtype).min)  # type: ignore[operator]


def _mpt_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """MptModel turns the additive mask into "is hidden"."""
    return _additive_mask(module, x, arguments).to(torch.bool)


def _llama4_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Causal, and within chunks of columns where the layer is of that kind; rows begin at column 0."""
    mask = _additive_mask(module, x, arguments)
    config: Any = module.config
    if config.layer_types[module.layer_idx] != "chunked_attention":  # type: ignore[index]
        return mask
    chunk = torch.arange(x.shape[1], device=x.device) // config.attention_chunk_size
    return mask.masked_fill(chunk[:, None] != chunk, torch.finfo(x.dtype).min)


def _window_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Causal, within the sliding window of the layer, or else of the config, if there is one."""
    mask = _additive_mask(module, x, arguments)
    config: Any = module.config
    window: Any = module.sliding_window if hasattr(module, "sliding_window") else config.sliding_window
    if window is None:
        return mask
    column = torch.arange(x.shape[1], device=x.device)
    return mask.masked_fill(column[:, None] - column >= window, torch.finfo(x.dtype).min)


def _doge_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """As `_window_mask`. From `keep_window_size` keys on, ties between equal scores are broken by the rows' length."""
    if x.shape[1] > module.keep_window_size:  # type: ignore[operator]
        raise ValueError(
            f"a row of {x.shape[1]} tokens is longer than keep_window_size={module.keep_window_size}, from where on doge "
            "chooses among keys of equal score by the length of the batch: keep rows shorter"
        )
    return _window_mask(module, x, arguments)


def _ctrl_mask(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """``[L, L]``, 1 where a key is hidden: ctrl takes 1e4 from such scores, so that its other mask may add the 1."""
    return torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).triu(1)


def _has_alibi(module: nn.Module) -> bool:
    return bool(getattr(module.config, "alibi", False))


def _cut_alibi(arguments: dict[str, Any], x: Tensor) -> None:
    """ALiBi of one row of T columns, ``[H, 1, T]`` or ``[1, H, 1, T]``: the first L are those of each of our rows."""
    alibi = arguments["alibi"]
    if alibi is not None:
        arguments["alibi"] = alibi[..., : x.shape[1]].repeat(x.shape[0], *[1] * (alibi.dim() - 1))


def _cut_distances(arguments: dict[str, Any], x: Tensor) -> None:
    """Distances between T columns, ``[T, T]``: the first L are those of each of our rows. From transformers 5.24 on."""
    if "relative_distance" in arguments:
        arguments["relative_distance"] = arguments["relative_distance"][: x.shape[1], : x.shape[1]]


def _visible(module: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """``[B, L, L]``, True where a key is visible."""
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return visible.expand(x.shape[0], *visible.shape)


def _xlnet_arguments(arguments: dict[str, Any], x: Tensor) -> None:
    """Masks ``[L, L, 1, 1]``, 1 where a key is hidden, and the distances from L to 0 of the ``T + 1`` that it is called with."""
    length, rows = x.shape[:2]
    hidden = torch.ones(length, length, dtype=x.dtype, device=x.device).triu(1)[..., None, None]
    arguments["attn_mask_h"] = arguments["attn_mask_g"] = hidden
    arguments["r"] = arguments["r"][-(length + 1) :].expand(-1, rows, -1)


_ADDITIVE = Mixer("attention of its own", mask=_additive_mask)
# Of classes that use the interface from transformers 5.24 on.
_ADDITIVE_BEFORE = replace(_ADDITIVE, applies=lambda module: not looks_up_attention(type(module)))  # type: ignore[arg-type]
_MAMBA = Mixer("Mamba", blanks_padding=True)
_MAMBA2 = Mixer("Mamba-2", blanks_padding=True, recipes=MAMBA2)
_DELTA = Mixer("gated delta net", blanks_padding=True, recipes=DELTA_RULE)
_CONVOLUTION = Mixer("short convolution", blanks_padding=True, recipes=SHORT_CONVOLUTION)

# Selections of one layer that the next ones take over are those of rows, and pass the packed layers as they are.
_INDEXED = Mixer(
    "attention to selected keys",
    _additive_mask,
    whole=frozenset({"prev_topk_indices"}),
    outputs_as_they_are=frozenset({2}),
    layer_types=frozenset({"indexed_attention"}),
)
_RELATIVE = Mixer(
    "attention with relative positions",
    _window_mask,
    layer_types=frozenset({"hybrid_sliding"}),
    counts_columns=lambda module: not module.is_sliding and module.config.log_scaling_n_floor is not None,
)
_RELATIVE_2 = Mixer(
    "attention with relative positions",
    _window_mask,
    _cut_distances,
    whole=frozenset({"relative_distance"}),
    layer_types=frozenset({"hybrid_sliding"}),
)

_MIXERS: dict[str, Mixer] = {
    "bloom.BloomAttention": Mixer(
        "attention of its own", _additive_mask, _cut_alibi, frozenset({"alibi"}), without_mask=lambda module: True
    ),
    "falcon.FalconAttention": Mixer(
        "attention of its own",
        _falcon_mask,
        _cut_alibi,
        frozenset({"alibi"}),
        without_mask=_has_alibi,
    ),
    "mpt.MptAttention": Mixer("attention of its own", _mpt_mask, whole=frozenset({"position_bias"})),
    "gptj.GPTJAttention": _ADDITIVE_BEFORE,
    "codegen.CodeGenAttention": _ADDITIVE_BEFORE,
    "gpt_neo.GPTNeoSelfAttention": _ADDITIVE,
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": Mixer(
        "attention of its own",
        _additive_mask,
        outputs_as_they_are=frozenset({2}),  # a bias
    ),
    "openai.Attention": _ADDITIVE,
    "xglm.XGLMAttention": _ADDITIVE,
    "mvp.MvpAttention": _ADDITIVE,
    "trocr.TrOCRAttention": _ADDITIVE,
    "git.GitSelfAttention": _ADDITIVE,
    "xlm.MultiHeadAttention": Mixer(
        "attention of its own", _visible, without_mask=lambda module: True, drops_cache=True
    ),
    "xlnet.XLNetRelativeAttention": Mixer(
        "attention with relative positions",
        adapt=_xlnet_arguments,
        whole=frozenset({"attn_mask_h", "attn_mask_g", "r"}),
        without_mask=lambda module: True,
        sequence_first=True,
    ),
    "big_bird.BigBirdSelfAttention": _ADDITIVE,
    "megatron_bert.MegatronBertSelfAttention": _ADDITIVE,
    "rembert.RemBertSelfAttention": _ADDITIVE,
    "roformer.RoFormerSelfAttention": Mixer(
        "attention of its own", _additive_mask, of_all_heads=frozenset({"sinusoidal_pos"})
    ),
    "doge.DogeAttention": Mixer("attention to the highest-scoring keys", _doge_mask),
    "zaya.ZayaCCAProjection": Mixer(
        "convolution in front of attention",
        blanks_padding=True,
        outputs_along=frozenset({0, 1, 2}),
        layer_types=frozenset({"hybrid_sliding"}),
    ),
    "mamba.MambaMixer": _MAMBA,
    "falcon_mamba.FalconMambaMixer": _MAMBA,
    "jamba.JambaMambaMixer": _MAMBA,
    "zamba.ZambaMambaMixer": _MAMBA,
    "mamba2.Mamba2Mixer": _MAMBA2,
    "bamba.BambaMixer": _MAMBA2,
    "falcon_h1.FalconH1Mixer": _MAMBA2,
    "granitemoehybrid.GraniteMoeHybridMambaLayer": _MAMBA2,
    "nemotron_h.NemotronHMamba2Mixer": _MAMBA2,
    "zamba2.Zamba2MambaMixer": _MAMBA2,
    "qwen3_next.Qwen3NextGatedDeltaNet": _DELTA,
    "qwen3_5.Qwen3_5GatedDeltaNet": _DELTA,
    "qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": _DELTA,
    "lara_mini.LaraMiniGatedDeltaNet": _DELTA,
    "olmo_hybrid.OlmoHybridGatedDeltaNet": _DELTA,
    "kimi_linear.KimiLinearDeltaAttention": _DELTA,
    "bailing_hybrid.BailingHybridDeltaAttention": _DELTA,
    "lfm2.Lfm2ShortConv": _CONVOLUTION,
    "lfm2_moe.Lfm2MoeShortConv": _CONVOLUTION,
    "lfm3.Lfm3ShortConv": _CONVOLUTION,
    "minimax.MiniMaxLightningAttention": Mixer("lightning attention", blanks_padding=True),
    "llama4.Llama4TextAttention": Mixer(
        "chunked attention", _llama4_mask, layer_types=frozenset({"chunked_attention"})
    ),
    "deepseek_v32.DeepseekV32Attention": _INDEXED,
    "glm_moe_dsa.GlmMoeDsaAttention": _INDEXED,
    "axk2.AXK2Attention": _INDEXED,
    "hy_v4.HYV4Attention": _INDEXED,
    "deepseek_v4.DeepseekV4Attention": Mixer(
        "attention to a window and to compressed keys",
        _window_mask,
        layer_types=frozenset({"compressed_sparse_attention", "heavily_compressed_attention"}),
        counts_columns=lambda module: module.compressor is not None,
    ),
    # Layers without an indexer run on rows too: the ones with an indexer compare the name of the implementation, which
    # all share.
    "minimax_m3_vl.MiniMaxM3VLAttention": Mixer(
        "attention to selected blocks of keys",
        _additive_mask,
        layer_types=frozenset({"minimax_m3_sparse"}),
        counts_columns=lambda module: module.indexer is not None,
        applies=lambda module: "minimax_m3_sparse" in module.config.layer_types,
    ),
    "inkling.InklingAttention": _RELATIVE,
    "inkling.InklingShortConvolution": _CONVOLUTION,
    "inkling2.Inkling2SlidingAttention": _RELATIVE_2,
    "inkling2.Inkling2FullAttention": _RELATIVE_2,
    "inkling2.Inkling2ShortConvolution": _CONVOLUTION,
    "inkling2_loop.Inkling2LoopSlidingAttention": _RELATIVE_2,
    "inkling2_loop.Inkling2LoopFullAttention": _RELATIVE_2,
    "inkling2_loop.Inkling2LoopShortConvolution": _CONVOLUTION,
    "dots3_note.Dots3NoteTextAttention": Mixer(
        "attention to selected keys",
        _window_mask,
        layer_types=frozenset({"indexed_attention"}),
        applies=lambda module: "indexed_attention" in module.config.layer_types,
    ),
    "qwen4_exp.Qwen4ExpTextAttention": _INDEXED,
    "qwen4_exp.Qwen4ExpTextGatedDeltaNet": _DELTA,
    "qwen4_exp.Qwen4ExpTextPLELayer": Mixer("embedding of n-grams"),
    # The next four are of transformers before 5.23, later ones use the interface. They may go when setup.cfg demands 5.23.
    "diffllama.DiffLlamaSdpaAttention": _ADDITIVE,
    "moshi.MoshiSdpaAttention": _ADDITIVE,
    "nemotron.NemotronSdpaAttention": _ADDITIVE,
    "recurrent_gemma.RecurrentGemmaSdpaAttention": Mixer("attention of its own", _window_mask),
    "recurrent_gemma.RecurrentGemmaRecurrentBlock": Mixer("RG-LRU"),
    "rwkv.RwkvSelfAttention": Mixer("RWKV"),
    "rwkv.RwkvFeedForward": Mixer("token shift"),
    "xlstm.xLSTMLayer": Mixer("mLSTM"),
}

# The class of 5.23 has the same name, but uses the interface. This may go when setup.cfg demands 5.23.
if Version(transformers.__version__) < Version("5.23"):
    _MIXERS["ctrl.MultiHeadAttention"] = Mixer("attention of its own", _ctrl_mask)


def mixer_of(module: nn.Module) -> Mixer | None:
    """What is known about ``module`` as a mixer past the attention interface; None where it is none."""
    for cls in type(module).__mro__:
        parts = cls.__module__.split(".")
        if parts[:2] == ["transformers", "models"]:  # above it may lie a class of FSDP2; below it, another forward
            mixer = _MIXERS.get(f"{parts[2]}.{cls.__name__}")
            return mixer if mixer is not None and mixer.applies(module) else None
    return None


_PROJECTIONS_BEFORE = ("in_proj", "qkv_proj", "q_proj", "k_proj", "linear_q", "linear_k")


def puts_bias_on_padding(module: nn.Module) -> bool:
    """Whether a known mixer adds a bias to padding, which it has set to zero, before it mixes it into the tokens after it."""
    if not mixer_of(module).blanks_padding:  # type: ignore[union-attr]
        return False
    return any(getattr(getattr(module, name, None), "bias", None) is not None for name in _PROJECTIONS_BEFORE)


def why_on_rows(module: nn.Module) -> str | None:
    """Why a known mixer takes whole rows; None where it forks its state."""
    recipes = mixer_of(module).recipes  # type: ignore[union-attr]
    return why_not_forked(module, recipes) if recipes else "its kind has no state to fork"
