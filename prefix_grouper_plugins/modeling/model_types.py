"""Which model types tests have compared, and what is known of single types that their structure does not show.

A type goes into the lists when its test passes; what is refused says why. What holds for all types is in
modeling/support/report.py.
"""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

# Every type in this list runs in tests/modeling/test_families.py: packed logits and gradients against single rows.
VERIFIED_MODEL_TYPES = frozenset(
    """
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba beam bert bert-generation big_bird biogpt bitnet bloom
    camembert codegen cohere cohere2 cohere2_moe ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama
    doge dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo
    flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite
    gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama
    llama4_text longcat_flash mamba mamba2 megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2
    ministral ministral3 mistral mixtral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2
    olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next recurrent_gemma rembert roberta roberta-prelayernorm roc_bert roformer rwkv seed_oss
    smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm-roberta xlm-roberta-xl xlstm xmod youtu zamba
    zamba2 zaya
    """.split()
)

# Likewise in tests/modeling/test_images.py, with images. Text parts are types of the list above, or come with these.
VERIFIED_MULTIMODAL_TYPES = frozenset(
    """
    aya_vision cohere2_vision gemma3 glm4v idefics2 idefics3 internvl llava llava_next llava_onevision mistral3
    qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm vipllava
    """.split()
)
TEXT_PARTS = {"glm4v_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}

# Types of which a test has shown, or their code says, that packed rows give something else.
REFUSED_MODEL_TYPES = {
    "phimoe": "phimoe draws its experts at random while it trains, so that no two forwards agree",
}
# Packed rows equal single rows, which is not what these types compute in a batch that is padded on the left.
NOT_PADDED_ON_THE_LEFT = {
    "llama4_text": "llama4_text cuts its attention into chunks by columns, so padding on the left changes what tokens see",
    **{
        kind: f"{kind} runs its state over padding on the left, so a padded batch computes something else than single rows"
        for kind in ("recurrent_gemma", "rwkv", "xlstm")
    },
}

# Types whose older code is not causal, so that a prefix depended on what follows it: scans of nemotron_h and zamba2 over
# more than one chunk; BERT-like decoders that were given a mask for reading both ways.
_NEEDS_TRANSFORMERS = dict.fromkeys(
    ("big_bird", "megatron-bert", "nemotron_h", "rembert", "roformer", "zamba2"), "5.23"
)

# Models that number positions from the attention mask, so that left padding does not count.
POSITIONS_SKIP_PADDING = {"opt"}


def reasons_of_type(config: Any) -> list[str]:
    """Why packed rows of a model of ``config`` would be something else than its rows, by what is known of its type."""
    kind = config.model_type
    if kind in REFUSED_MODEL_TYPES:
        return [REFUSED_MODEL_TYPES[kind]]
    if (needed := _NEEDS_TRANSFORMERS.get(kind)) and Version(transformers.__version__) < Version(needed):
        return [f"{kind} is causal from transformers {needed} on, this is {transformers.__version__}"]
    return _doge_reasons(config) if kind == "doge" else []


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
    # A row has no mask there unless a window or padding asks for one.
    if Version(transformers.__version__) < Version("5.23") and "sdpa" in (config._attn_implementation or ""):
        reasons.append('doge is not causal under sdpa with this transformers: use `attn_implementation="eager"`')
    return reasons
