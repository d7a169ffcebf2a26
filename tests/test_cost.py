"""What cost.py computes is what torch counts on real steps, what autograd really keeps, and what models really hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper, prefix_grouped_logps, shared_prefix_attention
from prefix_grouper_plugins.attention.backends.dense import visibility_mask
from prefix_grouper_plugins.cost import SHAPES, ModelShape, compare
from prefix_grouper_plugins.forest import visible_pairs, visible_pairs_of_rows
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.model_types import MODEL_TYPES, known_of
from tests import tiny
from tests.attention.forests import layouts

GROUP = PrefixLayout.from_groups([60], [[20, 12, 31, 7]])


def counted(step: Any) -> dict[str, int]:
    """FLOPs by operator."""
    with FlopCounterMode(display=False) as counter:
        step()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def batch() -> tuple[torch.Tensor, ...]:
    """Prompt and completion ids of ``GROUP`` with their masks, as a trainer has them."""
    responses = torch.tensor([20, 12, 31, 7])
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(3, 24, (1, 60), generator=generator).expand(4, -1)
    completion_ids = torch.randint(3, 24, (4, 31), generator=generator)
    mask = (torch.arange(31) < responses[:, None]).long()
    return prompt_ids, torch.ones_like(prompt_ids), completion_ids * mask, mask


# --------------------------------------------------------------------------------------------------------------- pairs


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), window=st.none() | st.integers(1, 40))
def test_visible_pairs_are_those_of_the_mask(layout: PrefixLayout, window: int | None) -> None:
    assert visible_pairs(layout.segments, window) == int(visibility_mask(layout.segments, window).sum())


@pytest.mark.parametrize("window", [None, 5, 1000])
def test_visible_pairs_of_rows_are_those_of_causal_masks(window: int | None) -> None:
    alone = [PrefixLayout.from_groups([1], [[length - 1]]).pad_to(length) for length in GROUP.row_lengths]
    # A row of L tokens is laid out as L - 1; its last token is added by hand.
    seen = [length if window is None else min(length, window) for length in GROUP.row_lengths]
    expected = sum(visible_pairs(x.segments[:1], window) + last for x, last in zip(alone, seen, strict=True))
    assert visible_pairs_of_rows(GROUP.row_lengths, window) == expected


# --------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("model_type", "changes"), [("qwen3", {}), ("mistral", {"sliding_window": 9})])
def test_a_packed_training_step_costs_what_torch_counts(model_type: str, changes: dict[str, Any]) -> None:
    model = enable_prefix_grouper(tiny.model(model_type, **changes))
    scored = 70
    cost = compare(ModelShape.from_config(model.config), GROUP, scored=scored).shared

    def step() -> None:
        inputs = packed_inputs(GROUP, torch.zeros(GROUP.num_tokens, dtype=torch.long))
        positions = torch.arange(GROUP.num_tokens - scored, GROUP.num_tokens)
        model(**inputs, logits_to_keep=positions).logits.sum().backward()

    flops = counted(step)
    attention = sum(flops[f"prefix_grouper.shared_prefix_attention{x}"] for x in ("", "_backward"))
    assert attention == 7 * cost.attention // 2
    # The rest: rotary embeddings multiply positions by frequencies.
    assert sum(flops.values()) == pytest.approx(cost.training_flops, rel=0.002)


def test_checkpointing_costs_at_most_one_more_forward() -> None:
    """A little less: torch stops recomputing a layer once it has what the backward needs, before its last product."""
    model = enable_prefix_grouper(tiny.model("qwen3"), self_check=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    prompt_ids, prompt_mask, completion_ids, mask = batch()
    cost = compare(ModelShape.from_config(model.config), GROUP, scored=int(mask.sum())).shared

    def step() -> None:
        prefix_grouped_logps(model, prompt_ids, prompt_mask, completion_ids, mask)[0].sum().backward()

    total = sum(counted(step).values())
    assert 0.92 * cost.checkpointed_training_flops < total < 1.01 * cost.checkpointed_training_flops


def test_the_operators_count_visible_pairs_whatever_the_backend() -> None:
    query, key, value = (torch.randn(GROUP.num_tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    pairs = int(visibility_mask(GROUP.segments).sum())
    for backend in ("merged_lse", "blockwise"):
        flops = counted(lambda b=backend: shared_prefix_attention(query, key, value, GROUP, backend=b).sum().backward())
        assert flops == {
            "prefix_grouper.shared_prefix_attention": 4 * 4 * 8 * pairs,
            "prefix_grouper.shared_prefix_attention_backward": 10 * 4 * 8 * pairs,
        }, "inner products of a backend are not counted a second time"


def test_the_ordinary_step_costs_what_torch_counts_but_for_the_masked_half() -> None:
    """Eager attention computes all L * L pairs of a row, masked or not, and its backward four products to two."""
    model = tiny.model("qwen3", attn_implementation="eager")
    rows, length = 4, 80
    shape = ModelShape.from_config(model.config)
    cost = compare(shape, PrefixLayout.from_groups([60], [[20] * rows]), scored=rows * length).ordinary

    def step() -> None:
        model(torch.zeros(rows, length, dtype=torch.long), use_cache=False).logits.sum().backward()

    attention = 3 * cost.attention * length**2 / (length * (length + 1) / 2)
    assert sum(counted(step).values()) == pytest.approx(3 * (cost.linear + cost.head) + attention, rel=0.002)


def test_the_speed_up_is_that_of_the_papers_formula() -> None:
    """Written out, with the head on response positions; the branch rule moves one token in thousands."""
    prefix, response, group = 8192, 1024, 8
    shape, layout = SHAPES["qwen2.5-7b"], PrefixLayout.from_groups([prefix], [[response] * group])
    per_token = 28 * 2 * (3584 * (28 + 2 * 4) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944)
    head = 3 * 2 * 3584 * 152064 * group * response

    def training(tokens: int, pairs: int) -> float:
        return 3 * per_token * tokens + 3.5 * 4 * 28 * 128 * 28 * pairs + head

    row = prefix + response
    repeated = training(group * row, group * row * (row + 1) // 2)
    shared_pairs = prefix * (prefix + 1) // 2 + group * (prefix * response + response * (response + 1) // 2)
    shared = training(prefix + group * response, shared_pairs)
    comparison = compare(shape, layout, scored=group * response)
    assert comparison.ordinary.training_flops == repeated
    assert comparison.shared.training_flops == pytest.approx(shared, rel=1e-3)
    assert comparison.speedup == pytest.approx(repeated / shared, rel=1e-3) == pytest.approx(4.16, abs=0.01)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, checkpointing: bool) -> None:
    def kept(layers: int) -> int:
        """Bytes of the distinct storages saved for the backward, parameters apart."""
        config = AutoConfig.for_model("qwen2", **{**tiny.SIZES, "num_hidden_layers": layers})
        with torch.device("meta"):
            model = enable_prefix_grouper(AutoModelForCausalLM.from_config(config, dtype=dtype)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no number is used twice
            return x

        layout = GROUP.to("meta")
        ids = torch.zeros(layout.num_tokens, dtype=torch.long, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = model(**packed_inputs(layout, ids), logits_to_keep=torch.zeros(1, dtype=torch.long, device="meta"))
        assert logits.logits.requires_grad
        return sum(storage.nbytes() for number, storage in storages.items() if number not in weights)

    def formula(layers: int) -> int:
        config = AutoConfig.for_model("qwen2", **{**tiny.SIZES, "num_hidden_layers": layers})
        cost = compare(ModelShape.from_config(config), GROUP, element_size=dtype.itemsize).shared
        return cost.checkpointed_bytes if checkpointing else cost.activation_bytes

    assert kept(5) - kept(3) == formula(5) - formula(3)


def test_keys_and_values_take_two_heads_of_each_layer_and_token() -> None:
    cost = compare(SHAPES["qwen2.5-7b"], GROUP)
    assert cost.shared.kv_bytes == GROUP.num_tokens * 28 * 2 * 4 * 128 * 2
    assert cost.ordinary.kv_bytes == GROUP.num_row_tokens * 28 * 2 * 4 * 128 * 2


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("model_type", sorted(name for name in MODEL_TYPES if known_of(name).layer_cost))
def test_a_layer_has_the_weights_of_the_real_model(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **tiny.SIZES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    active = getattr(config, "num_experts_per_tok", None)
    total = 0
    for name, weight in model.get_decoder().layers.named_parameters():
        router = active and name.endswith((".gate.weight", "expert_gate.weight"))  # its small product is not counted
        if weight.dim() > 1 and not router:
            total += weight.numel() * active // weight.shape[0] if ".experts." in name else weight.numel()
    shape = ModelShape.from_config(config)
    assert shape.num_layers * shape.layer_weights == total


@pytest.mark.parametrize(("name", "billions"), [("qwen2.5-0.5b", 0.49), ("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.6),
                                                ("qwen2.5-32b", 32.5), ("llama-3.1-8b", 8.03)])  # fmt: skip
def test_named_shapes_have_the_parameters_that_their_model_cards_state(name: str, billions: float) -> None:
    assert SHAPES[name].num_weights / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_shape_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="the cost of model type 'mamba' is not known"):
        ModelShape.from_config(AutoConfig.for_model("mamba"))
    with pytest.raises(ValueError, match="some layers have experts and others have not"):
        ModelShape.from_config(Qwen3MoeConfig(mlp_only_layers=[0]))


def test_the_head_dim_may_be_left_to_the_config() -> None:
    assert ModelShape.from_config(LlamaConfig(hidden_size=64, num_attention_heads=4)).head_dim == 16
