"""`prefix-grouper plan DATA`, from its options to what it prints and draws."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_grouper_plugins import cli
from prefix_grouper_plugins.plan.estimate import step_speedups
from tests import tiny

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts of 60 to 75 words, and samples of responses."""
    folder = tmp_path_factory.mktemp("plan")
    tiny.saved_model(folder / "model", max_position_embeddings=4096)
    rows = [{"prompt": " ".join(tiny.WORDS[3 + (i + k) % 20] for k in range(60 + i))} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lengths.txt").write_text("4 8 12")
    return folder


def plan(capsys: Any, folder: Path, *options: str) -> dict[str, Any]:
    command = ["plan", str(folder / "prompts.jsonl"), "--model", str(folder / "model"), *options, "--json"]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_of_a_training(capsys: Any, folder: Path) -> None:
    found = plan(capsys, folder, "--responses", "10", "--group", "4", "--batch-size", "2", "--accumulation", "4")
    prompts = range(60, 76)
    assert found["token_ratio"] == sum(p - 1 + 40 for p in prompts) / sum(4 * (p + 10) for p in prompts)
    assert found["prompts"]["count"] == 16 and found["prompts"]["limit"] is None
    assert (found["prompts"]["min"], found["prompts"]["max"], found["prompts"]["mean"]) == (60, 75, 67.5)
    assert sum(bar[2] for bar in found["prompts"]["histogram"]) == 16
    assert found["tokenizer"] == str(folder / "model")
    assert found["tokens_per_step"]["rows"] == sum(4 * (p + 10) for p in prompts) / 8  # 64 rows, 8 to a step
    assert 2 < found["update_speedup"] < found["tokens_per_step"]["stock"] / found["tokens_per_step"]["shared"] + 0.5
    shares = {x["outside_share"]: x["times_as_fast"] for x in found["step_speedup"]}
    assert shares == step_speedups(found["passes_speedup"])


def test_the_static_memory_is_that_of_the_real_weights(capsys: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    weights = sum(x.numel() for x in model.parameters())
    found = plan(capsys, folder, "--responses", "10", "--batch-size", "8")
    assert found["peak_bytes"]["static"] == weights * (2 + 2 + 4)  # weight, gradient, two states of AdamW
    assert found["peak_bytes"]["stock"] > found["peak_bytes"]["shared"] > found["peak_bytes"]["static"]
    lora = plan(capsys, folder, "--responses", "10", "--batch-size", "8", "--lora-rank", "1")
    assert lora["peak_bytes"]["static"] < 0.4 * found["peak_bytes"]["static"]
    checkpointed = plan(capsys, folder, "--responses", "10", "--batch-size", "8", "--checkpointing")
    assert checkpointed["peak_bytes"]["stock"] < found["peak_bytes"]["stock"]


def test_the_largest_group_fits_and_one_more_row_does_not(capsys: Any, folder: Path) -> None:
    memory = 1.5e-2
    found = plan(capsys, folder, "--responses", "10", "--memory", str(memory))
    largest = found["largest_group"]
    assert 0 < largest["stock"] < largest["shared"] < largest["searched_up_to"]
    for rows, fits in ((largest["shared"], True), (largest["shared"] + 1, False)):
        options = ["--responses", "10", "--group", str(rows), "--batch-size", str(rows)]
        assert (plan(capsys, folder, *options)["peak_bytes"]["shared"] <= memory * GIB) is fits


def test_the_advised_settings_give_what_they_promise(capsys: Any, folder: Path) -> None:
    """Micro-batches of one row and two accumulated reuse little; the same rows as whole groups share all."""
    options = ["--responses", "10", "--group", "4", "--processes", "2"]
    found = plan(capsys, folder, *options, "--batch-size", "1", "--accumulation", "4", "--memory", "1")
    advice = found["settings"]["trl"]
    assert advice["fits"]
    settings = advice["settings"]
    again = plan(
        capsys, folder, *options,
        "--batch-size", str(settings["per_device_train_batch_size"]),
        "--accumulation", str(settings["gradient_accumulation_steps"]),
    )  # fmt: skip
    assert again["token_ratio"] == advice["token_ratio"] <= found["token_ratio"]
    assert again["peak_bytes"]["shared"] == advice["peak_bytes"]
    verl = found["settings"]["verl"]["settings"]
    assert verl["actor.ppo_max_token_len_per_gpu"] >= 75 + 4 * 10 - 1
    tight = plan(capsys, folder, *options, "--batch-size", "4", "--memory", "1e-6")["settings"]
    assert not tight["trl"]["fits"] and not tight["verl"]["fits"]


def test_verl_is_planned_by_its_own_names(capsys: Any, folder: Path) -> None:
    options = ["--responses", "10", "--trainer", "verl", "--group", "4", "--mini-batch", "8"]
    assert cli.main(["plan", str(folder / "prompts.jsonl"), *options, "--batch-size", "2"]) == 0
    assert "Assumed: FSDP2 (not FSDP1) without Ulysses" in capsys.readouterr().out
    by_rows = plan(capsys, folder, *options, "--batch-size", "2")
    by_tokens = plan(capsys, folder, *options, "--max-token-len", "400")
    assert by_tokens["token_ratio"] == by_rows["token_ratio"] < 1  # parts of a group reuse its prompt
    assert by_rows["tokens_per_step"]["stock"] == by_rows["tokens_per_step"]["rows"]  # verl does not pad


@pytest.mark.parametrize("with_rich", [True, False], ids=["rich", "plain"])
def test_what_is_printed_and_drawn(capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    find = importlib.util.find_spec
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *args: None if name == "rich" else find(name, *args)
        )
    data, picture = str(folder / "prompts.jsonl"), folder / "plan.png"
    options = ["--responses", str(folder / "lengths.txt"), "--memory", "40", "--limit", "12", "--lora-rank", "8"]
    if not with_rich:
        pytest.importorskip("matplotlib")
        options += ["--plot", str(picture)]
    assert cli.main(["plan", data, *options]) == 0
    printed = capsys.readouterr().out
    assert "12 prompts (the first 12; --limit 0 reads all), tokens estimated as words between spaces" in printed
    assert "█" in printed and "Token ratio 0." in printed and "The largest group in one micro-batch" in printed
    assert "per_device_train_batch_size=8" in printed and "actor.ppo_max_token_len_per_gpu=256" in printed
    assert "Assumed: one process or several with DDP or, for text, FSDP2 (not FSDP1 or DeepSpeed)" in printed
    assert with_rich or picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "8", "--responses", "4", "--memory", "80"], "--memory goes with DATA"),
        (["--prompt", "8", "--responses", "a.txt"], "--responses a.txt: with --prompt give numbers of tokens"),
        (["{}", "--prompt", "8", "--responses", "4"], "give one of them"),
        (["{}"], "the following arguments are required: --responses"),
        (["{}", "--responses", "4", "--mini-batch", "8"], "--mini-batch is no option of --trainer trl"),
        (["{}", "--responses", "4", "--trainer", "verl", "--accumulation", "8"], "--accumulation is no option of --trainer verl"),
        (["{}", "--responses", "4", "--trainer", "verl", "--batch-size", "8", "--max-token-len", "9"], "give one"),
        (["{}", "--responses", "4", "--batch-size", "3"], "no multiple of --group 8"),
        (["{}", "--responses", "4", "--batch-size", "8", "--accumulation", "32"], "16 prompt(s) were read"),
        (["{}", "--responses", "4", "--memory", "-1"], "'-1' is not a number above 0"),
        (["{}", "--responses", "4", "--outside-share", "1"], "'1' is not a share below 1"),
        (["{}", "--responses", "4", "--tokenizer", "no/such"], "--tokenizer no/such: it cannot be read"),
        (["{}", "--responses", "4", "--plot", "no/such/a.png"], "--plot no/such/a.png: it cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(capsys: Any, folder: Path, options: list[str], message: str) -> None:
    filled = [option.format(folder / "prompts.jsonl") for option in options]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *filled])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
