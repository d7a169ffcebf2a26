"""A difference between two paths is traced to the decoder layer where it starts, however the paths lay out the rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.modeling import Anatomy, packed_inputs
from prefix_grouper_plugins.modeling.prompt_cache import PromptCache
from prefix_grouper_plugins.modeling.self_check.layers import where_gradients_part, where_paths_part
from prefix_grouper_plugins.modeling.self_check.micro_batch import compare_micro_batch
from tests import tiny
from tests.modeling.self_check.test_micro_batch import CPU, LAYOUT, ROWS, ordinary, packed

GROUP = tiny.rows({9: [4, 7, 2]})
PROMPT = 8  # tokens that all rows of the group share, forwarded once


def padded(model: nn.Module) -> None:
    """On the left, as TRL pads prompts; positions are those of the rows."""
    ids = nn.utils.rnn.pad_sequence(ROWS, batch_first=True, padding_side="left")
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ROWS], batch_first=True, padding_side="left")
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def end_to_end(model: nn.Module) -> None:
    """Without padding, row behind row, as verl does: here no row sees another, since each is a root of its own."""
    layout = PrefixLayout.from_rows(ROWS, keys=range(len(ROWS)))
    model(**packed_inputs(layout, layout.pack(ROWS)))


def behind_a_prompt(model: nn.Module) -> None:
    """The prompt in one forward, the responses against its keys and values in another."""
    cache, layout = PromptCache(), PrefixLayout.from_rows(GROUP)
    ids = layout.pack(GROUP)
    cache.run(model, PrefixLayout.from_groups([PROMPT], [[1]]), ids[:PROMPT], layout.position_ids[:PROMPT])
    part = layout.given(PROMPT)
    cache.prepare(part, last=True)
    model(**packed_inputs(part, ids[PROMPT:]))


def one_by_one(model: nn.Module) -> None:
    for row in GROUP:
        model(input_ids=row[None])


PATHS = {
    "padded": (padded, packed),
    "one by one": (ordinary, packed),
    "end to end": (end_to_end, packed),
    "behind a prompt": (one_by_one, behind_a_prompt),
}


is_wrong = [False]  # whether the model has its fault now


def built(layer: int, fault=lambda output: output + 0.1 * output.roll(1, dims=1)) -> nn.Module:
    """A model whose MLP in one layer mixes tokens while `is_wrong`: enabled before, as a fault may come later."""
    model = tiny.model()
    model.model.layers[layer].mlp.register_forward_hook(lambda *call: fault(call[2]) if is_wrong[0] else call[2])
    return enable_prefix_grouper(model)


def wrong(path):
    """The path, on which the model has its fault."""

    def run(model) -> object:
        is_wrong[0] = True
        try:
            return path(model)
        finally:
            is_wrong[0] = False

    return run


@pytest.mark.parametrize(
    ("paths", "adapters"), [*((name, False) for name in PATHS), ("padded", True), ("behind a prompt", True)]
)
def test_the_layer_that_differs_on_the_shared_path_is_named(paths, adapters):
    own, other = PATHS[paths]
    model = built(layer=1)
    if adapters:  # whose wrapper calls the model's forward past the hooks of the model itself
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    anatomy = Anatomy(model)
    right = where_paths_part(anatomy, lambda: own(model), lambda: other(model), torch.float32)
    assert right.layer is None and 0 < right.behind < 1e-5, right
    found = where_paths_part(anatomy, lambda: own(model), lambda: wrong(other)(model), torch.float32)
    assert (found.layer, found.number, found.of) == ("model.layers.1", 2, 3), found
    assert found.before < 1e-5 < 1e-3 < found.behind
    assert str(found).startswith("it starts in decoder layer 2 of 3 (model.layers.1), whose outputs differ by ")


def test_a_wrong_position_shows_in_the_first_layer_and_a_wrong_embedding_in_front_of_it():
    model = tiny.model()
    model.model.embed_tokens.register_forward_hook(lambda *call: call[2] * 1.1 if is_wrong[0] else call[2])
    enable_prefix_grouper(model)
    anatomy = Anatomy(model)

    def counted(model) -> None:
        model(**packed_inputs(LAYOUT, LAYOUT.pack(ROWS), torch.arange(LAYOUT.num_tokens)))

    assert where_paths_part(anatomy, lambda: padded(model), lambda: counted(model), torch.float32).number == 1
    found = where_paths_part(anatomy, lambda: padded(model), lambda: wrong(packed)(model), torch.float32)
    assert found.layer == "" and str(found).startswith("it starts in front of the first decoder layer, whose inputs")


def test_the_comparison_of_a_micro_batch_names_the_layer():
    model = built(layer=2)
    result = compare_micro_batch(model, ordinary, {"packed": wrong(packed)}, CPU)
    assert not result.passed
    assert "rounding in torch.float32 explains" in result.reason
    assert "; it starts in decoder layer 3 of 3 (model.layers.2), whose outputs differ by" in result.reason
    assert not any(layer._forward_hooks for layer in model.model.layers), "no hook is left"


def test_a_wrong_backward_is_named_by_the_last_layer_whose_gradients_differ():
    model = built(layer=1, fault=lambda output: output + 0.1 * (output - output.detach()))
    reason = compare_micro_batch(model, ordinary, {"packed": wrong(packed)}, CPU).reason
    assert "the outputs of all 3 decoder layers agree to" in reason
    assert reason.endswith("the backward pass differs from decoder layer 2 of 3 (model.layers.1) on")
    assert where_gradients_part(Anatomy(model), {"lm_head.weight"}) is None


def test_where_nothing_differs_no_pass_is_made_for_it():
    model, passes = enable_prefix_grouper(tiny.model()), []

    def counted(path):
        return lambda inner: (passes.append(None), path(inner))[1]

    assert compare_micro_batch(model, counted(ordinary), {"packed": counted(packed)}, CPU).passed
    assert len(passes) == 2


def test_where_memory_does_not_suffice_no_layer_is_named():
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError

    model = enable_prefix_grouper(tiny.model())
    for paths in ((out_of_memory, lambda: packed(model)), (lambda: packed(model), out_of_memory)):
        assert where_paths_part(Anatomy(model), *paths, torch.float32) is None
    assert not any(layer._forward_hooks for layer in model.model.layers), "no hook is left"
