"""The command ``prefix-grouper``: run TRL scripts with sharing, and see what this machine and a model can do, what a
batch costs and how fast attention over it is."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from prefix_grouper_plugins.cost import ModelShape

DESCRIPTION = """\
Encode each prompt of a GRPO group once.

  prefix-grouper trl SCRIPT ... --use_prefix_grouper    run a TRL script with sharing (prefix-grouper trl --help)
  prefix-grouper doctor [--model NAME_OR_PATH]          what this machine can run, and how a model would be run
  prefix-grouper plan --prompt 4096 --responses 512     what sharing saves: tokens, FLOPs, memory; nothing is run
  prefix-grouper bench --prompt 4096 --response 512     how fast attention is on this machine, shared and row by row
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
        importlib.import_module("prefix_grouper_plugins.integrations.trl.launch").main(arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="prefix-grouper", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="{trl,doctor,plan,bench}", required=True)
    commands.add_parser("trl", help="run a TRL script with sharing")
    doctor = commands.add_parser("doctor", help="versions, attention backends, and whether a model is supported")
    doctor.add_argument("--model", help="a model's folder or hub name: only its config is read")
    doctor.add_argument("--trust-remote-code", action="store_true", help="as in transformers")
    _add_plan(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        print_plan(options)
        return
    if options.command == "bench":
        print_bench(options)
        return
    print_machine()
    if options.model:
        print_model(options.model, options.trust_remote_code)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser("plan", help="what a batch would cost with sharing and without; nothing is run")
    plan.add_argument("--prompt", type=int, required=True, help="tokens of the prompt")
    plan.add_argument(
        "--responses", type=int, nargs="+", required=True, help="tokens of the responses: one for all, or each"
    )
    plan.add_argument(
        "--group", type=int, help="responses to the prompt, where one length is given for all (default: 8)"
    )
    _add_shape(plan)


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="time attention on this machine, packed and row by row")
    bench.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt (default: 2048)")
    bench.add_argument("--response", type=int, default=128, help="tokens of each response (default: 128)")
    bench.add_argument("--group", type=int, default=8, help="responses to the prompt (default: 8)")
    bench.add_argument("--repeats", type=int, default=3, help="turns that are timed (default: 3)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    _add_shape(bench)


def _add_shape(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--model", help="a model's folder or hub name: only its config is read")
    which.add_argument("--shape", default="qwen2.5-7b", help="a model by name (default: qwen2.5-7b)")


def _shape(options: argparse.Namespace) -> tuple[str, ModelShape]:
    """Name and sizes of the model that the options name."""
    from prefix_grouper_plugins.cost import SHAPES, ModelShape

    if options.model is None:
        if options.shape not in SHAPES:
            raise SystemExit(f"there is no shape {options.shape!r}: choose one of {', '.join(SHAPES)}, or give --model")
        return options.shape, SHAPES[options.shape]
    from transformers import AutoConfig

    try:
        return options.model, ModelShape.from_config(AutoConfig.from_pretrained(options.model))
    except ValueError as error:
        raise SystemExit(f"{options.model}: {error}") from error


def print_plan(options: argparse.Namespace) -> None:
    """Tokens, FLOPs and memory of a training step on one group, packed and row by row."""
    name, shape = _shape(options)
    if options.group is not None and len(options.responses) > 1:
        raise SystemExit("--group goes with one length for all responses; leave it out where each has its own")
    responses = options.responses if len(options.responses) > 1 else options.responses * (options.group or 8)
    from prefix_grouper_plugins.cost import compare
    from prefix_grouper_plugins.layout import PrefixLayout

    try:
        layout = PrefixLayout.from_groups([options.prompt], [responses])
    except ValueError as error:
        raise SystemExit(str(error)) from error
    both = compare(shape, layout, scored=sum(responses))
    print(f"{name}, a prompt of {options.prompt:,} tokens, {len(responses)} responses of {sum(responses):,} in all")
    print(f"\n{'':44}{'shared':>12}{'row by row':>12}{'ratio':>8}")
    for label, field, unit in (
        ("Tokens forwarded", "tokens", 1),
        ("Pairs of query and key, million", "pairs", 1e6),
        ("Training step, TFLOP", "training_flops", 1e12),
        ("  with gradient checkpointing", "checkpointed_training_flops", 1e12),
        ("Keys and values of all layers, GiB", "kv_bytes", 2**30),
        ("Activations kept for the backward, GiB", "activation_bytes", 2**30),
        ("  with gradient checkpointing", "checkpointed_bytes", 2**30),
    ):
        ours, theirs = (getattr(cost, field) / unit for cost in (both.shared, both.ordinary))
        form = ",.0f" if unit in (1, 1e6) else ",.2f"
        print(f"{label:44}{ours:>12{form}}{theirs:>12{form}}{theirs / ours:>8.2f}")
    print(
        f"\nToken ratio {both.token_ratio:.3f}. A training step is at most {both.speedup:.2f} times as fast, at equal "
        "FLOP/s and without padding.\nMemory in bfloat16, without weights, logits and optimizer."
    )


def print_bench(options: argparse.Namespace) -> None:
    """Attention of one layer, forward and backward: each backend that runs here against each row on its own."""
    import torch

    from prefix_grouper_plugins.attention import available_backends
    from prefix_grouper_plugins.bench import Case, describe_machine, row_step, shared_step, take_turns, times_as_fast

    name, shape = _shape(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch {torch.__version__} sees no GPU on this machine")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = (options.prompt, options.response, options.group)
    case = Case(*sizes, shape.num_heads, shape.num_kv_heads, shape.head_dim, device, dtype)
    backends = [b for b, reason in available_backends(device, dtype, shape.head_dim).items() if reason is None]
    print(", ".join(f"{key} {value}" if key != "machine" else value for key, value in describe_machine(device).items()))
    print(
        f"One attention layer of {name}, {str(dtype).removeprefix('torch.')}: {sizes[0]} + {sizes[2]} x {sizes[1]} tokens"
    )
    steps = {"row by row": row_step(case), **{backend: shared_step(case, backend) for backend in backends}}
    timings = take_turns(steps, repeats=options.repeats, device=device)
    print(f"\n{'':16}{'seconds':>10}{'times as fast as row by row':>30}")
    for step, times in timings.items():
        seconds = sorted(timing.wall for timing in times)[len(times) // 2]
        print(f"{step:16}{seconds:>10.4f}{times_as_fast(times, timings['row by row'], 'wall'):>30.2f}")
    print(f"\nThe ratio of visible pairs of query and key, {case.pair_ratio:.2f}, is what sharing can gain here.")


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
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from prefix_grouper_plugins.modeling import check_support

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with_images = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:  # an encoder-decoder
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
