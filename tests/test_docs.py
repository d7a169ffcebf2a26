"""Every block, message, option, table of numbers and link of the documentation is run or checked.

The blocks of a page run in their order, in a folder that holds what a user would have: a model, a script, data, a reward
function. A block whose first line names a file (``# train.py``) is that file, and some later command must use it.
Commands that cannot run here (make, pip, several GPUs) are checked in parts; a language without a handler fails.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import importlib.util
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import demos
import plot
import pytest
import torch
import yaml
from trl import GRPOConfig, ModelConfig, TrlParser

from prefix_grouper_plugins import PrefixLayout, __version__, metrics
from prefix_grouper_plugins.cost import SHAPES
from prefix_grouper_plugins.integrations.trl import PrefixGrouperGRPOConfig
from prefix_grouper_plugins.integrations.trl.config import PrefixGrouperArguments
from prefix_grouper_plugins.integrations.trl.launch import split_arguments
from prefix_grouper_plugins.integrations.trl.regroup import regroup
from prefix_grouper_plugins.integrations.trl.windows import windows
from prefix_grouper_plugins.modeling.model_types import MODEL_TYPES, VERIFIED_MODEL_TYPES, VERIFIED_MULTIMODAL_TYPES
from prefix_grouper_plugins.modeling.self_check.tolerances import TOLERANCES
from prefix_grouper_plugins.plan.estimate import Training
from prefix_grouper_plugins.plan.schedule import Prompts, TRLSizes, trl_schedule
from prefix_grouper_plugins.settings import TRL_OPTIONS
from tests import tiny
from tests.processes import run_in_fork

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README, FALLBACKS, LOGS = (page.read_text() for page in (PAGES[0], ROOT / "docs/fallbacks.md", ROOT / "docs/logs.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OPTIONS = {option.name for option in fields(PrefixGrouperArguments)}
METRICS = {*metrics.METRICS, metrics.GENERATION_TOKEN_RATIO, metrics.GENERATION_FALLBACKS}

MY_SCRIPT = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

GRPOTrainer(
    model="my-model",
    reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
    args=GRPOConfig("out", max_steps=1, num_generations=4, max_completion_length=8, logging_steps=1, use_cpu=True),
    train_dataset=Dataset.from_list([{"prompt": "a b c"}] * 8),
).train()
"""
MY_REWARDS = """
def different_words(completions, **kwargs):
    return [float(len(set(text.split()))) for text in completions]
"""


CONSOLE_SCRIPT = (
    "import sys; from prefix_grouper_plugins.cli import main; sys.exit(main())"  # tests/test_cli.py runs the real one
)


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = [
        Block(m[1], m[2], text[: m.start()].count("\n") + 1)
        for m in re.finditer(r"^ *```(.*)\n((?:.*\n)*?) *```$", text, re.M)
    ]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.M)), f"{page.name} has a fence that is not closed"
    return found


def prose_of(page: Path) -> str:
    return re.sub(r"^ *```.*\n((?:.*\n)*?) *```$", "", page.read_text(), flags=re.M)


# ------------------------------------------------------------------------------------------------------ running a page


class Page:
    """A page that is being run: its folder, the namespace of its Python blocks, and the files that it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.unused_files = folder, set[str]()
        self.namespace: dict[str, Any] = {
            "my_reward": lambda completions, **kwargs: [float(len(text)) for text in completions],
            "my_dataset": [{"prompt": "a long prompt " * 10}],
        }
        self.output = ""

    def run(self, block: Block) -> None:
        HANDLERS[block.language](self, block)

    def save_if_named(self, block: Block) -> bool:
        if named := re.match(r"# (\w+\.(?:py|yaml))\n", block.text):
            (self.folder / named[1]).write_text(block.text)
            self.unused_files.add(named[1])
        return bool(named)

    def python(self, block: Block) -> None:
        if self.save_if_named(block):
            return
        shown = [line.rpartition("  # ")[2] for line in block.text.splitlines() if re.match(r"print\(.*\)  # ", line)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * block.line + block.text, "documentation", "exec"), self.namespace)
        lines = [line for line in printed.getvalue().splitlines() if not line.startswith("{'")]  # TRL's log
        assert not shown or lines == shown

    def yaml(self, block: Block) -> None:
        assert self.save_if_named(block), "a YAML block names its file, and a command uses it"
        assert OPTIONS & yaml.safe_load(block.text).keys() <= OPTIONS

    def bash(self, block: Block) -> None:
        commands = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
        commands = [command for command in commands if command]
        for command in commands:
            self.unused_files -= {word for word in command if (self.folder / word).is_file()}
        to_run = [on_cpu(command) for command in commands if not self.checked(command)]
        if all(command[0] == "prefix-grouper" for command in to_run):
            for command in to_run:
                self.shell(shlex.join(command), run_in_fork("-c", CONSOLE_SCRIPT, *command[1:], **self.place))
        else:  # lines that depend on each other
            script = "\n".join(map(shlex.join, to_run))
            self.shell(
                script, subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, **self.place)
            )

    @property
    def place(self) -> dict[str, Any]:
        """Where commands run, as arguments of `subprocess.run`."""
        ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"cwd": self.folder, "env": {**os.environ, **ours, "PATH": path}}

    def shell(self, script: str, ran: subprocess.CompletedProcess[str]) -> None:
        """Look at what a command has printed."""
        assert ran.returncode == 0, f"{script}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
        self.output += ran.stdout
        if "--use_prefix_grouper" in script or "--config" in script:
            assert "'prefix_grouper/fallbacks': '0'" in ran.stdout, "nothing was shared"
            assert "'prefix_grouper/token_ratio': '1'" not in ran.stdout

    def checked(self, command: list[str]) -> bool:
        """Whether ``command`` is of a kind that is checked here instead of being run."""
        check = check_recipe if any(word.startswith("examples/") for word in command) else CHECKS.get(command[0])
        if check:
            check(self, command if check is check_recipe else command[1:])
        return check is not None

    def messages(self, block: Block) -> None:
        assert_is_a_message(block.text)

    def log(self, block: Block) -> None:
        """An excerpt of what a command of the page has printed, `...` standing for anything."""
        for line in block.text.splitlines():
            pattern = ".*".join(re.escape(part) for part in line.split("..."))
            assert re.search(pattern, self.output), f"no command printed {line}"

    def bibtex(self, block: Block) -> None:
        assert block.text.count("{") == block.text.count("}") and "2506.05433" in block.text


def on_cpu(command: list[str]) -> list[str]:
    """What the quick start tells to add on a machine without a GPU."""
    return [*command, "--use_cpu"] if command[:2] == ["prefix-grouper", "trl"] else command


HANDLERS: dict[str, Callable[[Page, Block], None]] = {
    "python": Page.python,
    "bash": Page.bash,
    "yaml": Page.yaml,
    "text": Page.messages,
    "log": Page.log,
    "bibtex": Page.bibtex,
}


def check_make(page: Page, arguments: list[str]) -> None:
    for target in arguments:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no target {target}"


def check_pip(page: Page, arguments: list[str]) -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert arguments[0] == "install"
    name, extra = re.fullmatch(r"([\w.-]+)\[(\w+)\]", arguments[1]).groups()  # type: ignore[union-attr]
    assert name in (".", metadata["metadata"]["name"]) and extra in metadata["options.extras_require"]


def check_accelerate(page: Page, arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    parsed = launch_command_parser().parse_args(arguments[1:])
    assert parsed.module
    check_launch(page, parsed.training_script, parsed.training_script_args)


def check_torchrun(page: Page, arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module
    check_launch(page, parsed.training_script, parsed.training_script_args)


def check_launch(page: Page, module: str, arguments: list[str]) -> None:
    """The module exists, it understands our options, the script is there, and TRL knows all other arguments."""
    assert importlib.util.find_spec(module)
    options, (script, *rest) = split_arguments(arguments)
    assert options == {"use_prefix_grouper": "true"} and (page.folder / script).is_file()
    page.unused_files.discard(script)
    if rest:
        TrlParser((GRPOConfig, ModelConfig)).parse_args_into_dataclasses([*rest, "--use_cpu"])


def check_recipe(page: Page, command: list[str]) -> None:
    """A script of examples/; tests/examples/test_recipes.py runs the recipes."""
    if command[0] == "bash":  # of verl's own checkout
        assert command[2:] == ["model_engine=prefix_grouper"]
        return
    (script,) = (word for word in command if word.startswith("examples/"))
    assert (ROOT / script).is_file()
    if command[:2] == ["prefix-grouper", "trl"]:
        options, (_, *rest) = split_arguments(command[2:])
        arguments = runpy.run_path(str(ROOT / script))["DataArguments"]
        TrlParser((arguments, GRPOConfig, ModelConfig)).parse_args_into_dataclasses([*rest, "--use_cpu"])
        assert options == {"use_prefix_grouper": "true"}


def check_verl(page: Page, arguments: list[str]) -> None:
    """The form of a command of verl; tests/integrations/verl/test_docs.py gives it to Hydra."""
    assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
    assert all(re.fullmatch(r"\+?[\w.]+=\S+", argument) for argument in arguments[2:]), arguments


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "accelerate": check_accelerate,
    "torchrun": check_torchrun,
    "python": check_verl,
}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    # The words of the pages are unknown to its tokenizer, which does not matter.
    tiny.saved_model(tmp_path / "my-model", max_position_embeddings=1024, num_hidden_layers=1)
    (tmp_path / "my_script.py").write_text(MY_SCRIPT)
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    (tmp_path / "my-data").mkdir()
    (tmp_path / "my-data/train.jsonl").write_text('{"prompt": "a b c d e f"}\n')
    monkeypatch.chdir(tmp_path)
    stock = GRPOConfig.__post_init__

    def use_cpu(self: GRPOConfig) -> None:
        self.use_cpu = True
        stock(self)

    monkeypatch.setattr(GRPOConfig, "__post_init__", use_cpu)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Page(tmp_path)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs_as_it_stands(page: Page, name: str) -> None:
    from datasets import Dataset

    page.namespace["my_dataset"] = Dataset.from_list(page.namespace["my_dataset"])
    for block in blocks_of(ROOT / name):
        assert block.language in HANDLERS, f"{name}:{block.line}: no handler for a block of {block.language!r}"
        try:
            page.run(block)
        except Exception as error:
            error.add_note(f"in the block at {name}:{block.line}")
            raise
    assert not page.unused_files, f"no command of {name} uses {page.unused_files}"


# ------------------------------------------------------------------------------------------------- messages and options


def message_patterns(*paths: Path) -> list[re.Pattern[str]]:
    """Every text of the code that could be a message, with its values left open."""
    patterns = []
    for path in paths:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts_of_others = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts_of_others:
                parts = [x for text in re.split(r"%[sd]", node.value) for x in (text, None)][:-1]
            else:
                continue
            fixed = "".join(part for part in parts if part)
            if len(fixed) >= 15 and " " in fixed and "\n" not in fixed:
                patterns.append(re.compile("".join(".+" if part is None else re.escape(part) for part in parts)))
    return patterns


MESSAGES = message_patterns(*(ROOT / "prefix_grouper_plugins").rglob("*.py"), *(ROOT / "integrations").rglob("*.py"))


def assert_is_a_message(text: str) -> None:
    message = " ".join(text.split())
    assert any(pattern.fullmatch(message) for pattern in MESSAGES), f"the code has no message {message!r}"


def quoted_messages() -> list[str]:
    """Messages in blocks of text, and in the first columns of the tables of messages."""
    found = [
        block.text
        for name in ("fallbacks", "logs")
        for block in blocks_of(ROOT / f"docs/{name}.md")
        if block.language == "text"
    ]
    for table in re.findall(r"^\| (?:Message|Reason) \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", FALLBACKS, re.M):
        cells = [row[1:].split(" | ")[0].strip() for row in table.splitlines()]
        found += [cell.strip("`").strip() for cell in cells if cell.startswith("`")]
    return found


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_exists_in_the_code(message: str) -> None:
    # A code span that begins or ends with a backtick loses it when the span is taken off.
    candidates = [before + " ".join(message.split()) + after for before in ("", "`") for after in ("", "`")]
    assert any(pattern.fullmatch(text) for pattern in MESSAGES for text in candidates), message


def test_every_reason_to_refuse_a_model_is_documented() -> None:
    quoted = [
        before + " ".join(m.split()) + after for m in quoted_messages() for before in ("", "`") for after in ("", "`")
    ]
    modeling = ROOT / "prefix_grouper_plugins/modeling"
    files = [modeling / "model_types.py", modeling / "rope.py", *sorted((modeling / "support").glob("*.py"))]
    for pattern in message_patterns(*files):
        words = pattern.pattern.replace("\\", "").split()
        names = all(word in MODEL_TYPES for word in words)  # entries of the table of types
        if not names and not pattern.pattern.startswith(("sliding", "expand")):  # these describe a layer
            assert any(pattern.fullmatch(text) for text in quoted), pattern.pattern


@pytest.mark.parametrize("name", NAMES)
def test_options_and_metrics_of_the_pages_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    mistyped = {"prefix_grouper_regrup"}  # quoted in the message about unknown options
    named = set(re.findall(r"\b(?:use_prefix_grouper|prefix_grouper_(?!plugins)\w+)\b", text))
    assert named <= OPTIONS | mistyped
    assert set(re.findall(r"\bprefix_grouper/\w+", text)) <= METRICS


def test_the_table_of_metrics_has_each_once() -> None:
    table = re.search(r"<!-- metrics -->(.*)<!-- /metrics -->", LOGS, re.S)[1]  # type: ignore[index]
    names = [name for row in re.findall(r"^\| (`.*?) \| ", table, re.M) for name in re.findall(r"`([\w/]+)`", row)]
    assert sorted(names) == sorted(METRICS)


def test_the_readme_is_short_and_opens_with_what_it_is_for() -> None:
    assert len(README.split()) < 1450
    opening = README.split("## ")[0]
    assert "pays off where prompts are long" in " ".join(opening.split()) and "docs/images/demo.png" in opening


def test_the_table_of_options_is_that_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(use_prefix_grouper|prefix_grouper_\w+)` \| (.*) \|$", README, re.M))
    assert list(rows) == [option.name for option in fields(PrefixGrouperArguments)]
    for option in fields(PrefixGrouperArguments):
        default, choices, _ = rows[option.name].split(" | ")
        if option.default is not None:
            assert default == f"`{str(option.default).lower() if isinstance(option.default, bool) else option.default}`"
        words = [*TRL_OPTIONS[option.name].words, "N"] if TRL_OPTIONS[option.name].words else ["true", "false"]
        assert re.findall(r"`(\w+)`", choices) == option.metadata.get("choices", words)


def test_the_table_of_tolerances_is_that_of_the_code() -> None:
    page = (ROOT / "docs/how-it-works.md").read_text()
    for kinds, *limits in re.findall(r"^\| ((?:b?float\d+(?:, )?)+) \| (\S+) \| (\S+) \| (.+) \|$", page, re.M):
        for kind in kinds.split(", "):
            found = TOLERANCES[getattr(torch, kind)]
            own = re.search(rf"{kind}: (\S+)\)", limits[2])
            assert [float(limits[0]), float(limits[1])] == [found.outputs, found.gradients]
            assert float(own[1] if own else limits[2].split()[0]) == found.update
    assert {kind for kind in TOLERANCES if f"{kind}".removeprefix("torch.") in page} == set(TOLERANCES)


def test_public_names_of_the_pages_exist() -> None:
    import prefix_grouper_plugins
    from prefix_grouper_plugins.integrations import trl as integration

    known = {*prefix_grouper_plugins.__all__, *integration.__all__, *dir(PrefixGrouperGRPOConfig)}
    # verl is not in this environment
    known |= set(re.findall(r'"(Prefix\w+)"', (ROOT / "integrations/verl/__init__.py").read_text()))
    for page in PAGES:
        named = re.findall(r"`(Prefix\w+|shared_prefix_\w+|prefix_grouped_\w+|(?:en|dis)able_\w+)`", page.read_text())
        assert set(named) <= known, page.name


def test_the_list_of_models_is_that_of_the_code() -> None:
    models = (ROOT / "docs/models.md").read_text()
    listed = re.search(r"<!-- types -->(.*)<!-- /types -->", models, re.S)[1]  # type: ignore[index]
    assert set(re.findall(r"[\w-]+", listed)) == VERIFIED_MODEL_TYPES
    multimodal = re.search(r"<!-- multimodal -->(.*)<!-- /multimodal -->", models, re.S)[1]  # type: ignore[index]
    assert set(re.findall(r"\w+", multimodal)) == VERIFIED_MULTIMODAL_TYPES
    for page in PAGES:
        for count in re.findall(r"(\d+) (?:model )?types", page.read_text()):
            assert int(count) == len(VERIFIED_MODEL_TYPES), page.name


# ------------------------------------------------------------------------------------------------- numbers and pictures


def mean_rows_per_group(rows: int, slices: int, group: int, window: int) -> float:
    """Rows per prompt and micro-batch over 100 shuffles."""
    generator = torch.Generator().manual_seed(0)
    total = groups = 0
    for _ in range(100):
        prompts = (torch.arange(rows * slices) // group)[torch.randperm(rows * slices, generator=generator)]
        batches = [{"prompt_ids": x[:, None], "prompt_mask": torch.ones_like(x)[:, None]} for x in prompts.split(rows)]
        for batch in regroup(batches, windows(len(batches), window)):
            total, groups = total + rows, groups + len(batch["prompt_ids"].unique())
    return total / groups


def test_the_table_of_batch_sizes_is_what_regrouping_gives() -> None:
    text = (ROOT / "docs/geometry.md").read_text()
    table = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(table) >= 5
    for row in table:
        rows, accumulation, slices, group = map(int, row[:4])
        windows = (1, math.gcd(accumulation, slices), slices)
        simulated = [mean_rows_per_group(rows, slices, group, window) for window in windows]
        assert simulated == pytest.approx([float(x) for x in row[4:]], abs=0.1), row


def test_the_table_of_groups_larger_than_a_micro_batch_is_what_the_planner_gives() -> None:
    text = (ROOT / "docs/geometry.md").read_text()
    table = re.findall(r"^\| (\d+), (\d+) \| (.*) \|$", text, re.M)
    assert len(table) == 8
    shape = SHAPES["qwen2.5-7b"]
    training = Training(shape, shape.num_weights)
    for prompt, response, cells in ((int(prompt), int(response), cells) for prompt, response, cells in table):
        rows = int(cells.split(" | ")[0])
        prompts = Prompts([torch.arange(prompt)], beginnings_share=True)
        schedule = trl_schedule(prompts, [response] * 8, TRLSizes(8, rows, 8 // rows, 8 // rows))
        alone = PrefixLayout.from_groups([prompt], [[response] * rows]).num_tokens / (rows * (prompt + response))
        flops = training.update_flops(schedule.stock) / training.update_flops(schedule.shared)
        stock, shared = (max(x.held_tokens for x in loads) for loads in (schedule.stock, schedule.shared))
        found = rows, len(schedule.stock), len(schedule.shared), f"{alone:.2f}", f"{schedule.token_ratio:.2f}"
        assert cells == " | ".join(map(str, (*found, f"{flops:.2f}", stock, shared)))


def test_the_picture_of_the_layout_is_drawn_by_its_script() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/images/layout.py"))["draw"]()
    assert (ROOT / "docs/images/layout.svg").read_text() == drawn


def test_the_figures_of_the_benchmarks_are_those_of_their_files() -> None:
    page, found = (ROOT / "docs/benchmarks.md").read_text(), plot.parts()
    assert {"attention-cpu", "growth-cpu", "flops"} <= found.keys()
    assert page == plot.fill(page, found), "run benchmarks/plot.py"
    for name in re.findall(r"<!-- ([\w-]+) -->", page):
        assert name in found or re.search(rf"<!-- {name} -->\n<!-- /{name} -->", page), f"{name} has no file"


@pytest.mark.parametrize("file", ["docs/recipes.md"])
def test_the_figures_of_other_pages_are_those_of_their_files(file: str) -> None:
    page = (ROOT / file).read_text()
    assert page == plot.fill(page, plot.parts()), "run benchmarks/plot.py"


@pytest.mark.parametrize("name", demos.FILES)
def test_the_figures_of_the_demos_are_those_of_their_files(name: str) -> None:
    page = (ROOT / demos.PAGES[name]).read_text()
    part = demos.parts()[name]
    assert part.count("\n|") >= 4 and page == plot.fill(page, {name: part}), "run benchmarks/demos.py"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_images_of_the_pages_exist(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name} links to {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["title"] == "prefix-grouper-plugins"
    assert "2506.05433" in citation["references"][0]["url"]


def test_paths_in_the_map_of_the_code_exist() -> None:
    for path in re.findall(r"`([\w/]+/(?:[\w]+\.py)?)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / path).exists() or (ROOT / "prefix_grouper_plugins" / path).exists(), path
