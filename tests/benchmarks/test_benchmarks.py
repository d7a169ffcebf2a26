"""The benchmarks run, compare like with like, write down where figures come from, and met the project's targets."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import actor_update
import attention
import flops
import growth
import learning
import methods
import models
import pairs
import plan_check
import plot
import prompt_reuse
import pytest
import torch
import training
from harness import RESULTS, read_csv, read_facts

from prefix_grouper_plugins import bench, shared_prefix_attention, update_bench
from tests.processes import run_in_fork

ROOT = Path(__file__).parents[2]

SCRIPTS = (
    "actor_update",
    "attention",
    "flops",
    "growth",
    "learning",
    "pairs",
    "plan_check",
    "plot",
    "recipes",
    "training",
    "demos",
)
CASE = bench.Case(12, 5, 3, 4, 2, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def threads() -> Any:
    """The scripts set the number of threads, which belongs to the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_how_to_run_a_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(["--help"])
    assert stopped.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ like with like


def rows_of(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """For each row of `CASE` query, key or value of its tokens; prompts equal."""
    prompt, *responses = values
    return [torch.cat([prompt, response]) for response in responses]


def outputs_and_gradients(name: str, tensors: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Of the method, on the responses' tokens (less the last, which the packed row does without), and of the keys."""
    leaves = [[x.clone().requires_grad_() for x in parts] for parts in tensors]
    layout, prompt, response = CASE.layout, CASE.prompt, CASE.response
    if name == "published":
        out = methods.published(CASE)(*(torch.cat(parts) for parts in leaves))
        found = [x[:-1] for x in out[prompt:].split(response)]
    else:
        packed = [layout.pack(rows_of(parts)) for parts in leaves]
        function = (
            (lambda q, k, v: shared_prefix_attention(q, k, v, layout)) if name == "ours" else methods.OTHERS[name](CASE)
        )
        found = [x[prompt:] for x in layout.unpack(function(*packed))]
    total = sum((x * torch.arange(x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in found)
    total.backward()  # type: ignore[union-attr]
    return [*found, *(x.grad for parts in leaves for x in parts)]  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["published", "gathered", "dense_mask"])
def test_the_methods_compute_the_same_attention_as_ours(name: str) -> None:
    torch.manual_seed(0)
    sizes = [CASE.prompt] + [CASE.response] * CASE.group
    tensors = [[torch.randn(n, heads, 8, dtype=torch.float64) for n in sizes] for heads in (4, 2, 2)]
    for ours, theirs in zip(*(outputs_and_gradients(n, tensors) for n in ("ours", name)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class EmulatedFlashAttention3:
    """`flash_attn_varlen_func` by plain products: causal, the last query of each entry seeing its last key."""

    @staticmethod
    def flash_attn_varlen_func(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, *_: Any, **options: Any) -> torch.Tensor:
        assert options["causal"]
        lengths = [x.diff().tolist() for x in (cu_q, cu_k, cu_k)]
        parts = zip(*(x.split(n) for x, n in zip((q, k, v), lengths, strict=True)), strict=True)
        out = []
        for row in parts:
            query, key, value = (x.transpose(0, 1)[None] for x in row)
            mask = methods._bottom_right(query.shape[2], key.shape[2], "cpu")
            out.append(methods._sdpa(query, key, value, mask)[0].transpose(0, 1))
        return torch.cat(out)


def test_trls_tree_attention_is_called_on_the_same_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    monkeypatch.setattr(packing, "_flash_attn", EmulatedFlashAttention3)
    tensors = CASE.inputs(CASE.layout.num_tokens)
    expected = shared_prefix_attention(*tensors, CASE.layout)
    torch.testing.assert_close(methods.tree_attention(CASE)(*tensors), expected)


@pytest.mark.parametrize("name", ["rows", "ours:auto", "gathered", "dense_mask"])
def test_the_steps_for_a_gpu_have_shapes_that_fit(name: str) -> None:
    """On the meta device, where the branches for a GPU are taken and nothing is computed."""
    case = dataclasses.replace(CASE, device="meta", dtype=torch.bfloat16)
    steps = {"rows": lambda: bench.row_step(case), "ours:auto": lambda: bench.shared_step(case)}
    steps.get(name, lambda: methods.other_step(name, case))()()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_part_says_so() -> None:
    for script in (attention, growth, actor_update):
        with pytest.raises(SystemExit, match=r"--device cuda: torch .* sees no GPU on this machine"):
            script.main(["--device", "cuda"])


def test_row_by_row_attention_is_causal_attention_over_each_row() -> None:
    lengths = [7, 3]
    query, key, value = CASE.inputs(10)
    out = bench._row_by_row(query, key, value, lengths)
    for row, q, k, v in zip(*(x.split(lengths) for x in (out, query, key, value)), strict=True):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -math.inf)
        torch.testing.assert_close(row, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))


def test_trainings_of_the_benchmark_learn_the_same_weights() -> None:
    _, stock = training.run("stock", 24, 4, 4, 2)
    for way in training.WAYS[1:]:
        _, weights = training.run(way, 24, 4, 4, 2)
        assert max(float((weights[name] - stock[name]).abs().max()) for name in stock) <= 5e-5  # float32, Adam


def test_pairs_measures_what_learns_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "CASES", pairs.CASES[:1])
    pairs.main(["--sizes", "24", "4", "--steps", "1", "--repeats", "1", "--output", str(tmp_path / "pairs.csv")])
    (row,) = read_csv(tmp_path / "pairs.csv")
    assert float(row["token_ratio"]) == pytest.approx((24 + 2 * 5) / (2 * 29), abs=0.03)  # TRL adds the end of text
    assert float(row["difference"]) <= 5e-5  # float32, Adam


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_all_ways_of_an_actor_update_give_the_same_log_probs_and_gradients(lora: bool) -> None:
    torch.manual_seed(0)
    model = actor_update.make_model("tiny", None, lora, "cpu")
    batch = actor_update.make_batch((24, 6, 3), 256, "cpu")
    expected: list[torch.Tensor] = []
    for way in ("stock", "published", "ours"):
        actor_update.prepare(model, way)
        logps = actor_update.WAYS[way](model, batch)
        logps.sum().backward()
        found = [logps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        expected = expected or found
        assert len(found) == len(expected) > 3
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_ordinary_packed_update_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = actor_update.make_model("tiny", None, False, "cpu")
    batch = actor_update.make_batch((24, 6, 3), 256, "cpu")
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))  # type: ignore[operator]
    for way in ("rows", "ours"):
        actor_update.prepare(model, way)
        actor_update.WAYS[way](model, batch)
    assert seen == [3 * 29, 23 + 3 * 6]


# ------------------------------------------------------------------------------------------------------------- running


def test_attention_measures_each_method_and_says_where_the_figures_come_from(tmp_path: Path) -> None:
    output = tmp_path / "attention.csv"
    attention.main(["--cases", "40,8,3", "--repeats", "1", "--seconds", "0", "--output", str(output)])
    rows = {row["method"]: row for row in read_csv(output)}
    assert {"rows", "ours:auto", "ours:blockwise", "published", "gathered", "dense_mask"} <= rows.keys()
    assert float(rows["rows"]["times_as_fast_as_rows"]) == 1
    assert all(float(row["seconds"]) > 0 for row in rows.values())
    facts = read_facts(output)
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__
    assert {"command", "machine", "triton", "transformers", "date", "note"} <= facts.keys()


def test_a_method_that_cannot_run_is_named_with_those_that_can() -> None:
    with pytest.raises(SystemExit, match="tree_attention cannot run here; there are rows, ours:auto"):
        attention.makers(CASE, ["tree_attention"])


def test_peak_memory_is_that_of_the_step() -> None:
    step = "lambda: torch.ones(32 * 2**20, dtype=torch.float32).add_(1).sum().item()"  # 128 MiB
    command = f"import torch, harness; print(harness.peak_mib(lambda: {step}, 'cpu'))"
    done = run_in_fork("-c", command, cwd=Path(attention.__file__).parent)
    assert 120 < float(done.stdout) < 200, done.stderr


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    """The rows of the case hold 4 x 1,088 tokens; query, output and their gradients alone take 34 MiB."""
    assert 30 < attention.memory_of("rows", (1024, 64, 4)) < 120


def test_on_a_gpu_what_does_not_fit_leaves_the_other_methods_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """`published` does not fit alone, `gathered` not beside the inputs of the others, and `dense_mask` breaks down."""
    real = attention.time_all

    def peak(make: Callable[[], Any], device: str) -> float:
        step = make()
        if "published" in step.__qualname__:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "dense_mask" in step.__qualname__:
            raise RuntimeError("no valid execution plans")
        return 7.0 + ("gathered" in step.__qualname__)

    def time_all(case: Any, found: dict[str, Any], args: Any) -> Any:
        if "gathered" in found:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(case, found, args)

    def step(name: str, case: bench.Case) -> bench.Step:
        run = methods.other_step(name, case)
        return with_name(lambda: run(), name)

    def with_name(run: Any, name: str) -> Any:
        run.__qualname__ = name
        return run

    monkeypatch.setattr(attention, "case_of", lambda sizes, device: bench.Case(*sizes))
    monkeypatch.setattr(attention, "other_step", step)
    monkeypatch.setattr(attention, "peak_mib", peak)
    monkeypatch.setattr(attention, "time_all", time_all)
    args = attention.parse_arguments(["--device", "cuda", "--repeats", "1", "--seconds", "0"])
    args.device = "cuda"
    monkeypatch.setattr(attention, "take_turns", lambda steps, device, **o: bench.take_turns(steps, device="cpu", **o))
    rows = {row["method"]: row for row in attention.measure((40, 8, 3), args)}
    assert rows["published"]["peak_mib"] == rows["published"]["seconds"] == rows["gathered"]["seconds"] == "nan"
    assert rows["dense_mask"]["seconds"] == "nan"
    assert rows["gathered"]["peak_mib"] == "8" and rows["gathered"]["turns"] == 0
    assert float(rows["ours:auto"]["seconds"]) > 0 and rows["ours:auto"]["peak_mib"] == "7"
    assert float(rows["rows"]["times_as_fast_as_rows"]) == 1


def test_an_error_of_ours_is_no_missing_figure() -> None:
    def broken() -> Any:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        attention.memory_on_gpu("ours:auto", broken, "cuda")


def test_growth_measures_both_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(growth.SETTINGS, "cpu", ((32, 8), ((), 8, 2)))
    output = tmp_path / "growth.csv"
    growth.main(["--groups", "1", "2", "--prompts", "16", "--repeats", "1", "--seconds", "0", "--output", str(output)])  # fmt: skip
    assert [(r["sweep"], r["prompt"], r["group"]) for r in read_csv(output) if r["method"] == "rows"] == [
        ("group", "32", "1"), ("group", "32", "2"), ("prompt", "16", "2")
    ]  # fmt: skip


def test_actor_update_measures_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "update.csv"
    small = ["--models", "tiny", "--cases", "24,6,3", "--repeats", "1", "--seconds", "0", "--training", "full"]
    with monkeypatch.context() as patch:
        patch.setattr(actor_update, "in_a_fresh_process", lambda arguments: len(arguments))
        actor_update.main([*small, "--output", str(output)])
    assert [row["way"] for row in read_csv(output)] == ["stock", "rows", "published", "ours"]


def test_actor_update_prints_the_memory_of_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--models", "tiny", "--cases", "64,16,4", "--training", "lora", "--memory-of", "ours"]
    actor_update.main(tiny)
    assert json.loads(capsys.readouterr().out) >= 0


@pytest.mark.parametrize(("prefix", "ratio", "group"), [(4096, 0.5, 2), (16384, 32, 16)])
def test_counted_flops_of_the_papers_grid_are_those_of_the_formula(prefix: int, ratio: float, group: int) -> None:
    cell = flops.cell(flops.shape_of("qwen2.5-7b"), prefix, ratio, group)
    assert abs(float(cell["error"])) < flops.TOLERANCE
    assert float(cell["rows_tflops"]) == pytest.approx(float(cell["formula_rows_tflops"]), rel=1e-5)
    # The published pass has one token more, and as many visible pairs but for that token's.
    assert float(cell["published_tflops"]) == pytest.approx(float(cell["ours_tflops"]), rel=1e-3)
    assert float(cell["ours_kept_gib"]) < float(cell["published_kept_gib"]) < float(cell["rows_kept_gib"])


def test_a_count_that_is_not_the_formulas_stops_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match="1 of 1 counts are further"):
        flops.main(["--model", "tiny", "--prefixes", "64", "--ratios", "2", "--groups", "2", "--output", str(tmp_path / "f.csv")])  # fmt: skip


# ------------------------------------------------------------------------------------------------- what was written down


MEASURED = sorted(path for path in RESULTS.glob("*.csv") if path.read_text().startswith("# command: "))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_a_file_of_results_names_its_command_machine_versions_and_date(path: Path) -> None:
    facts = read_facts(path)
    assert all(facts[name] for name in ("command", "machine", "torch", "transformers", "date", "note"))
    program, what = facts["command"].split()[:2]
    if program == "make":
        assert f"\n{what}:" in (ROOT / "Makefile").read_text()
    else:
        assert (ROOT / what).is_file()


def test_the_pictures_can_be_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    plot.draw_attention(read_csv(RESULTS / "attention-cpu.csv"), "cpu")
    plot.draw_growth(read_csv(RESULTS / "growth-cpu.csv"), "cpu")
    plot.draw_memory([row for row in read_csv(RESULTS / "flops.csv") if row["ratio"] == "8"])
    assert {path.name for path in tmp_path.iterdir()} == {"attention-cpu.png", "growth-cpu.png", "paper-memory.png"}


def test_a_method_without_memory_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    case = {"prompt": "8", "response": "8", "group": "2", "pair_ratio": "1.5", "peak_mib": "nan"}
    lines = [
        {**case, "method": "rows", "seconds": "nan", "times_as_fast_as_rows": "nan"},
        {**case, "method": "ours:auto", "seconds": "0.5", "times_as_fast_as_rows": "nan"},
    ]
    plot.draw_attention(lines, "cuda")
    assert plot.attention_table(lines).splitlines()[-1] == "| 8, 8, 2 | 1.50 | did not run | - |"


def test_counts_over_the_whole_grid_were_those_of_the_formula() -> None:
    rows = read_csv(RESULTS / "flops.csv")
    assert len(rows) == 3 * 7 * 4
    assert all(abs(float(row["error"])) < 0.02 for row in rows)


def measured(case: tuple[int, int, int], method: str) -> dict[str, str]:
    wanted = tuple(map(str, case))
    (row,) = [
        row
        for row in read_csv(RESULTS / "attention-cpu.csv")
        if (row["prompt"], row["response"], row["group"]) == wanted and row["method"] == method
    ]
    return row


@pytest.mark.parametrize("case", [(1024, 128, 8), (4096, 128, 8), (4096, 128, 16), (4096, 512, 8)])
def test_measured_attention_was_as_fast_as_the_ratio_of_visible_pairs_lets_it_be(case: tuple[int, int, int]) -> None:
    row = measured(case, "ours:auto")
    assert float(row["times_as_fast_as_rows"]) >= 0.95 * float(row["pair_ratio"])


def test_measured_attention_was_never_slower_where_nothing_can_be_gained() -> None:
    assert float(measured((64, 512, 8), "ours:auto")["times_as_fast_as_rows"]) >= 1


def test_measured_memory_was_about_half_of_the_published_packages() -> None:
    case = (4096, 128, 16)
    assert float(measured(case, "ours:auto")["peak_mib"]) <= float(measured(case, "published")["peak_mib"]) / 1.9


# ---------------------------------------------------------------------------------------------------------------- plan


def test_both_ways_of_a_timed_update_have_the_same_gradients() -> None:
    """Micro-batches of 1 of 4 rows: the prompt is reused. Responses of several lengths: stock pads."""
    case = plan_check.CASES["tiny"]
    assert len(plan_check.update_of(case, "cpu").forwards) == 4
    model = plan_check.make_model(case, "cpu")
    found = {}
    update = plan_check.update_of(case, "cpu")
    for head in (update_bench.chunked_head, plan_check.fused_head):
        for way, step in update_bench.steps_of(model, update, zero_grad=False, head=head).items():
            model.zero_grad()
            step()
            found[head, way] = [weight.grad.clone() for weight in model.parameters()]
    first, *others = found.values()
    for gradients in others:
        for gradient, wanted in zip(gradients, first, strict=True):
            assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert any(gradient.abs().max() > 1e-3 for gradient in first)


def test_plan_is_compared_with_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_check, "memory", lambda case, way, device: 1.0)
    monkeypatch.setattr(plan_check, "speed", plan_check.times_as_fast_in_turns)  # without the seconds of a new process
    plan_check.main(["--cases", "tiny", "--repeats", "1", "--output", str(tmp_path / "check.csv")])
    (row,) = read_csv(tmp_path / "check.csv")
    assert float(row["times_as_fast_estimated"]) > 1 and row["shared_peak_mib_measured"] == "1"
    assert row["token_ratio_estimated"] == row["token_ratio_measured"] < "0.9"
    assert plot.plan_table([row]).count("|") == 3 * 7


@pytest.mark.parametrize("rows", [1, 2, 3], ids=["the prompt stays open", "one forward", "a part of a micro-batch"])
def test_all_ways_of_an_update_in_micro_batches_have_the_same_gradients(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_reuse, "SHAPE", models.TINY)
    monkeypatch.setattr(prompt_reuse, "build", lambda *args: keep(models.build(*args)))
    built: list[Any] = []

    def keep(model: Any) -> Any:
        built.append(model)
        return model

    for way in prompt_reuse.WAYS:
        prompt_reuse.step_of(way, 20, 4, 8, rows)()
    expected, *others = ([weight.grad for weight in model.parameters()] for model in built)
    for found in others:
        for mine, own in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def test_updates_by_the_size_of_a_micro_batch_are_drawn_and_tabulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock is left out where a group is large."""
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    sizes = [("1024", "64", "8", "1"), ("1024", "64", "8", "2"), ("1024", "64", "16", "2")]
    rows = [
        dict(zip(("prompt", "response", "group", "rows"), size, strict=True), way=way, seconds="1.5", peak_mib="100")
        for size in sizes
        for way in ("stock", "packed", "reused")
        if not (way == "stock" and size[2] == "16")
    ]
    plot.draw_reuse(rows)
    assert (tmp_path / "prompt-reuse-cpu.png").stat().st_size > 5_000
    assert (
        plot.reuse_table(rows).splitlines()[-1] == "| 1024, 64, 16 | 2 | - | 1.5 s, 100 MiB | 1.5 s, 100 MiB | - | - |"
    )


CHECKED = read_csv(RESULTS / "plan-check-cpu.csv") if (RESULTS / "plan-check-cpu.csv").exists() else []


@pytest.mark.parametrize("row", CHECKED, ids=[row["case"] for row in CHECKED])
def test_estimates_of_plan_were_within_15_percent_of_what_was_measured(row: dict[str, str]) -> None:
    errors = {name: float(value) for name, value in row.items() if name.endswith("_error_percent")}
    assert len(errors) == 3 and max(map(abs, errors.values())) <= 15, errors


def test_the_learning_curves_of_the_docs_are_those_of_their_file() -> None:
    rows = read_csv(RESULTS / "learning-cpu.csv")
    assert learning.table(rows) in (ROOT / "docs" / "trust.md").read_text()
    for task, dtype in learning.cases(rows):  # a training that learns nothing would be equal to anything
        first = float(rows[0]["reward"])
        assert learning.final(rows, "stock", task, dtype) > 2 * first, (task, dtype)


def test_a_learning_run_goes_on_where_its_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def train(task: str, dtype: str, seed: int, run: str, steps: int) -> list[dict[str, Any]]:
        made.append(run)
        head = {"task": task, "dtype": dtype, "seed": seed, "run": run}
        return [{**head, "step": step, "reward": step / 100 + 0.1 * (run == "shared"), "kl": 0.0} for step in (5, 10)]

    monkeypatch.setattr(learning, "train", train)
    options = ["--tasks", "copy", "--dtypes", "float32", "--output", str(tmp_path / "a.csv")]
    for seeds, runs in ((1, 3), (1, 0), (2, 3)):
        made.clear()
        assert learning.main([*options, "--seeds", str(seeds), "--picture", str(tmp_path / "a.png")]) == 1
        assert len(made) == runs
    rows = read_csv(tmp_path / "a.csv")
    assert learning.distance(rows, "reward", "shared", "copy", "float32") == pytest.approx(0.1)
    assert learning.distance(rows, "reward", "stock, other order", "copy", "float32") == 0
    swapped = [
        {**row, "run": {"shared": learning.RUNS[2], learning.RUNS[2]: "shared"}.get(row["run"], "stock")}
        for row in rows
    ]
    assert learning.as_near(swapped, "copy", "float32") and not learning.as_near(rows, "copy", "float32")
