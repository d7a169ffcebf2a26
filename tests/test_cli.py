"""The command `prefix-grouper`, from its help to its plain errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, T5Config

from prefix_grouper_plugins import __version__, cli
from prefix_grouper_plugins.attention.backends.merged_lse import cuda as merged_lse
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


def test_doctor_names_the_head_dims_where_answers_differ(monkeypatch):
    """A GPU of which only the kernels for narrow heads fit."""
    monkeypatch.setattr(merged_lse, "_why_not_gpu", lambda device, dim: None if dim <= 192 else f"{dim} is too wide")
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
    with pytest.raises(SystemExit, match="prefix-grouper trl: name the script to run, or grpo or rloo"):
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


def test_bench_times_each_backend_against_row_by_row(tmp_path, capsys):
    sizes = ["--prompt", "96", "--response", "8", "--group", "4", "--repeats", "1"]
    cli.main(["bench", *sizes, "--device", "cpu", "--model", tiny.saved_model(tmp_path, "qwen3")])
    output = capsys.readouterr().out
    table = figures(output)
    assert table["row by row"][1] == "1.00"
    assert {"merged_lse", "blockwise"} <= table.keys() and all(float(row[0]) > 0 for row in table.values())
    pairs = 4 * 104 * 105 / 2, 95 * 96 / 2 + 4 * (95 * 8 + 8 * 9 / 2)
    assert f"visible pairs of query and key, {pairs[0] / pairs[1]:.2f}," in output
