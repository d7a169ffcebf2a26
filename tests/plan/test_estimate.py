"""FLOPs and memory of a training, where they depend on how logits are computed."""

from __future__ import annotations

from prefix_grouper_plugins.cost import ModelShape
from prefix_grouper_plugins.plan.estimate import TILE_TOKENS, TILE_WIDTH, Training
from prefix_grouper_plugins.plan.schedule import Load

SHAPE = ModelShape(64, 2, 4, 2, 16, 128, 3 * TILE_WIDTH)
WHOLE = Load(tokens=30_000, pairs=10**8, windowed_pairs=10**8, scored=20_000)


def training(**options: bool | int) -> Training:
    return Training(SHAPE, SHAPE.num_weights, **options)  # type: ignore[arg-type]


def test_logits_in_tiles_do_not_grow_with_what_is_scored_and_those_of_verl_do() -> None:
    more = WHOLE._replace(scored=25_000)
    tiles, full = (
        training(full_logits=full).peak_bytes([more]) - training(full_logits=full).peak_bytes([WHOLE])
        for full in (False, True)
    )
    assert full == 2 * 5_000 * SHAPE.vocab_size * 2  # logits and their gradient, in bfloat16
    assert 0 < tiles == 5_000 * SHAPE.hidden_size * (4 + 2 + 2)  # scored states, and their gradients


def test_the_head_of_a_gpu_holds_one_tile_and_the_gradient_of_a_trained_head() -> None:
    states = WHOLE.scored * SHAPE.hidden_size * (4 + 2 + 2)
    tiles, full = (training(lora_rank=1, full_logits=full).peak_bytes([WHOLE]) for full in (False, True))
    assert full - tiles == 2 * WHOLE.scored * SHAPE.vocab_size * 2 - (TILE_TOKENS * TILE_WIDTH * 2 + states)
    trained, adapted = (training(lora_rank=rank) for rank in (None, 1))
    above = [own.peak_bytes([WHOLE]) - own.static_bytes for own in (trained, adapted)]
    assert above[0] - above[1] == SHAPE.vocab_size * SHAPE.hidden_size * (4 + 2)


def test_on_a_cpu_every_position_goes_through_the_head_but_those_of_a_prompt_forwarded_apart() -> None:
    # The first of the micro-batches that share a prompt of 9,000 tokens, and a later one.
    apart = WHOLE._replace(apart_tokens=9_000, cached_tokens=9_000)
    later = WHOLE._replace(cached_tokens=9_000, open_tokens=9_000)
    heads = [training(on_cpu=True).cost(load).head for load in (WHOLE, apart, later)]
    assert [head // (2 * SHAPE.hidden_size * SHAPE.vocab_size) for head in heads] == [30_000, 21_000, 30_000]
    assert training().cost(WHOLE).head == training().cost(apart).head == heads[0] * 2 // 3
