"""The command `prefix-grouper`, from its help to its plain errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, T5Config

from prefix_grouper_plugins import __version__, cli
from prefix_grouper_plugins.attention.backends import merged_lse
from prefix_grouper_plugins.attention.registry import BACKEND_VARIABLE
from tests import tiny
from tests.modeling import multimodal_families


def test_the_installed_command_shows_its_subcommands():
    command = Path(sys.executable).with_name("prefix-grouper")
    if not command.exists():
        pytest.skip("the package is on the path but not installed")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert result.returncode == 0, result.stderr
    assert "--use_prefix_grouper" in result.stdout and "doctor" in result.stdout


def test_without_a_subcommand_it_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "{trl,doctor,plan,bench}" in capsys.readouterr().err


def test_doctor_tells_versions_and_backends(capsys):
    cli.main(["doctor"])
    output = capsys.readouterr().out
    versions = dict(line.split() for line in output.split("\n\n")[0].splitlines() if "not installed" not in line)
    assert versions["prefix-grouper-plugins"] == __version__
    assert {"torch", "transformers"} <= versions.keys()
    lines = [
        " ".join(line.split()) for line in output.split("attention on cpu, float32")[1].split("\n\n")[0].splitlines()
    ]
    assert "merged_lse causal yes" in lines and "blockwise all layers yes" in lines
    assert "merged_lse softcap no: softcap=50.0 is not a feature of the flash ops of torch" in lines
    assert "flex all layers no: FlexAttention has no backward on the CPU" in lines


def test_columns_of_doctor_do_not_run_into_each_other(monkeypatch, tmp_path, capsys):
    long = "a kind of attention with a description of more than forty characters"
    monkeypatch.setattr(cli, "backend_answers", lambda *_: {"flex": {None: long, "it is not here": "all layers"}})
    cli.main(["doctor", "--model", tiny.saved_model(tmp_path, "llama")])
    output = capsys.readouterr().out
    assert f"  flex            {long}  yes\n" in output and "all layers  " in output
    (answer,) = (line for line in output.splitlines() if "it is not here" in line)
    assert answer.index("no: it") == output.splitlines()[output.splitlines().index(answer) - 1].index("yes")


def test_doctor_names_the_head_dims_where_answers_differ(monkeypatch):
    """A GPU of which only the kernels for narrow heads fit."""
    monkeypatch.setattr(merged_lse, "why_not_flash", lambda device, dim: None if dim <= 192 else f"{dim} is too wide")
    answers = cli.backend_answers("cuda", torch.bfloat16)["merged_lse"]
    assert answers[None] == "causal with head dim 64, 80, 96, 128"
    assert answers["256 is too wide"] == "causal with head dim 256"


def test_doctor_says_that_the_environment_wins(monkeypatch, tmp_path, capsys):
    path = tiny.saved_model(tmp_path, "gemma2")
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    cli.main(["doctor", "--model", path])
    output = capsys.readouterr().out
    assert "PREFIX_GROUPER_BACKEND=blockwise wins over auto" in output
    assert output.count(" blockwise\n") == 3  # as the backend of each layer


def test_doctor_says_which_layers_a_forced_backend_cannot_run(monkeypatch, tmp_path, capsys):
    path = tiny.saved_model(tmp_path, "mistral", sliding_window=5)
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "merged_lse")
    cli.main(["doctor", "--model", path])
    message = "none: PREFIX_GROUPER_BACKEND='merged_lse' cannot run this call: sliding_window=5 hides keys of the rows"
    assert message in capsys.readouterr().out


def test_doctor_says_how_each_layer_of_a_model_would_be_run(tmp_path, capsys):
    path = tiny.saved_model(
        tmp_path, "gpt_oss", sliding_window=5, num_local_experts=4, layer_types=["full_attention"] + ["sliding_attention"] * 2
    )  # fmt: skip
    cli.main(["doctor", "--model", path])
    lines = capsys.readouterr().out.split("(gpt_oss): ")[1].splitlines()
    assert lines[0] == "supported"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "model.layers.0.self_attn causal, sinks merged_lse",
        "model.layers.1.self_attn sliding window of 5, sinks blockwise",
        "model.layers.2.self_attn sliding window of 5, sinks blockwise",
    ]


def test_doctor_shows_the_text_part_of_a_vision_language_model(tmp_path, capsys):
    multimodal_families.build("qwen2_5_vl").config.save_pretrained(tmp_path)
    cli.main(["doctor", "--model", str(tmp_path)])
    lines = capsys.readouterr().out.split("(qwen2_5_vl): ")[1].splitlines()
    assert lines[0] == "supported"
    assert [line.split()[0] for line in lines[1:]] == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]


def test_doctor_says_why_a_model_is_refused(tmp_path, capsys):
    tiny.model("qwen3", attention_dropout=0.1).config.save_pretrained(tmp_path)
    cli.main(["doctor", "--model", str(tmp_path)])
    output = capsys.readouterr().out
    assert "(qwen3): refused" in output
    assert "attention dropout is 0.1" in output


def test_doctor_refuses_an_encoder_decoder_without_a_traceback(tmp_path, capsys):
    T5Config(num_layers=1).save_pretrained(tmp_path)
    cli.main(["doctor", "--model", str(tmp_path)])
    assert "(t5): refused\n  Unrecognized configuration class" in capsys.readouterr().out


def test_trl_without_a_script_says_what_is_missing(capsys):
    with pytest.raises(
        SystemExit, match=r"prefix-grouper trl: name the script to run, or one of TRL's own: grpo, rloo"
    ):
        cli.main(["trl"])
    assert "--use_prefix_grouper" in capsys.readouterr().out


def test_trl_with_a_script_that_is_not_there_names_it():
    with pytest.raises(SystemExit, match=r"there is no script 'my_script\.py'"):
        cli.main(["trl", "my_script.py", "--use_prefix_grouper"])


def test_trl_without_trl_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "my_script.py").write_text("raise AssertionError")
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setenv("USE_PREFIX_GROUPER", "true")  # taken back afterwards
    with pytest.raises(SystemExit, match=r"trl is not installed: pip install 'prefix-grouper-plugins\[trl\]'"):
        cli.main(["trl", str(tmp_path / "my_script.py"), "--use_prefix_grouper"])


def figures(output: str) -> dict[str, list[str]]:
    """The numbers at the end of each line, by its label."""
    rows = (re.fullmatch(r"(\S.*?|  \S.*?) +((?:[\d,.]+ *){2,3})", line) for line in output.splitlines())
    return {row[1].strip(): row[2].split() for row in rows if row}


def test_plan_tells_tokens_flops_and_memory_of_a_group(capsys):
    cli.main(["plan", "--prompt", "8192", "--responses", "1024", "--group", "8", "--shape", "qwen2.5-7b"])
    output = capsys.readouterr().out
    table = figures(output)
    assert table["Tokens forwarded"] == ["16,383", "73,728", "4.50"]
    # By hand from the paper's formula, see tests/test_cost.py
    assert table["Training step, TFLOP"] == ["815.52", "3,390.73", "4.16"]
    assert table["Keys and values of all layers, GiB"] == ["0.87", "3.94", "4.50"]
    assert "Token ratio 0.222. A training step is at most 4.16 times as fast" in output


def test_plan_takes_a_length_for_each_response_and_the_config_of_a_model(tmp_path, capsys):
    path = tiny.saved_model(tmp_path, "qwen3")
    cli.main(["plan", "--prompt", "10", "--responses", "3", "4", "5", "--model", path])
    output = capsys.readouterr().out
    assert f"{path}, a prompt of 10 tokens, 3 responses of 12 in all" in output
    assert figures(output)["Tokens forwarded"] == ["21", "42", "2.00"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-9"], "there is no shape 'gpt-9': choose one of qwen2.5-0.5b"),
        (["--responses", "1", "2", "--group", "8"], "--group goes with one length for all responses"),
        (["--prompt", "0"], "prompt_lengths\\[0\\] is 0"),
    ],
)
def test_plan_says_what_is_wrong_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["plan", "--prompt", "8", "--responses", "4", *arguments])


def test_plan_says_which_model_types_it_does_not_know(tmp_path):
    AutoConfig.for_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="the cost of model type 'mamba' is not known"):
        cli.main(["plan", "--prompt", "8", "--responses", "4", "--model", str(tmp_path)])


def stderr_of(capsys, *arguments: str) -> str:
    """What a command with a mistake prints to stderr; its exit status is 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


PLAN, BENCH = ["plan", "--prompt", "8", "--responses", "4"], ["bench", "--prompt", "8", "--response", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN, "--group", "0"], "argument --group: '0' is not a whole number of at least 1"),
        ([*PLAN, "--group", "-8"], "argument --group: '-8' is not a whole number of at least 1"),
        ([*PLAN, "--prompt", "0"], "prompt_lengths[0] is 0"),
        ([*PLAN, "--prompt", str(10**24)], "tokens: choose up to 100,000,000 in all"),
        ([*PLAN, "--group", str(10**14)], "argument --group: 100000000000000 is more than 10,000,000"),
        ([*PLAN, "--prompt", "many"], "argument --prompt: invalid int value: 'many'"),
        ([*PLAN, "--shape", "gpt-9"], "there is no shape 'gpt-9'"),
        (
            [*PLAN, "--model", "no/such"],
            "--model no/such: its config cannot be read (there is no such folder, so it was looked up on the hub): ",
        ),
        ([*BENCH, "--group", "0"], "argument --group: '0'"),
        ([*BENCH, "--repeats", "0"], "argument --repeats: '0'"),
        ([*BENCH, "--response", "0"], "argument --response: '0'"),
        (
            [*BENCH, "--model", "no/such"],
            "--model no/such: its config cannot be read (there is no such folder, so it was looked up on the hub): ",
        ),
        (
            ["doctor", "--model", "no/such"],
            "--model no/such: its config cannot be read (there is no such folder, so it was looked up on the hub): ",
        ),
        (
            ["doctor", "--model", "not a name/at/all"],
            "--model not a name/at/all: its config cannot be read (there is no such folder, so it was looked up on the hub): ",
        ),
        (["doctr"], "invalid choice: 'doctr'"),
        (["plan"], "the following arguments are required: --prompt, --responses"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_status_2(capsys, arguments, message):
    error = stderr_of(capsys, *arguments)
    assert message in error and error.count("\n") == 1


def test_too_little_memory_is_told_in_one_line(capsys, monkeypatch):
    def compare_group(*_):
        raise MemoryError

    monkeypatch.setattr("prefix_grouper_plugins.plan.one_group.compare_group", compare_group)
    assert stderr_of(capsys, *PLAN) == "there is not enough memory for these sizes: choose smaller ones\n"


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_a_config_that_cannot_be_read_is_told_in_one_line(capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for arguments in (PLAN, BENCH, ["doctor"]):
        assert stderr_of(capsys, *arguments, "--model", str(tmp_path)).count("\n") == 1


@pytest.mark.parametrize("arguments", [PLAN, BENCH, ["doctor"]])
def test_a_wrong_backend_in_the_environment_is_told_in_one_line(capsys, monkeypatch, arguments):
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "flash")
    message = "PREFIX_GROUPER_BACKEND is 'flash': choose one of auto, merged_lse, triton, flex, blockwise\n"
    assert stderr_of(capsys, *arguments) == message


def test_the_variable_of_the_environment_has_one_name():
    assert cli.BACKEND_VARIABLE == BACKEND_VARIABLE


def test_bench_times_the_backend_in_the_environment_alone(capsys, monkeypatch):
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "blockwise")
    assert cli.main([*BENCH, "--device", "cpu", "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"].keys() == {"row by row", "blockwise"}
    monkeypatch.setenv("PREFIX_GROUPER_BACKEND", "flex")
    assert "PREFIX_GROUPER_BACKEND=flex cannot run this layer: FlexAttention has no backward on the CPU" in stderr_of(
        capsys, *BENCH, "--device", "cpu", "--json"
    )


def test_doctor_exits_1_for_a_refused_model_and_lists_no_backends_for_it(tmp_path, capsys):
    tiny.model("qwen3", attention_dropout=0.1).config.save_pretrained(tmp_path / "refused")
    tiny.model("qwen3").config.save_pretrained(tmp_path / "supported")
    assert cli.main(["doctor", "--model", str(tmp_path / "refused")]) == 1
    about_model = capsys.readouterr().out.split("(qwen3): refused")[1]
    assert "self_attn" not in about_model and "merged_lse" not in about_model
    assert cli.main(["doctor", "--model", str(tmp_path / "supported")]) == 0
    assert "self_attn" in capsys.readouterr().out


def test_json_holds_what_is_printed(tmp_path, capsys):
    path = tiny.saved_model(tmp_path, "qwen3")
    assert cli.main([*PLAN, "--group", "2", "--model", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["shared"]["tokens"], planned["row_by_row"]["tokens"]) == (7 + 2 * 4, 2 * 12)
    assert planned["token_ratio"] == 15 / 24 and planned["responses"] == [4, 4]
    assert cli.main(["doctor", "--model", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["prefix-grouper-plugins"] == __version__
    assert {"layers": "all layers", "reason": None} in found["attention"]["cpu"]["backends"]["blockwise"]
    assert found["model"]["supported"] and found["model"]["layers"][0]["backend"] == "merged_lse"


@pytest.mark.parametrize("command", [[], ["doctor"], ["plan"], ["bench"], ["trl"]])
def test_every_command_tells_the_version(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"prefix-grouper-plugins {__version__}\n"


@pytest.mark.parametrize(
    ("unbuffered", "command", "statuses"),
    [(["-u"], PLAN, {141}), ([], PLAN, {141}), ([], ["--help"], {0, 141})],  # argparse forgives it, where it sees it
)
def test_a_reader_that_stops_early_does_not_break_it(unbuffered, command, statuses):
    whole = [sys.executable, *unbuffered, "-m", "prefix_grouper_plugins.cli", *command]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `head` does once it has its lines
        assert process.stderr.read() == b""
    assert process.returncode in statuses


@pytest.mark.parametrize("unbuffered", [["-u"], []])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_an_error_of_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        command = [sys.executable, *unbuffered, "-m", "prefix_grouper_plugins.cli", *PLAN]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "prefix-grouper: the output cannot be written: No space left on device\n"


def test_without_an_output_it_ends_as_with_one():
    whole = " ".join([sys.executable, "-m", "prefix_grouper_plugins.cli", *PLAN, ">&-"])
    result = subprocess.run(["sh", "-c", whole], stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_interrupt_ends_it_without_a_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "plan", interrupted)
    assert cli.main(PLAN) == 130
    assert capsys.readouterr() == ("", "")


def test_bench_times_each_backend_against_row_by_row(tmp_path, capsys):
    sizes = ["--prompt", "96", "--response", "8", "--group", "4", "--repeats", "1"]
    cli.main(["bench", *sizes, "--device", "cpu", "--model", tiny.saved_model(tmp_path, "qwen3")])
    output = capsys.readouterr().out
    table = figures(output)
    assert table["row by row"][1] == "1.00"
    assert {"merged_lse", "blockwise"} <= table.keys() and all(float(row[0]) > 0 for row in table.values())
    pairs = 4 * 104 * 105 / 2, 95 * 96 / 2 + 4 * (95 * 8 + 8 * 9 / 2)
    assert f"visible pairs of query and key, {pairs[0] / pairs[1]:.2f}," in output


def test_bench_times_an_update_and_its_seconds_and_ratios_agree(tmp_path, capsys):
    model = tiny.saved_model(tmp_path, "qwen3", max_position_embeddings=1024)
    sizes = [
        "--prompt",
        "96",
        "--response",
        "8",
        "--group",
        "4",
        "--batch-size",
        "2",
        "--layers",
        "1",
        "--repeats",
        "2",
    ]
    files = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]
    cli.main(["bench", "--update", *sizes, "--device", "cpu", "--model", model, "--json", *files])
    found = json.loads(capsys.readouterr().out)
    seconds = found["seconds"]
    assert found["times_as_fast"]["shared"] == seconds["stock"] / seconds["shared"]
    low, high = found["spread"]["shared"]
    assert 0 < low <= high and found["flop_ratio"] > 2
    lines = [line for line in (tmp_path / "a.csv").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "turn,stock seconds,shared seconds" and len(lines) == 3
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1"], "--layers goes with --update"),
        (["--update"], "--update builds the model: give --model"),
        (["--update", "--group", "4", "--batch-size", "3"], "--batch-size 3 does not divide --group 4"),
        (["--csv", "no/such/a.csv"], "--csv no/such/a.csv: it cannot be written"),
    ],
)
def test_mistakes_of_bench_are_told_in_one_line(capsys, options, message):
    error = stderr_of(capsys, *BENCH, "--device", "cpu", "--repeats", "1", "--json", *options)
    assert message in error and error.count("\n") == 1
