"""The launcher: unmodified scripts, TRL's own script, the flag anywhere, YAML, and two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from trl import GRPOConfig, ModelConfig, RLOOConfig, ScriptArguments

from prefix_grouper_plugins.integrations.trl import PrefixGrouperMixin, ShareRowsMixin, launch
from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperArguments
from prefix_grouper_plugins.settings import TRL_OPTIONS
from prefix_grouper_plugins.usage import UsageError
from tests import tiny
from tests.integrations.trl.training import run_python
from tests.processes import run_in_fork

SCRIPT = """
import json, os, sys
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser
from tests import tiny

def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]

class OwnTrainer(GRPOTrainer):
    pass

if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config()
    trainer = OwnTrainer(model=model.model_name_or_path, reward_funcs=reward, args=training,
                         train_dataset=tiny.prompts(16), processing_class=tiny.tokenizer())
    trainer.train()
    last = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    if trainer.accelerator.is_main_process:
        names = [c.__name__ for c in type(trainer).__mro__]
        found = {"mro": names, "argv": sys.argv, "log": last, "regroup": getattr(training, "prefix_grouper_regroup", None)}
        with open("result.json", "w") as file:
            json.dump(found, file)
    if trainer.accelerator.num_processes > 1:  # gloo's threads now and then abort a process that ends while another still talks
        trainer.accelerator.wait_for_everyone()
        sys.stdout.flush()
        os._exit(0)
"""
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "max_steps": 1,
    "output_dir": "out",
    "report_to": "none",
    "use_cpu": "true",
    "bf16": "false",
    "save_strategy": "no",
    "logging_steps": 1,
}
ARGUMENTS = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
LAUNCH = ["-m", "prefix_grouper_plugins.integrations.trl.launch"]


@pytest.fixture
def folder(tmp_path):
    tiny.saved_model(tmp_path / "model", "llama")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path


def run(folder: Path, *command: str, in_fork: bool = False) -> dict:
    done = run_python(folder, *command, in_fork=in_fork)
    return json.loads((folder / "result.json").read_text()) | {"stderr": done.stderr}


def script_arguments(*more: str) -> list[str]:
    return ["script.py", "--model_name_or_path", "model", *ARGUMENTS, *more]


@pytest.mark.slow
def test_an_unmodified_script_shares_with_the_flag_behind_it(folder):
    result = run(folder, *LAUNCH, *script_arguments("--use_prefix_grouper", "--prefix_grouper_regroup", "group"))
    assert result["log"]["prefix_grouper/rows_per_group"] == 4
    assert "PrefixGrouperMixin" in result["mro"]  # behind the script's own subclass
    assert result["regroup"] == "group"
    assert not [text for text in result["argv"] if "prefix_grouper" in text]


@pytest.mark.slow
def test_the_command_takes_the_flag_in_front_of_the_script(folder):
    cli = ["-m", "prefix_grouper_plugins.cli", "trl", "--use_prefix_grouper"]
    assert run(folder, *cli, *script_arguments(), in_fork=True)["log"]["prefix_grouper/rows_per_group"] == 4


@pytest.mark.slow
def test_without_the_flag_the_script_runs_as_always(folder):
    result = run(folder, *LAUNCH, *script_arguments(), in_fork=True)
    assert "PrefixGrouperMixin" not in result["mro"]
    plain = run(folder, *script_arguments(), in_fork=True)
    assert result["log"]["reward"] == plain["log"]["reward"]
    assert result["argv"] == plain["argv"]


@pytest.mark.slow
def test_yaml_turns_it_on_and_the_command_line_wins_over_yaml(folder):
    (folder / "run.yaml").write_text("use_prefix_grouper: true\nprefix_grouper_regroup: group\n")
    result = run(folder, *LAUNCH, *script_arguments("--config", "run.yaml"), in_fork=True)
    assert result["log"]["prefix_grouper/rows_per_group"] == 4
    assert result["regroup"] == "group"
    result = run(
        folder, *LAUNCH, *script_arguments("--config", "run.yaml", "--prefix_grouper_regroup", "none"), in_fork=True
    )
    assert result["regroup"] == "none"


@pytest.mark.slow
@pytest.mark.parametrize(("in_yaml", "more"), [("false", []), ("true", ["--use_prefix_grouper", "false"])])
def test_yaml_and_command_line_can_turn_it_off(folder, in_yaml, more):
    (folder / "run.yaml").write_text(f"use_prefix_grouper: {in_yaml}\n")
    result = run(folder, *LAUNCH, *script_arguments("--config", "run.yaml", *more), in_fork=True)
    assert "prefix_grouper/token_ratio" not in result["log"]


@pytest.mark.slow
def test_two_processes_under_torchrun_share(folder):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run(folder, *torchrun, *LAUNCH, *script_arguments("--use_prefix_grouper"))
    assert result["log"]["prefix_grouper/rows_per_group"] == 4


@pytest.mark.slow
def test_accelerate_launch_shares(folder):
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    result = run(folder, *accelerate, *LAUNCH, *script_arguments("--use_prefix_grouper"))
    assert result["log"]["prefix_grouper/rows_per_group"] == 4


@pytest.mark.slow
def test_trls_own_script_shares(folder):
    (folder / "rewards.py").write_text(
        "def reward(completion_ids, **kwargs):\n    return [float(len(i)) for i in completion_ids]\n"
    )
    (folder / "data").mkdir()
    prompts = [{"prompt": text} for text in tiny.prompts(8)["prompt"]]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    own = ["--model_name_or_path", "model", "--dataset_name", "data", "--reward_funcs", "rewards.reward"]
    command = ["-m", "prefix_grouper_plugins.cli", "trl", "grpo", *own, *ARGUMENTS, "--use_prefix_grouper"]
    done = run_python(folder, *command, in_fork=True)
    assert "prefix_grouper/rows_per_group" in done.stdout


def pairs(folder: Path) -> None:
    (folder / "data").mkdir()
    rows = [{"prompt": text, "chosen": " w1 w2", "rejected": " w3"} for text in tiny.prompts(8, 6)["prompt"]]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
def test_trls_own_script_of_another_trainer_shares(folder):
    pairs(folder)
    settings = {k: v for k, v in SETTINGS.items() if k not in ("num_generations", "max_completion_length")}
    own = ["--model_name_or_path", "model", "--dataset_name", "data"]
    own += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = ["-m", "prefix_grouper_plugins.cli", "trl", "dpo", *own, "--use_prefix_grouper"]
    done = run_python(folder, *command, in_fork=True)
    assert "prefix grouper is on for LlamaModel" in done.stderr
    assert "'prefix_grouper/token_ratio': '0." in done.stdout


OTHER_NAMES = """
import os, sys
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import trl
from trl.experimental.kto import KTOTrainer as OtherKTOTrainer  # TRL has two classes
from trl import DPOConfig, KTOTrainer, RewardConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from prefix_grouper_plugins.integrations.trl import PrefixGrouperCPOTrainer
from trl.experimental.cpo import CPOTrainer
for cls in (trl.DPOTrainer, DPOConfig, KTOTrainer, RewardConfig, DPOTrainer, ORPOConfig, ORPOTrainer, OnlineDPOTrainer):
    print(cls.__name__)
print(issubclass(OtherKTOTrainer, KTOTrainer), CPOTrainer is PrefixGrouperCPOTrainer, [c.__name__ for c in CPOTrainer.__mro__][:3])
from trl import SFTConfig, SFTTrainer
from tests import tiny
SFTTrainer(model="model", args=SFTConfig("out", use_cpu=True, bf16=False, report_to=[]),
           train_dataset=tiny.prompts(8).rename_column("prompt", "text"), processing_class=tiny.tokenizer())
"""


@pytest.mark.slow
def test_other_trainers_are_ours_too_and_sft_says_that_it_has_nothing_to_share(folder):
    (folder / "script.py").write_text(OTHER_NAMES)
    done = run_python(folder, *LAUNCH, "script.py", "--use_prefix_grouper", in_fork=True)
    *names, last = done.stdout.splitlines()
    wanted = "DPOTrainer DPOConfig KTOTrainer RewardConfig DPOTrainer ORPOConfig ORPOTrainer OnlineDPOTrainer".split()
    assert names == [f"PrefixGrouper{name}" for name in wanted]
    assert last == "True True ['PrefixGrouperCPOTrainer', 'ShareRowsMixin', 'CPOTrainer']"
    assert done.stderr.count("nothing is shared by SFTTrainer, which forwards one completion of each prompt") == 1
    assert "built no trainer" not in done.stderr


@pytest.mark.slow
def test_a_script_without_a_grpo_trainer_is_told_that_nothing_was_shared(tmp_path):
    (tmp_path / "script.py").write_text("print('no trainer here')")
    done = run_python(tmp_path, *LAUNCH, "script.py", "--use_prefix_grouper", in_fork=True)
    assert "no trainer here" in done.stdout
    assert "nothing was shared" in done.stderr


@pytest.mark.parametrize(("code", "told"), [("0", True), ("None", True), ("3", False)])
def test_a_script_that_ends_with_sys_exit_is_told_too_unless_it_has_failed(monkeypatch, caplog, tmp_path, code, told):
    (tmp_path / "script.py").write_text(f"import sys\nsys.exit({code})\n")
    monkeypatch.setattr(launch, "_prepare", lambda argv: (str(tmp_path / "script.py"), [], True))
    monkeypatch.setattr(launch, "_SAID", set())
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for mixin in (PrefixGrouperMixin, ShareRowsMixin):
        monkeypatch.setattr(mixin, "built", 0)
    with pytest.raises(SystemExit):
        launch.main([])
    assert ("nothing was shared" in caplog.text) is told


def test_an_option_in_the_environment_without_the_switch_is_told(monkeypatch, caplog):
    monkeypatch.setenv("PREFIX_GROUPER_SHARE", "tree")
    assert launch._prepare([__file__])[2] is False
    assert "PREFIX_GROUPER_SHARE is set, and sharing is off: add --use_prefix_grouper" in caplog.text
    caplog.clear()
    monkeypatch.setenv("USE_PREFIX_GROUPER", "false")
    launch._prepare([__file__])
    assert not caplog.text


def test_nothing_that_reads_the_environment_is_imported_before_the_script_sets_it(tmp_path):
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            print(sorted({"torch", "transformers", "huggingface_hub", "accelerate", "trl"} & sys.modules.keys()))
            os.environ["HF_HOME"] = "set-by-the-script"
            from huggingface_hub import constants
            print(constants.HF_HOME)
            """
        )
    )
    assert run_python(tmp_path, *LAUNCH, "script.py", "--use_prefix_grouper").stdout.split() == [
        "[]",
        "set-by-the-script",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["config import PrefixGrouperArguments", "trainer import PrefixGrouperMixin"])
def test_trls_names_are_ours_in_scripts_that_import_something_of_ours_first(tmp_path, ours):
    """Our modules import TRL then, so they are not complete when it is."""
    (tmp_path / "script.py").write_text(
        f"from prefix_grouper_plugins.integrations.trl.{ours}\n"
        "import trl, trl.trainer.grpo_trainer, trl.trainer.rloo_config\n"
        "from trl.trainer import RLOOTrainer\n"
        "for cls in (trl.GRPOConfig, RLOOTrainer, trl.trainer.grpo_trainer.GRPOTrainer, trl.trainer.rloo_config.RLOOConfig):\n"
        "    print(cls.__name__)\n"
    )
    done = run_python(tmp_path, *LAUNCH, "script.py", "--use_prefix_grouper", in_fork=True)
    names = ["GRPOConfig", "RLOOTrainer", "GRPOTrainer", "RLOOConfig"]
    assert done.stdout.split() == [f"PrefixGrouper{name}" for name in names]


def test_the_launcher_knows_the_options_of_the_config():
    hints = get_type_hints(PrefixGrouperArguments)  # not the fields' own types: TRL's parser writes over them
    own = {option.name: hints[option.name] for option in fields(PrefixGrouperArguments)}
    assert own.keys() == TRL_OPTIONS.keys()
    assert {name for name, kind in own.items() if kind in (bool, bool | None)} == {
        name for name, o in TRL_OPTIONS.items() if o.is_switch
    }


@pytest.mark.parametrize(
    ("argv", "options", "rest"),
    [
        (["s.py", "--use_prefix_grouper"], {"use_prefix_grouper": "true"}, ["s.py"]),
        (["--use-prefix-grouper", "s.py", "--x", "1"], {"use_prefix_grouper": "true"}, ["s.py", "--x", "1"]),
        (["s.py", "--use_prefix_grouper", "false", "y"], {"use_prefix_grouper": "false"}, ["s.py", "y"]),
        (["s.py", "--prefix_grouper_backend=blockwise"], {"prefix_grouper_backend": "blockwise"}, ["s.py"]),
        (["s.py", "--prefix_grouper_regroup", "none"], {"prefix_grouper_regroup": "none"}, ["s.py"]),
        (["s.py", "--use_peft"], {}, ["s.py", "--use_peft"]),
    ],
)
def test_our_options_are_taken_out_of_the_command_line(argv, options, rest):
    assert launch.split_arguments(argv) == (options, rest)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name the script to run"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["s.py", "--prefix_grouper_regruop", "group"], "--prefix_grouper_regruop is unknown: the options are"),
        (["s.py", "--prefix_grouper_backend"], "--prefix_grouper_backend needs a value"),
        (["-m"], "-m needs the name of a module"),
        ([__file__, "--use_prefix_grouper=maybe"], "--use_prefix_grouper is 'maybe': it takes true or false"),
        (
            [__file__, "--prefix_grouper_self_check=maybe"],
            "--prefix_grouper_self_check is 'maybe': it takes true or false",
        ),
        (
            [__file__, "--prefix-grouper-regroup", "all"],
            "--prefix_grouper_regroup is 'all': choose one of exact, group",
        ),
    ],
)
def test_mistakes_get_plain_errors(argv, message):
    with pytest.raises(SystemExit, match=message):
        launch.main(argv)


SLIPS = {
    "--use_prefix_groupr": "use_prefix_grouper",
    "--use-prefix-groupr": "use_prefix_grouper",
    "--prefix-grouper": "use_prefix_grouper",
    "-use_prefix_grouper": "use_prefix_grouper",
    "\N{EM DASH}use_prefix_grouper": "use_prefix_grouper",
    "--use_prefx_gruoper=true": "use_prefix_grouper",
    "--usePrefixGrouper": "use_prefix_grouper",
    "--use_prefix_grouping": "use_prefix_grouper",
    "--prefix_grouper_regruop=group": "prefix_grouper_regroup",
    "--prefix-grouper-selfcheck": "prefix_grouper_self_check",
    "--prefix_grouper_on_unsuported": "prefix_grouper_on_unsupported",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_what_looks_like_an_option_of_ours_is_refused_with_the_nearest(slip):
    with pytest.raises(SystemExit, match=rf"is unknown: the options are .*; did you mean --{SLIPS[slip]}\?$") as stop:
        launch.split_arguments(["s.py", "--epochs", "1", slip])
    assert stop.value.code == 2


def test_options_of_others_and_values_are_left_alone():
    known = [option.name for kind in (GRPOConfig, RLOOConfig, ModelConfig, ScriptArguments) for option in fields(kind)]
    known += ["use_prefix_caching", "enable_prefix_caching", "use_prefix", "group", "prefix", "m", "1", "-", ""]
    for name in known:
        for token in (f"--{name}", f"--{name.replace('_', '-')}", f"-{name}", f"--{name}=use_prefix_groupr"):
            assert launch.split_arguments(["s.py", token]) == ({}, ["s.py", token]), token
    values = ["s.py", "use_prefix_grouper", "--run_name=--use_prefix_groupr", "--run_name", "use_prefix_groupr"]
    assert launch.split_arguments(values) == ({}, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "use_prefix_groupr: true",
            r"^use_prefix_groupr in .*run\.yaml is unknown: did you mean use_prefix_grouper\?$",
        ),
        ("prefix-grouper-regroup: group", "^prefix-grouper-regroup in .* did you mean prefix_grouper_regroup"),
        ("use_prefix_grouper: maybe", "^use_prefix_grouper in .* is 'maybe': it takes true or false"),
        ("prefix_grouper_regroup: all", "^prefix_grouper_regroup in .* is 'all': choose one of exact, group, none"),
    ],
)
def test_mistakes_in_yaml_get_plain_errors(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(f"{text}\nlearning_rate: 1\n")
    for config in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        with pytest.raises(SystemExit, match=message) as stop:
            launch.main([__file__, *config])
        assert stop.value.code == 2


def test_a_slip_is_told_in_one_line_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "script.py").write_text("raise AssertionError('it ran')")
    code = (
        "import sys\nfrom prefix_grouper_plugins.cli import main\n"
        "try:\n    main(['trl', 'script.py', '--use-prefix-groupr'])\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'numpy', 'trl', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr.startswith("--use-prefix-groupr is unknown") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("value", "shown"), [("true", "PrefixGrouperGRPOTrainer"), ("false", "GRPOTrainer")])
def test_the_environment_turns_it_on_as_in_code(tmp_path, value, shown):
    (tmp_path / "script.py").write_text("import trl\nprint(trl.GRPOTrainer.__name__)\n")
    done = run_in_fork(*LAUNCH, "script.py", cwd=tmp_path, env=os.environ | {"USE_PREFIX_GROUPER": value})
    assert done.stdout.split() == [shown], done.stderr


@pytest.mark.parametrize(
    "name", ["USE_PREFIX_GROUPR", "USE_PREFIXGROUPER", "PREFIX_GROUPER_REGRUP", "use_prefix_grouper"]
)
def test_a_misspelt_variable_of_the_environment_is_refused_with_the_nearest(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(
        UsageError, match=rf"{name} sets nothing: did you mean (USE_PREFIX_GROUPER|PREFIX_GROUPER_REGROUP)\?"
    ):
        launch._prepare(["grpo"])


def test_the_environment_gets_plain_errors_as_well(monkeypatch):
    monkeypatch.setenv("USE_PREFIX_GROUPER", "maybe")
    with pytest.raises(SystemExit, match="USE_PREFIX_GROUPER is 'maybe': it takes true or false"):
        launch.main([__file__])


def test_help_tells_all_options(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in TRL_OPTIONS:
        assert f"--{name}" in text
