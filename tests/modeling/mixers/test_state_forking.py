"""State forking: every shared prefix is scanned once, and the result is that of whole rows."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prefix_grouper_plugins import PrefixLayout, check_support, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.anatomy import Anatomy
from prefix_grouper_plugins.modeling.mixers import on_rows as mixers
from prefix_grouper_plugins.modeling.mixers import state_forking
from prefix_grouper_plugins.modeling.mixers.state_forking import Scan, scan_of
from tests import tiny
from tests.modeling import families
from tests.modeling.mixers.test_on_rows import small_rows

KINDS = ["qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "mamba2", "falcon_h1", "zamba2", "lfm2"]
WIDTHS, CHUNKS = [1, 2, 4, 6], [1, 2, 5]


def deep_rows():
    """Prompts of 1, 2 and 7 tokens, and rows that fork again and again, after as little as one token."""
    rows = tiny.rows({7: [5, 2], 2: [3, 3], 1: [4, 1]})
    first = rows[0]
    return [*rows, torch.cat([first[:9], first[:3]]), torch.cat([first[:10], first[:2]]), first[:11].clone()]


ROWS = deep_rows()


def built(model_type, dtype=torch.float64):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    model = families.build(model_type).to(dtype)
    report = check_support(model)
    if not any(layer.backend == "state forking" for layer in report.layers):
        assert any("has no seam" in note for note in report.notes)
        pytest.skip(f"not with this transformers: {report.notes}")
    return enable_prefix_grouper(model, self_check=False)


def packed(model, rows):
    layout = PrefixLayout.from_rows(rows)
    return layout.unpack(model(**packed_inputs(layout, layout.pack(rows))).logits[0])


def on_rows(model, rows):
    """By expand, run, collapse."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixers, "why_on_rows", lambda module: "as asked")
        return packed(model, rows)


def single_rows(model, rows):
    return [model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows]


def gradients(model, logits, rows):
    model.zero_grad()
    score = sum(x.log_softmax(-1).gather(-1, row[1:, None]).sum() for x, row in zip(logits, rows, strict=True))
    score.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, got, wanted, rows):
    """Logits, and the gradient of every parameter relative to its largest entry.

    Kernels of transformers compute in float32, in the middle of a float64 model too.
    """
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    expected, found = gradients(model, wanted, rows), gradients(model, got, rows)
    assert found.keys() == expected.keys()
    noise = 1e-6 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        difference = (found[name] - gradient).abs().max()
        assert difference <= 1e-3 * gradient.abs().max().clamp(min=noise), name


# ----------------------------------------------------------------------------------------- the forest, in float64 alone


def recurrence(inputs, initial, forks):
    """Not linear, so that nothing cancels: ``h = tanh(a h + x)``."""
    x, a = inputs
    state = torch.zeros_like(x[:, 0]) if initial is None else initial
    out = []
    for t in range(x.shape[1]):
        state = torch.tanh(a[:, t] * state + x[:, t])
        out.append(state)
    return torch.stack(out, 1), state if forks else None


def layout_of(rows, padding):
    layout = PrefixLayout.from_rows([torch.tensor(row) for row in rows])
    return layout.pad_to(layout.num_tokens + padding)


@given(small_rows, st.integers(0, 3), st.sampled_from(CHUNKS))
@settings(deadline=None)
def test_a_forked_scan_and_its_gradients_are_those_of_each_row(rows, padding, chunk):
    layout = layout_of(rows, padding)
    x, a = (torch.randn(1, layout.num_tokens, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = Scan(layout, chunk).scan(recurrence, (x, a))
    alone = [
        recurrence((x_row[None], a_row[None]), None, False)[0][0]
        for x_row, a_row in zip(layout.unpack(x[0]), layout.unpack(a[0]), strict=True)
        if len(x_row)
    ]
    expected = torch.cat(alone)
    torch.testing.assert_close(torch.cat(layout.unpack(out[0])), expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((torch.cat(layout.unpack(out[0])) * weights).sum(), (x, a))
    wanted = torch.autograd.grad((expected * weights).sum(), (x, a))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@given(small_rows, st.integers(0, 3), st.sampled_from(WIDTHS))
@settings(deadline=None)
def test_a_packed_convolution_and_its_gradients_are_those_of_each_row(rows, padding, width):
    layout = layout_of(rows, padding)
    x = torch.randn(1, layout.num_tokens, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, width, dtype=torch.float64)

    def convolve(x):
        columns = torch.nn.functional.conv1d(x.transpose(1, 2), weight, padding=width - 1, groups=2)
        return columns[..., : x.shape[1]].transpose(1, 2).sin()

    out = torch.cat(layout.unpack(scan_of(layout).convolve(convolve, x, width)[0]))
    expected = torch.cat([convolve(row[None])[0] for row in layout.unpack(x[0]) if len(row)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    weights = torch.randn_like(expected)
    (got,) = torch.autograd.grad((out * weights).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@given(
    st.integers(2, 7),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(CHUNKS),
    st.sampled_from(WIDTHS),
)
@settings(deadline=None)
def test_a_part_that_starts_from_the_state_of_its_prompt_equals_the_whole(prompt, responses, chunk, width):
    whole, given_tokens = PrefixLayout.from_groups([prompt], [responses]), prompt - 1
    front, part = PrefixLayout.from_groups([given_tokens], [[1]]), whole.given(given_tokens)
    front.cache = part.cache = object()
    x, a = (torch.randn(1, whole.num_tokens, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 1, width, dtype=torch.float64)

    def convolve(x):
        columns = torch.nn.functional.conv1d(x.transpose(1, 2), weight, padding=width - 1, groups=2)
        return columns[..., : x.shape[1]].transpose(1, 2).sin()

    def in_two(run, *inputs):
        kept = []
        first = run(front, *(i[:, :given_tokens] for i in inputs), keep=kept.append)
        return torch.cat([first, run(part, *(i[:, given_tokens:] for i in inputs), given=kept[0])], dim=1)

    def scan(layout, *inputs, **states):
        return Scan(layout, chunk).scan(recurrence, inputs, **states)

    def convolution(layout, inputs, **states):
        return Scan(layout, chunk).convolve(convolve, inputs, width, **states)

    for run, inputs in ((scan, (x, a)), (convolution, (x,))):
        found, expected = in_two(run, *inputs), run(whole, *inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
        weights = torch.randn_like(expected)
        got, wanted = (torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_part_with_rows_of_another_prompt_has_no_state_to_start_from():
    layout = PrefixLayout.from_groups([4, 5], [[1, 2], [2, 2]]).given(3)
    with pytest.raises(ValueError, match="give it rows of one prompt"):
        Scan(layout, CHUNKS[0])


@given(small_rows, st.integers(0, 3), st.sampled_from(CHUNKS))
@settings(deadline=None)
def test_nothing_is_padded_beyond_a_chunk_and_no_state_behind_padding_is_used(rows, padding, chunk):
    layout = layout_of(rows, padding)
    forest = Scan(layout, chunk)
    leaves = len(layout.segments) - len({int(parent) for parent in layout.segments[:, 2] if parent >= 0})
    assert layout.num_tokens <= forest.num_scanned <= layout.num_tokens + leaves * (chunk - 1)
    for batch in (b for level in forest.levels for b in level if b.forks):
        assert len(batch.index.unique()) == batch.index.numel()


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("model_type", KINDS)
def test_forking_equals_single_rows_and_whole_rows(model_type):
    model = built(model_type)
    assert_equal(model, packed(model, ROWS), on_rows(model, ROWS), ROWS)
    assert_equal(model, packed(model, ROWS), single_rows(model, ROWS), ROWS)


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1"])
def test_forking_in_float32_equals_single_rows(model_type):
    model = built(model_type, torch.float32)
    assert_equal(model, packed(model, ROWS), single_rows(model, ROWS), ROWS)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_forking_under_checkpointing_equals_single_rows(model_type, reentrant):
    model = built(model_type)
    expected = single_rows(model, ROWS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_equal(model, packed(model, ROWS), expected, ROWS)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_forking_under_autocast_equals_whole_rows(model_type):
    model = built(model_type, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = packed(model, ROWS), on_rows(model, ROWS)
    exact = on_rows(model, ROWS)
    error = max((x - y).abs().max() for x, y in zip(wanted, exact, strict=True))
    assert max((x - y).abs().max() for x, y in zip(got, exact, strict=True)) <= 1.5 * error


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_scan_and_convolution_process_unique_tokens(model_type, monkeypatch):
    namespace = state_forking._raw_forward(Anatomy(built(model_type)).mixers[0][1]).__globals__
    scan = "torch_chunk_gated_delta_rule" if model_type == "qwen3_next" else "mamba2_chunk_scan"
    scanned = []

    def spy(original):
        @functools.wraps(original)
        def call(x, *args, **kwargs):
            scanned.append(x.shape[0] * x.shape[1])
            return original(x, *args, **kwargs)

        return call

    monkeypatch.setitem(namespace, scan, spy(namespace[scan]))
    model = built(model_type)  # before 5.23 a mixer keeps the function that it found when it was made
    layers = len(Anatomy(model).mixers)

    rows = tiny.rows({30: [8, 8, 8, 8], 17: [8, 8]})
    layout = PrefixLayout.from_rows(rows)
    assert layout.num_tokens == 29 + 16 + 6 * 8
    packed(model, rows)
    assert sum(scanned) == layers * layout.num_tokens

    scanned.clear()
    on_rows(model, rows)
    assert sum(scanned) == layers * 6 * 37


def test_the_module_and_its_code_stay_as_they_are():
    model = built("qwen3_next")
    mixer = Anatomy(model).mixers[0][1]
    code = state_forking._raw_forward(mixer)
    before, namespace = dict(vars(mixer)), dict(code.__globals__)
    expected = single_rows(model, ROWS)
    packed(model, ROWS)
    assert vars(mixer) == before and code.__globals__ == namespace
    for got, wanted in zip(single_rows(model, ROWS), expected, strict=True):
        assert torch.equal(got, wanted)


def test_lora_around_the_scan_gets_the_gradients_of_single_rows():
    peft = pytest.importorskip("peft")
    targets = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(built("qwen3_next"), config)
    assert_equal(model, packed(model, ROWS), single_rows(model, ROWS), ROWS)


# --------------------------------------------------------------------------------------------- where it is not possible


def test_a_kernel_that_drops_the_state_is_not_forked(monkeypatch):
    """transformers hands a kernel only the keywords that it knows, so this would go wrong silently."""
    model = built("qwen3_next")
    mixer = Anatomy(model).mixers[0][1]
    code = state_forking._raw_forward(mixer)
    used_globals, _ = state_forking._names(code)
    name = "torch_chunk_gated_delta_rule"
    original = state_forking._original(mixer, code, name if name in used_globals else "chunk_gated_delta_rule")
    applicable_params = ("query", "key", "value", "g", "beta", "output_final_state")

    @functools.wraps(original)
    def stateless(query, key, value, **kwargs):
        return original(query, key, value, **{k: v for k, v in kwargs.items() if k in applicable_params})

    monkeypatch.setattr(state_forking, "_original", lambda *args: stateless)
    report = check_support(model)
    assert report.supported
    assert {layer.backend for layer in report.layers} == {"expand, run, collapse", "merged_lse"}
    (note,) = report.notes
    assert "takes no initial_state" in note and "once for each row" in note


def test_what_a_kernel_takes_is_looked_up_once_for_each_kernel_and_a_new_one_is_seen(monkeypatch):
    model = built("qwen3_next")
    packed(model, ROWS)
    looked_up = state_forking._taken_by.cache_info().misses
    packed(model, ROWS)
    assert state_forking._taken_by.cache_info().misses == looked_up

    def stateless(query, key, value, *, g, beta):
        raise AssertionError

    monkeypatch.setattr(state_forking, "_original", lambda *args: stateless)
    assert None not in {mixers.why_on_rows(mixer) for _, mixer in Anatomy(model).mixers}


def test_offloaded_parts_are_not_forked():
    model = built("qwen3_next")
    for _, mixer in Anatomy(model).mixers:
        mixer.conv1d._hf_hook = object()  # as accelerate.hooks.add_hook_to_module does
    (note,) = check_support(model).notes
    assert "offloading" in note
    for _, mixer in Anatomy(model).mixers:
        del mixer.conv1d._hf_hook


def test_code_that_cannot_be_taken_apart_runs_on_whole_rows(monkeypatch):
    model = built("qwen3_next")
    monkeypatch.setattr(state_forking, "_names", lambda code: (frozenset(), frozenset()))
    calls = []
    original = mixers.expand_run_collapse
    monkeypatch.setattr(mixers, "expand_run_collapse", lambda *args: calls.append(args) or original(*args))
    (note,) = check_support(model).notes
    assert "has no seam" in note
    assert_equal(model, packed(model, ROWS), single_rows(model, ROWS), ROWS)
    assert len(calls) == len(Anatomy(model).mixers)


# -------------------------------------------------------------------------------------------- planted faults are noticed


def assert_noticed(model_type):
    model = built(model_type)
    with pytest.raises(AssertionError):
        assert_equal(model, packed(model, ROWS), single_rows(model, ROWS), ROWS)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_the_state_of_another_branch_is_noticed(model_type, monkeypatch):
    original = Scan._batch

    def wrong(self, segments, state_of, forks):
        return original(self, segments, {s: len(state_of) - 1 - row for s, row in state_of.items()}, forks)

    monkeypatch.setattr(Scan, "_batch", wrong)
    assert_noticed(model_type)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_a_convolution_that_starts_anew_is_noticed(model_type, monkeypatch):
    monkeypatch.setattr(Scan, "_path", lambda self, segment, count: iter([-1] * count))
    assert_noticed(model_type)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_a_state_that_passes_no_gradient_is_noticed(model_type, monkeypatch):
    original = Scan.scan

    def cut(self, run, inputs):
        return original(self, lambda x, state, forks: run(x, None if state is None else state.detach(), forks), inputs)

    monkeypatch.setattr(Scan, "scan", cut)
    assert_noticed(model_type)


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_a_state_behind_padding_is_noticed(model_type, monkeypatch):
    original = state_forking._batches

    def careless(members, spans, chunk):
        batches = original(members, spans, chunk)
        merged = [s for segments, forks in batches if forks for s in segments]
        leaves = [batch for batch in batches if not batch[1]]
        return ([(merged, True)] if merged else []) + leaves

    monkeypatch.setattr(state_forking, "_batches", careless)
    assert_noticed(model_type)
