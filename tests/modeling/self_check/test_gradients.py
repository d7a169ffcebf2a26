"""Verification of a step: rounding passes, anything wrong does not, and every process hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefix_grouper_plugins import PrefixLayout, enable_prefix_grouper
from prefix_grouper_plugins.modeling import attention, packed_inputs
from prefix_grouper_plugins.modeling.self_check.gradients import check_gradients, gradient_difference, local_gradients
from prefix_grouper_plugins.modeling.self_check.tolerances import TOLERANCES
from tests import tiny

GROUPS = {9: [4, 7, 2, 5], 3: [6, 2, 8, 3]}
PROMPT_LENGTHS = [prompt for prompt, responses in GROUPS.items() for _ in responses]
ROWS = tiny.rows(GROUPS)
LAYOUT = PrefixLayout.from_rows(ROWS, shareable=PROMPT_LENGTHS)


def backward_of_mean_logp(logits: list[Tensor], rows: list[Tensor] = ROWS) -> None:
    """Of the responses' tokens, weighted as by advantages that differ between the rows of a group."""
    parts = []
    for index, (own, row, prompt) in enumerate(zip(logits, rows, PROMPT_LENGTHS, strict=True)):
        precise = own if own.dtype == torch.float64 else own.float()
        logps = precise.log_softmax(-1).gather(-1, row[1:, None])[prompt - 1 :]
        parts.append(logps * (1.0 if index % 2 else -0.5))
    torch.cat(parts).mean().backward()


def ordinary_step(model: Any) -> dict[str, Tensor]:
    """Row by row."""
    model.zero_grad()
    backward_of_mean_logp([model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in ROWS])
    return local_gradients(model)


def packed_step(model: Any, position_ids: Tensor | None = None, rows: list[Tensor] = ROWS) -> None:
    model.zero_grad()
    inputs = packed_inputs(LAYOUT, LAYOUT.pack(ROWS), position_ids)
    backward_of_mean_logp(LAYOUT.unpack(model(**inputs).logits[0]), rows)


def with_another_first_token() -> list[Tensor]:
    """The rows, with another token where each response begins: one wrong label for each row."""
    rows = [row.clone() for row in ROWS]
    for row, prompt in zip(rows, PROMPT_LENGTHS, strict=True):
        row[prompt] = 3 + (row[prompt] - 2) % (len(tiny.WORDS) - 3)
    return rows


def with_responses_one_further() -> Tensor:
    """Positions as they are where the responses are counted from one token too late."""
    positions = LAYOUT.position_ids.clone()
    for start, end, parent, _ in LAYOUT.segments.tolist():
        positions[start:end] += parent >= 0
    return positions


# --- what a tolerance must tell apart --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_tolerance_lies_between_rounding_and_a_wrong_label_or_position(dtype, model_type):
    model = enable_prefix_grouper(tiny.model(model_type).to(dtype))
    ordinary = ordinary_step(model)
    packed_step(model)
    assert check_gradients(model, ordinary, dtype) > 0

    for wrong in ({"rows": with_another_first_token()}, {"position_ids": with_responses_one_further()}):
        packed_step(model, **wrong)
        assert gradient_difference(model, ordinary) > 2 * TOLERANCES[dtype].update, f"wrong {', '.join(wrong)}"
        with pytest.raises(RuntimeError, match="the gradients of the shared step differ from the ordinary ones"):
            check_gradients(model, ordinary, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tolerance_holds_for_autocast_too(dtype):
    model = enable_prefix_grouper(tiny.model())
    with torch.autocast("cpu", dtype):
        ordinary = ordinary_step(model)
        packed_step(model)
        check_gradients(model, ordinary, dtype)
        packed_step(model, rows=with_another_first_token())
        with pytest.raises(RuntimeError):
            check_gradients(model, ordinary, dtype)


def test_where_everything_is_computed_in_float64_hardly_anything_is_left():
    model = enable_prefix_grouper(tiny.model().double())
    tiny.compute_norms_in_input_dtype(model)
    ordinary = ordinary_step(model)
    packed_step(model)
    assert gradient_difference(model, ordinary) < 1e-14


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_in_float32_attention_that_rounds_its_keys_to_bfloat16_is_refused(monkeypatch, model_type):
    """A small fault, which a tolerance a thousand times as wide would let pass."""
    own = attention.shared_prefix_attention

    def coarse(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return own(query, key.bfloat16().float(), *args, **kwargs)

    model = enable_prefix_grouper(tiny.model(model_type), self_check=False)
    ordinary = ordinary_step(model)
    monkeypatch.setattr(attention, "shared_prefix_attention", coarse)
    packed_step(model)
    limit = TOLERANCES[torch.float32].update
    assert 2 * limit < gradient_difference(model, ordinary) < 1000 * limit
    with pytest.raises(RuntimeError, match="the gradients of the shared step differ from the ordinary ones"):
        check_gradients(model, ordinary, torch.float32)


# --- the measure -----------------------------------------------------------------------------------------------------


def stepped(seed: int = 0) -> nn.Module:
    """A small model with gradients."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model(torch.randn(11, 5)).square().sum().backward()
    return model


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()


def test_equal_gradients_pass_without_a_difference():
    model = stepped()
    for dtype in TOLERANCES:
        assert check_gradients(model, local_gradients(model), dtype) == 0.0


def test_the_difference_is_the_norm_of_the_difference_over_the_norm():
    ordinary, model = local_gradients(stepped(0)), stepped(1)
    expected = (flat(local_gradients(model)) - flat(ordinary)).norm() / flat(ordinary).norm()
    assert gradient_difference(model, ordinary) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_difference_just_beyond_the_tolerance_is_refused_with_both_numbers(dtype):
    model, tolerance = stepped().double(), TOLERANCES[dtype].update
    ordinary = {name: gradient / (1 + 0.9 * tolerance) for name, gradient in local_gradients(model).items()}
    assert check_gradients(model, ordinary, dtype) == pytest.approx(0.9 * tolerance, rel=1e-3)
    ordinary = {name: gradient / (1 + 1.1 * tolerance) for name, gradient in local_gradients(model).items()}
    numbers = f"differ from the ordinary ones by {1.1 * tolerance:.1e}, rounding in {dtype} explains {tolerance:.0e}. "
    with pytest.raises(
        RuntimeError, match=f"{numbers}A mixture of experts .* please report this with .* turn sharing off"
    ):
        check_gradients(model, ordinary, dtype)


def test_the_ordinary_gradients_survive_the_next_step():
    model = stepped()
    ordinary = local_gradients(model)
    before = flat(ordinary)
    for p in model.parameters():
        p.grad.zero_()
    assert torch.equal(flat(ordinary), before)
    assert gradient_difference(model, ordinary) == 1.0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_one_wrong_sign_is_refused():
    model = stepped()
    ordinary = local_gradients(model)
    largest = max((p.grad for p in model.parameters()), key=lambda grad: grad.abs().max())
    largest.view(-1)[largest.abs().argmax()] *= -1
    with pytest.raises(RuntimeError, match="differ from the ordinary ones"):
        check_gradients(model, ordinary, torch.bfloat16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["packed", "ordinary", "both"])
def test_not_a_number_is_refused(where, value):
    model = stepped()
    ordinary = local_gradients(model)
    if where != "ordinary":
        model[1].bias.grad[1] = value
    if where != "packed":
        ordinary["1.bias"][1] = value
    with pytest.raises(RuntimeError, match=r"differ from the ordinary ones by (nan|inf)"):
        check_gradients(model, ordinary, torch.float32)


@pytest.mark.parametrize("missing_in", ["packed", "ordinary"])
def test_a_gradient_that_only_one_step_has_is_named(missing_in):
    model = stepped()
    ordinary = local_gradients(model)
    if missing_in == "packed":
        model[1].weight.grad = None
    else:
        del ordinary["1.weight"]
    with pytest.raises(ValueError, match=r"1 parameters have a gradient in one of the two steps only, 1.weight for"):
        check_gradients(model, ordinary, torch.float32)


def test_frozen_parameters_are_not_missed():
    model = stepped()
    for p in model[0].parameters():
        p.requires_grad_(False).grad = None
    ordinary = local_gradients(model)
    assert ordinary.keys() == {"1.weight", "1.bias"}
    assert check_gradients(model, ordinary, torch.float32) == 0.0


def test_a_small_gradient_where_there_should_be_none_is_refused():
    model = stepped()
    ordinary = {name: torch.zeros_like(gradient) for name, gradient in local_gradients(model).items()}
    for p in model.parameters():
        p.grad.mul_(1e-9)
    with pytest.raises(RuntimeError, match="by inf"):
        check_gradients(model, ordinary, torch.float32)
    for p in model.parameters():
        p.grad.zero_()
    assert check_gradients(model, ordinary, torch.float32) == 0.0


# --- several processes -----------------------------------------------------------------------------------------------


def step_of_shards(group: Any, factors: list[float]) -> tuple[float, str]:
    """The difference where each process's shard of the gradients has grown by its factor, and what is said to it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (group.size(),)))
    model(torch.ones(1, 8)).square().sum().backward()
    ordinary = local_gradients(model)
    assert ordinary["weight"].shape == (8 // group.size(), 8), "this is not a shard"
    for p in model.parameters():
        p.grad.to_local().mul_(1 + factors[group.rank()])
    try:
        return check_gradients(model, ordinary, torch.bfloat16), ""
    except RuntimeError as error:
        return gradient_difference(model, ordinary), str(error)


@pytest.mark.slow
def test_the_difference_of_sharded_gradients_is_that_of_the_whole_model_on_every_process(processes):
    factors = [0.0, 0.03, 0.0, 0.01]
    torch.manual_seed(0)
    whole = nn.Linear(8, 8)
    whole(torch.ones(1, 8)).square().sum().backward()
    grown = torch.tensor(factors).repeat_interleave(2)  # two rows for each process
    ordinary = torch.cat([whole.weight.grad, whole.bias.grad[:, None]], dim=1)
    expected = float((ordinary * grown[:, None]).norm() / ordinary.norm())
    for difference, message in processes.run(4, step_of_shards, factors):
        assert difference == pytest.approx(expected, rel=1e-4) and not message


@pytest.mark.slow
def test_a_fault_of_one_process_is_refused_by_all(processes):
    for difference, message in processes.run(4, step_of_shards, [0.0, 0.0, 0.9, 0.0]):
        assert difference > TOLERANCES[torch.bfloat16].update and "differ from the ordinary ones" in message
