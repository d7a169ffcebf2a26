"""The table of model types: all that is known of single types and that their structure does not show.

A type goes in when its test passes; what is refused says why. What holds for all types is in modeling/support/. No other
file of the package or its integrations names a model type, except that mixers/table.py names classes that mix tokens.

Rules about releases of transformers say in `needs_transformers` which release mends the type. They may go when setup.cfg
demands that release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import transformers
from packaging.version import Version


@dataclass(frozen=True)
class ModelType:
    """What is known of a model type; the defaults are what is assumed of an unknown one.

    Attributes:
        verified: its packed logits and gradients equal those of single rows in tests/modeling/test_families.py.
        verified_with_images: likewise in tests/modeling/test_images.py.
        text_part_of_verified: it is the text part of such a type, and compared with it.
        refused: why packed rows of it differ from its rows.
        reads_text: whether it can be trained on rows of text; else `refused` says what it reads.
        reasons_by_config: why packed rows differ from rows under some configs: a function of the config.
        left_padding: why an ordinary batch of it that is padded on the left does not compute what single rows compute.
        needs_transformers: the release from which on it is causal (in older code a prefix depends on what follows it),
            runs without a cache, or has been compared: what `since_then` says. Older code is refused.
        skips_padding: it numbers positions from the attention mask, so that left padding does not count.
        unshared_layer_types: types of layers that its config may ask for and that packed rows cannot reproduce.
        logits_scaling: what its head does by the ``logits_scaling`` of its config.
        layer_cost: its layers are those of Llama in size, with an MLP of gate, up and down ("gated") or of up and down
            only ("ungated"); None where the cost of its layers is not known.
        images_both_ways: the tokens of an image see all others of their image.
        images_both_ways_in: likewise where the config says ``use_bidirectional_attention="vision"``: in all layers, whatever
            their window, or only in layers with a sliding window, which then cuts images too.
        verls_forward: verl replaces its forward by one that shows the vision tower an empty picture where a micro-batch
            has no image.
        compared_in_verl: its images were compared with verl's own engine.
        plain_tower: its vision tower returns features without those of deeper layers, which verl's forward stumbles over.
        attention_runs_twice: a module of attention runs twice in one forward, on different keys.
    """

    verified: bool = False
    verified_with_images: bool = False
    text_part_of_verified: bool = False
    refused: str | None = None
    reads_text: bool = True
    reasons_by_config: Callable[[Any], list[str]] | None = None
    left_padding: str | None = None
    needs_transformers: str | None = None
    since_then: Literal["causal", "cacheless", "compared"] = "causal"
    skips_padding: bool = False
    unshared_layer_types: frozenset[str] = frozenset()
    logits_scaling: Literal["divides", "multiplies"] = "divides"
    layer_cost: Literal["gated", "ungated"] | None = None
    images_both_ways: bool = False
    images_both_ways_in: Literal["all layers", "windows"] | None = None
    verls_forward: bool = False
    compared_in_verl: bool = False
    plain_tower: bool = False
    attention_runs_twice: bool = False


MODEL_TYPES: dict[str, ModelType] = {}


def _note(names: str, **facts: Any) -> None:
    """Add ``facts`` to what is known of each of ``names``."""
    for name in names.split():
        MODEL_TYPES[name] = replace(MODEL_TYPES.get(name, ModelType()), **facts)


_note(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation
    big_bird biogpt bitnet blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge
    dory dots1 dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1
    falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text git glm glm4
    glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder jais2
    jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba
    mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral mllama modernbert-decoder moshi mpt mvp nanochat nemotron nemotron_h olmo olmo2 olmo3
    olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal plbart qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2
    trocr vaultgemma whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod youtu zamba zamba2 zaya
    """,
    verified=True,
)
_note(
    """
    aya_vision cohere2_vision gemma3 gemma3n gemma4 gemma4_unified glm4v got_ocr2 idefics2 idefics3 internvl llava
    llava_next llava_onevision mistral3 phi4_multimodal qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe
    smolvlm vipllava
    """,
    verified_with_images=True,
)
_note(
    "emu3_text_model glm4v_text mllama_text_model qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text",
    text_part_of_verified=True,
)

_note("phimoe", refused="phimoe draws its experts at random while it trains, so that no two forwards agree")
_note(
    "bigbird_pegasus",
    refused="bigbird_pegasus is causal by its mask alone, without which packed rows run, and calls its attention as not causal",
)
_note(
    "blt", refused="blt cuts a row into patches of bytes, which attend to each other in code that knows no packed rows"
)
_note("cpmant", refused="cpmant lets each token see the whole row, so a prefix would depend on what follows it")
_note(
    "prophetnet",
    refused="prophetnet runs a stream of predictions alongside each row, in attention that knows no packed rows",
)
_note(
    "reformer",
    refused="reformer hashes tokens at random and attends within chunks of columns, so that no two forwards agree",
)
for _name in ("musicgen", "musicgen_decoder", "musicgen_melody", "musicgen_melody_decoder"):
    _note(_name, refused=f"{_name} reads several codebooks of sound at a time, not text", reads_text=False)
for _name in ("gemma4_assistant", "gemma4_unified_assistant"):
    _note(
        _name,
        refused=f"{_name} reads hidden states and keys of the model that it drafts for, not text",
        reads_text=False,
    )
_note(
    "llama4_text",
    left_padding="llama4_text cuts its attention into chunks by columns, so padding on the left changes what tokens see",
)
for _name in ("recurrent_gemma", "rwkv", "xlstm"):
    _note(
        _name,
        left_padding=f"{_name} runs its state over padding on the left, so a padded batch does not compute what single rows "
        "compute",
    )
_note(
    "xlm",
    left_padding="xlm does not hide padding on the left from the tokens after it, so a padded batch does not compute what "
    "single rows compute",
)
_note(
    "xlnet", left_padding="xlnet adds the mask of a padded batch to that of one row, which fails in transformers itself"
)
_note("opt", skips_padding=True)
_note("minimax", unshared_layer_types=frozenset({"sliding_attention"}))  # it would hand them the mask for padding
_note("hyperclovax", logits_scaling="multiplies")

# Scans over more than one chunk; BERT-like decoders that were given a mask for reading both ways.
_note("nemotron_h zamba2", needs_transformers="5.23")
_note("big_bird megatron-bert rembert roformer", needs_transformers="5.23")
# Without a mask, which sdpa does without on a row that is not padded, indexers would choose among later keys too.
_note("glm_moe_dsa", needs_transformers="5.23")
_note("deepseek_v4", needs_transformers="5.23", since_then="cacheless")
_note(
    "axk2 deepseek_v32 dots3_note_text hy_v4 inkling2_text inkling_text minimax_m3_vl_text qwen4_exp_text",
    needs_transformers="5.23",
    since_then="compared",
)

# tests/test_cost.py counts their weights.
_note(
    "apertus arcee cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4 granite helium hunyuan_v1_dense "
    "internlm3 llama ministral mistral mixtral nemotron olmo olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe "
    "seed_oss smollm3 stablelm starcoder2",
    layer_cost="gated",
)
_note("apertus arcee nemotron phi starcoder2", layer_cost="ungated")

_note("gemma3", images_both_ways=True)
_note("gemma4", images_both_ways_in="windows")
_note("gemma4_unified", images_both_ways_in="all layers")
_note("qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe", verls_forward=True, compared_in_verl=True)
_note("llava llava_next llava_onevision gemma3 internvl smolvlm idefics3", compared_in_verl=True)
_note("qwen2_vl qwen2_5_vl", plain_tower=True)
_note("diffllama dory hrm_text", attention_runs_twice=True)


def _doge_reasons(config: Any) -> list[str]:
    """What its config may ask for beyond what packed rows reproduce."""
    reasons = []
    if config.keep_window_size < config.max_position_embeddings:
        reasons.append(
            f"doge keeps the {config.keep_window_size} keys of the highest scores, and which ones of equal score depends on "
            f"the length of the batch: set `keep_window_size` to at least {config.max_position_embeddings}"
        )
    if config.is_moe:
        reasons.append("doge with `is_moe=True` mixes the router logits of different tokens")
    # Before transformers 5.23 a row has no mask there unless a window or padding asks for one. This may go when setup.cfg
    # demands 5.23.
    if Version(transformers.__version__) < Version("5.23") and "sdpa" in (config._attn_implementation or ""):
        reasons.append('doge is not causal under sdpa with this transformers: use `attn_implementation="eager"`')
    return reasons


def _xlm_reasons(config: Any) -> list[str]:
    if config.causal:
        return []
    return [
        "xlm reads both ways, so a prefix would depend on what follows it: only a model with `causal=True` is causal"
    ]


def _xlnet_reasons(config: Any) -> list[str]:
    reasons = []
    if config.attn_type != "uni":
        reasons.append(
            f'xlnet with attn_type="{config.attn_type}" reads both ways, so a prefix would depend on what follows it: only a '
            'model with `attn_type="uni"` is causal'
        )
    if config.same_length:
        reasons.append("xlnet with `same_length=True` hides from each token all others of a row: set it to False")
    if config.bi_data:
        reasons.append("xlnet with `bi_data=True` reads half of the rows of a batch backwards: set it to False")
    return reasons


def _trocr_reasons(config: Any) -> list[str]:
    if config.use_learned_position_embeddings:
        return []
    return [
        "trocr with `use_learned_position_embeddings=False` counts tokens along the packed row: only learned positions are "
        "supported"
    ]


_note("doge", reasons_by_config=_doge_reasons)
_note("xlm", reasons_by_config=_xlm_reasons)
_note("xlnet", reasons_by_config=_xlnet_reasons)
_note("trocr", reasons_by_config=_trocr_reasons)


VERIFIED_MODEL_TYPES = frozenset(name for name, known in MODEL_TYPES.items() if known.verified)
VERIFIED_MULTIMODAL_TYPES = frozenset(name for name, known in MODEL_TYPES.items() if known.verified_with_images)


def known_of(model_type: str) -> ModelType:
    """What is known of ``model_type``; of a type that nobody has looked at, the defaults."""
    return MODEL_TYPES.get(model_type, ModelType())


def reasons_of_type(config: Any) -> list[str]:
    """Why packed rows of a model of ``config`` differ from its rows, by what is known of its type."""
    kind, known = config.model_type, known_of(config.model_type)
    needed = known.needs_transformers
    if needed is not None and Version(transformers.__version__) < Version(needed):
        this = transformers.__version__
        return {
            "causal": [f"{kind} is causal from transformers {needed} on, this is {this}"],
            "cacheless": [f"{kind} runs without a cache from transformers {needed} on, this is {this}"],
            "compared": [f"{kind} has been compared with single rows from transformers {needed} on, this is {this}"],
        }[known.since_then]
    return known.reasons_by_config(config) if known.reasons_by_config is not None else []
