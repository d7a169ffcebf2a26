"""The command ``prefix-grouper``: run TRL scripts with sharing, and see what this machine and a model can do."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Encode each prompt of a GRPO group once.

  prefix-grouper trl SCRIPT ... --use_prefix_grouper    run a TRL script with sharing (prefix-grouper trl --help)
  prefix-grouper doctor [--model NAME_OR_PATH]          what this machine can run, and how a model would be run
"""

# What `doctor` asks each backend about.
HEAD_DIMS = (64, 80, 96, 128, 256)
LAYERS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sliding window": {"sliding_window": 4096},
    "softcap": {"softcap": 50.0},
}


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["trl"]:  # everything behind it is the script's, so argparse must not look at it
        try:
            launcher = importlib.import_module("prefix_grouper_plugins.integrations.trl.launch")
        except ModuleNotFoundError as error:
            raise SystemExit(f"{error.name} is not installed: pip install 'prefix-grouper-plugins[trl]'") from error
        launcher.main(arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="prefix-grouper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="{trl,doctor}", required=True)
    commands.add_parser("trl", help="run a TRL script with sharing")
    doctor = commands.add_parser("doctor", help="versions, attention backends, and whether a model is supported")
    doctor.add_argument("--model", help="a model's folder or hub name: only its config is read")
    doctor.add_argument("--trust-remote-code", action="store_true", help="as in transformers")
    options = parser.parse_args(arguments)
    print_machine()
    if options.model:
        print_model(options.model, options.trust_remote_code)


def print_machine() -> None:
    """Versions, devices, and for each attention backend whether it runs here."""
    import torch

    from prefix_grouper_plugins.attention.registry import BACKEND_VARIABLE

    for package in ("prefix-grouper-plugins", "torch", "transformers", "trl", "peft", "verl"):
        try:
            print(f"{package:24}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:24}not installed")
    cases = [("cpu", torch.float32)] + ([("cuda", torch.bfloat16)] if torch.cuda.is_available() else [])
    for device, dtype in cases:
        print(f"\nattention on {device}, {str(dtype).removeprefix('torch.')}; a layer takes the first that says yes:")
        for backend, answers in backend_answers(device, dtype).items():
            for reason, layers in answers.items():
                print(f"  {backend:16}{layers:20}{'yes' if reason is None else f'no: {reason}'}")
    if forced := os.environ.get(BACKEND_VARIABLE):
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


def print_model(name: str, trust_remote_code: bool) -> None:
    """How each attention layer of a model would be run, or why it is refused. Builds it without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefix_grouper_plugins.modeling import check_support

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:  # an encoder-decoder or multimodal model
        print(f"\n{name} ({config.model_type}): refused\n  {str(error).splitlines()[0]}")
        return
    report = check_support(model)
    print(f"\n{name} ({config.model_type}): {'supported' if report.supported else 'refused'}")
    for line in (*report.reasons, *report.notes):
        print(f"  {line}")
    for layer in report.layers:
        print(f"  {layer.name:40}{layer.attention:40}{layer.backend}")


if __name__ == "__main__":
    main()
