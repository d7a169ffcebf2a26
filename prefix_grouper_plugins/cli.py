"""The command ``prefix-grouper``: run TRL scripts with sharing, and see what this machine and a model can do, what a
batch costs and how fast attention over it is."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prefix_grouper_plugins.bench_command import BACKEND_VARIABLE
from prefix_grouper_plugins.bench_command import add_arguments as add_bench_arguments
from prefix_grouper_plugins.bench_command import run as run_bench
from prefix_grouper_plugins.plan.command import add_arguments as add_plan_arguments
from prefix_grouper_plugins.plan.command import check as check_plan
from prefix_grouper_plugins.settings import BACKEND
from prefix_grouper_plugins.usage import UsageError, errors_in_one_line, first_line
from prefix_grouper_plugins.version import __version__

if TYPE_CHECKING:
    import torch

    from prefix_grouper_plugins.cost import ModelShape

DESCRIPTION = """\
Forward each prompt of a GRPO group once.

  prefix-grouper trl SCRIPT ... --use_prefix_grouper    run a TRL script with sharing (prefix-grouper trl --help)
  prefix-grouper doctor [--model NAME_OR_PATH]          what this machine can run, and how a model would be run
  prefix-grouper plan prompts.jsonl --responses 512     what sharing would save in your training; nothing is run
  prefix-grouper bench --prompt 4096 --response 512     time attention, or an update, with and without sharing
"""

PACKAGES = ("prefix-grouper-plugins", "torch", "transformers", "trl", "peft", "verl")
# Of writing to stdout: a full disk or quota, or a broken one.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
# What `doctor` asks each backend about.
HEAD_DIMS = (64, 80, 96, 128, 256)
LAYERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding window": {"sliding_window": 4096},
    "softcap": {"softcap": 50.0},
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Raises:
        UsageError: a mistake on the command line, which is printed as one line; exit status 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["trl"]:  # everything after it is the script's, so argparse must not look at it
        importlib.import_module("prefix_grouper_plugins.integrations.trl.launch").main(arguments[1:])
        return 0
    with errors_in_one_line():
        try:
            try:
                return _run(arguments)
            finally:
                if sys.stdout is not None:  # it is None, and print() writes nothing, where the shell closed it (`>&-`)
                    sys.stdout.flush()
        except MemoryError as error:
            raise UsageError("there is not enough memory for these sizes: choose smaller ones") from error
        except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
            _discard_output()
            return 128 + signal.SIGPIPE  # what a shell reports for a program that this signal ended
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except OSError as error:
            if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
                raise
            _discard_output()
            print(f"prefix-grouper: the output cannot be written: {error.strerror}", file=sys.stderr)
            return 1


def _discard_output() -> None:
    """What has not been written is not tried again by the flush at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        BACKEND.check(os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {"doctor": doctor, "plan": plan, "bench": bench}[options.command](options)


# --- the command line ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="prefix-grouper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_version(parser)
    commands = parser.add_subparsers(dest="command", metavar="{trl,doctor,plan,bench}", required=True)
    commands.add_parser("trl", help="run a TRL script with sharing")
    doctor = commands.add_parser("doctor", help="versions, attention backends, and whether a model is supported")
    doctor.add_argument("--model", help="a model's folder or hub name: only its config is read")
    doctor.add_argument("--trust-remote-code", action="store_true", help="as in transformers")
    plan = commands.add_parser("plan", help="what sharing would save in a training on your data; nothing is run")
    add_plan_arguments(plan)
    bench = commands.add_parser("bench", help="time attention, or the update of your model, on this machine")
    add_bench_arguments(bench)
    for command in (plan, bench):
        which = command.add_mutually_exclusive_group()
        which.add_argument("--model", help="a model's folder or hub name: only its config is read")
        which.add_argument("--shape", default="qwen2.5-7b", help="a model by name (default: qwen2.5-7b)")
    for command in (doctor, plan, bench):
        command.add_argument("--json", action="store_true", help="print the figures as JSON")
        _add_version(command)
    return parser


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"prefix-grouper-plugins {__version__}")


def _config(name: str, *, trust_remote_code: bool = False) -> Any:
    """
    Raises:
        UsageError: there is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # of the hub, of a parser, of a model's own code
        where = "" if Path(name).exists() else " (there is no such folder, so it was looked up on the hub)"
        raise UsageError(f"--model {name}: its config cannot be read{where}: {first_line(error)}") from error


def _shape(options: argparse.Namespace) -> tuple[str, ModelShape, Any]:
    """Name and sizes of the model that the options name, and its config (None for a shape by name)."""
    from prefix_grouper_plugins.cost import SHAPES, ModelShape

    if options.model is None:
        if options.shape not in SHAPES:
            raise UsageError(f"there is no shape {options.shape!r}: choose one of {', '.join(SHAPES)}, or give --model")
        return options.shape, SHAPES[options.shape], None
    config = _config(options.model)
    try:
        return options.model, ModelShape.from_config(config), config
    except ValueError as error:
        raise UsageError(f"{options.model}: {error}") from error


# --- plan ------------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> int:
    """What sharing saves, in a training on data or for one group of given lengths."""
    check_plan(options)
    name, shape, config = _shape(options)
    if options.data is None:
        from prefix_grouper_plugins.plan.one_group import as_json, compare_group, lengths_of, print_group

        group = options.prompt, lengths_of(options.responses, options.group)
        both = compare_group(shape, *group)
        if options.json:
            _print_json(as_json(name, *group, both))
        else:
            print_group(name, *group, both)
        return 0
    from prefix_grouper_plugins.plan import report
    from prefix_grouper_plugins.plan.command import figures

    found = figures(options, name, shape, config)
    if options.plot is not None:
        report.draw(found, options.plot)
    if options.json:
        _print_json(found)
    else:
        report.print_report(found)
    return 0


# --- bench -----------------------------------------------------------------------------------------------------------


def bench(options: argparse.Namespace) -> int:
    """Attention of one layer, or the update of a model, shared and not."""
    return run_bench(options, *_shape(options), _print_json)


# --- doctor ----------------------------------------------------------------------------------------------------------


def doctor(options: argparse.Namespace) -> int:
    """What this machine runs, and how a model would be run; exit status 1 for a model that is refused."""
    config = _config(options.model, trust_remote_code=options.trust_remote_code) if options.model is not None else None
    machine = describe_machine_and_backends()
    model = None if config is None else describe_model(options.model, config, options.trust_remote_code)
    if options.json:
        _print_json(machine | ({} if model is None else {"model": model}))
    else:
        print_machine(machine)
        if model is not None:
            print_model(model)
    return 0 if model is None or model["supported"] else 1


def describe_machine_and_backends() -> dict[str, Any]:
    """Versions, and for each device, backend and kind of layer whether it runs there.

    ``attention`` holds a device's dtype and for each backend a list of ``layers`` and the ``reason`` why they do
    not run, None where they do.
    """
    import torch

    cases = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])
    attention = {}
    for device, dtype in cases:
        answers = {
            backend: [{"layers": layers, "reason": reason} for reason, layers in found.items()]
            for backend, found in backend_answers(device, dtype).items()
        }
        attention[device] = {"dtype": str(dtype).removeprefix("torch."), "backends": answers}
    forced = os.environ.get(BACKEND_VARIABLE) or None
    return {"versions": {name: _version(name) for name in PACKAGES}, "attention": attention, "forced_backend": forced}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_machine(machine: dict[str, Any]) -> None:
    for package, version in machine["versions"].items():
        print(f"{package:24}{version or 'not installed'}")
    for device, found in machine["attention"].items():
        print(f"\nattention on {device}, {found['dtype']}; a layer takes the first that says yes:")
        width = max(len(answer["layers"]) for answers in found["backends"].values() for answer in answers) + 2
        for backend, answers in found["backends"].items():
            for answer in answers:
                print(
                    f"  {backend:16}{answer['layers']:{width}}{'no: ' + answer['reason'] if answer['reason'] else 'yes'}"
                )
    if forced := machine["forced_backend"]:
        print(f"\n{BACKEND_VARIABLE}={forced} wins over auto and over the backend that a program asks for")


def backend_answers(device: str, dtype: torch.dtype) -> dict[str, dict[str | None, str]]:
    """For each backend its answers, None for yes or the reason for no, with the layers that get each, in words."""
    from prefix_grouper_plugins.attention import available_backends

    asked = [(name, options, dim) for name, options in LAYERS.items() for dim in HEAD_DIMS]
    found: dict[str, dict[str | None, dict[str, list[int]]]] = {}
    for name, options, dim in asked:
        for backend, reason in available_backends(device, dtype, dim, **options).items():
            found.setdefault(backend, {}).setdefault(reason, {}).setdefault(name, []).append(dim)
    return {
        backend: {reason: _in_words(layers) for reason, layers in answers.items()} for backend, answers in found.items()
    }


def _in_words(layers: dict[str, list[int]]) -> str:
    """``causal``, ``causal with head dim 256``, or ``all layers``."""
    everything = layers.keys() == LAYERS.keys()
    dims = next(iter(layers.values()))
    if everything and all(x == dims for x in layers.values()):
        layers = {"all layers": dims}
    return "; ".join(
        name if tuple(dims) == HEAD_DIMS else f"{name} with head dim {', '.join(map(str, dims))}"
        for name, dims in layers.items()
    )


def describe_model(name: str, config: Any, trust_remote_code: bool) -> dict[str, Any]:
    """How each attention layer of a model would be run, or why it is refused. Builds it without weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from prefix_grouper_plugins.modeling import check_support

    described: dict[str, Any] = {"name": name, "model_type": config.model_type}
    with_images = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # an encoder-decoder, a package that is missing, a config that does not fit together
        return described | {"supported": False, "reasons": [first_line(error)], "notes": [], "layers": []}
    report = check_support(model)
    layers = [{"name": x.name, "attention": x.attention, "backend": x.backend} for x in report.layers]
    return described | {
        "supported": report.supported,
        "reasons": list(report.reasons),
        "notes": list(report.notes),
        "layers": layers if report.supported else [],
    }


def print_model(model: dict[str, Any]) -> None:
    print(f"\n{model['name']} ({model['model_type']}): {'supported' if model['supported'] else 'refused'}")
    for line in (*model["reasons"], *model["notes"]):
        print(f"  {line}")
    widths = [max((len(layer[column]) for layer in model["layers"]), default=0) + 2 for column in ("name", "attention")]
    for layer in model["layers"]:
        print(f"  {layer['name']:{widths[0]}}{layer['attention']:{widths[1]}}{layer['backend']}")


def _print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    sys.exit(main())
