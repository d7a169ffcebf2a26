"""Run an unmodified TRL script with prefix grouping.

    prefix-grouper trl my_script.py ... --use_prefix_grouper
    prefix-grouper trl grpo ... --use_prefix_grouper                 (TRL's own script; rloo likewise)
    accelerate launch -m prefix_grouper_plugins.integrations.trl.launch my_script.py ... --use_prefix_grouper
    torchrun --nproc_per_node 2 -m prefix_grouper_plugins.integrations.trl.launch my_script.py ... --use_prefix_grouper

The flag and its companions may stand before or after the script, or in the YAML file of TRL's --config. They are:

    --use_prefix_grouper [true|false]           share the prompts of a group
    --prefix_grouper_backend BACKEND            attention backend: auto (default), merged_lse, triton, flex, blockwise
    --prefix_grouper_regroup MODE               exact (default), group or none
    --prefix_grouper_rebatch [true|false]       larger micro-batches, fewer accumulation steps, until a group fits
    --prefix_grouper_on_unsupported ACTION      error (default) or fallback
    --prefix_grouper_self_check [true|false]         check on a few tokens that the model can share (default true)

Without any of them the script runs as if it had been started by python itself. With them, `trl.GRPOTrainer` and
`trl.GRPOConfig` (and RLOO's) are the prefix-grouping subclasses from the moment at which the script imports `trl`. Until
then neither torch nor transformers is imported, so the environment variables that a script sets first are heeded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

from prefix_grouper_plugins.import_hooks import after_import
from prefix_grouper_plugins.integrations import trl as ours
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.settings import TRL_OPTIONS

_TRL_SCRIPTS = {"grpo": "trl.scripts.grpo", "rloo": "trl.scripts.rloo"}
_YES, _NO = {"true", "yes", "t", "y", "1"}, {"false", "no", "f", "n", "0"}
# Our modules that put the classes in the place of TRL's, each with what it defines last.
_MODULES = {
    f"{ours.__name__}.config": "PrefixGrouperRLOOConfig",
    f"{ours.__name__}.trainer": "PrefixGrouperRLOOTrainer",
}


def main(argv: list[str] | None = None) -> None:
    """Run the script named in ``argv`` (by default the command line), with or without prefix grouping."""
    options, rest = split_arguments(sys.argv[1:] if argv is None else argv)
    if not rest or rest[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if rest else "prefix-grouper trl: name the script to run, or grpo or rloo for TRL's own")
    target, arguments = _target(rest)
    in_yaml = _options_in_yaml(arguments)
    wanted = bool(options or in_yaml) and _is_on({**in_yaml, **options}.get("use_prefix_grouper", True))
    if wanted or in_yaml:  # TRL's parser would not know our keys in the YAML file, even where they say "off"
        # The script's own parser never sees our options; its config reads them from the environment, where they win
        # over YAML as a command line should.
        os.environ.update({name.upper(): value for name, value in options.items()})
        if importlib.util.find_spec("trl") is None:
            raise SystemExit("trl is not installed: pip install 'prefix-grouper-plugins[trl]'")
        for module in ("trl", *_MODULES):
            after_import(module, _patch_unless_half_imported)
    _run(target, arguments)
    if wanted:
        _warn_if_unused()


def split_arguments(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options by name, and everything else in its order.

    Raises:
        SystemExit: an option of ours is unknown or lacks its value.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        name, has_value, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or not name.startswith(("use_prefix_grouper", "prefix_grouper_")):
            rest.append(token)
        elif name not in TRL_OPTIONS:
            raise SystemExit(f"--{name} is unknown: the options are --{', --'.join(sorted(TRL_OPTIONS))}")
        elif has_value:
            options[name] = value
        elif TRL_OPTIONS[name].is_switch:
            options[name] = waiting.pop(0) if waiting and _is_bool(waiting[0]) else "true"
        elif waiting:
            options[name] = waiting.pop(0)
        else:
            raise SystemExit(f"--{name} needs a value")
    return options, rest


def patch_trl() -> None:
    """Put the prefix-grouping classes in the place of TRL's, wherever a script may import them from."""
    for algorithm in ("grpo", "rloo"):
        for kind in ("trainer", "config"):
            name = f"{algorithm.upper()}{kind.capitalize()}"
            homes = ("trl", "trl.trainer", f"trl.trainer.{algorithm}_trainer", f"trl.trainer.{algorithm}_config")
            for home in map(importlib.import_module, homes):
                if hasattr(home, name):
                    setattr(home, name, getattr(ours, f"PrefixGrouper{name}"))


def _patch_unless_half_imported(_: ModuleType) -> None:
    """Once TRL has been imported. Where our own modules import it, for a script that uses them, once they are done."""
    for name, last in _MODULES.items():
        if name in sys.modules and not hasattr(sys.modules[name], last):
            return
    patch_trl()


def _is_bool(text: str) -> bool:
    return text.lower() in _YES | _NO


def _is_on(value: object) -> bool:
    """
    Raises:
        SystemExit: ``value`` is neither yes nor no.
    """
    if not _is_bool(text := str(value)):
        raise SystemExit(f"--use_prefix_grouper is {text!r}: it takes true or false")
    return text.lower() in _YES


def _target(rest: list[str]) -> tuple[str, list[str]]:
    """What to run (a path, or a module's name) and its arguments."""
    target, *arguments = rest
    if target == "-m":
        if not arguments:
            raise SystemExit("-m needs the name of a module")
        return arguments[0], arguments[1:]
    if target in _TRL_SCRIPTS:
        return _TRL_SCRIPTS[target], arguments
    if not Path(target).is_file():
        raise SystemExit(f"there is no script {target!r}; TRL's own scripts are: {', '.join(_TRL_SCRIPTS)}")
    return target, arguments


def _options_in_yaml(arguments: list[str]) -> dict[str, object]:
    """Our own options in the file given to TRL's ``--config``."""
    for i, token in enumerate(arguments):
        name, has_value, value = token.partition("=")
        path = Path(value if has_value else arguments[i + 1] if i + 1 < len(arguments) else "")
        if name == "--config" and path.is_file():
            import yaml  # a dependency of transformers

            settings = yaml.safe_load(path.read_text())
            return {k: v for k, v in (settings or {}).items() if k in TRL_OPTIONS}
    return {}


def _run(target: str, arguments: list[str]) -> None:
    sys.argv = [target, *arguments]
    if Path(target).is_file():
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _warn_if_unused() -> None:
    trainer = sys.modules.get(f"{ours.__name__}.trainer")  # never imported where the script did not import TRL
    if trainer is None or not trainer.PrefixGrouperMixin.built:
        logger.warning(
            "prefix grouper: the script built no GRPOTrainer or RLOOTrainer of TRL, so nothing was shared. Scripts that "
            "bring a trainer of their own can put PrefixGrouperMixin in front of its base class"
        )


if __name__ == "__main__":
    main()
