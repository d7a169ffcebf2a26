"""Run an unmodified TRL script with prefix grouping.

    prefix-grouper trl my_script.py ... --use_prefix_grouper
    prefix-grouper trl grpo ... --use_prefix_grouper                 (TRL's own script; also rloo, dpo, kto and reward)
    accelerate launch -m prefix_grouper_plugins.integrations.trl.launch my_script.py ... --use_prefix_grouper
    torchrun --nproc_per_node 2 -m prefix_grouper_plugins.integrations.trl.launch my_script.py ... --use_prefix_grouper

The options may come before or after the script, or in the YAML file of TRL's --config:

    --use_prefix_grouper [true|false]           share the prompts of a group
    --prefix_grouper_share WHAT                 auto (default), prompt, or tree: sampled tokens too
    --prefix_grouper_backend BACKEND            attention backend: auto (default), merged_lse, triton, flex, blockwise
    --prefix_grouper_regroup MODE               exact (default), group or none
    --prefix_grouper_max_tokens N               tokens of one forward; auto (default): those of a padded micro-batch
    --prefix_grouper_on_unsupported ACTION      error (default) or fallback
    --prefix_grouper_generation [true|false]    without vLLM, prefill each distinct prompt once (default true)
    --prefix_grouper_self_check [true|false]    check on a few tokens that the model can share (default true)
    --prefix_grouper_verify WHEN                compare a real micro-batch with the ordinary path: off (default), first, or
                                                a number N for every N-th optimizer step

Hyphens work as well as underscores. A misspelt option is an error. Without any of these options the script runs as under
plain python. With them, the script gets our subclasses when it imports TRL's trainers and configs: GRPO, RLOO, DPO, KTO,
reward models, and the experimental ORPO, CPO, TPO, OnlineDPO, SDPO and SDFT. Nothing heavy is imported before that, so
environment variables that the script sets first take effect.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from prefix_grouper_plugins.import_hooks import after_import
from prefix_grouper_plugins.integrations import trl as ours
from prefix_grouper_plugins.integrations.trl.algorithms import ALGORITHMS, NOTHING_TO_SHARE, modules_of
from prefix_grouper_plugins.metrics import logger
from prefix_grouper_plugins.settings import TRL_OPTIONS, misspelt_variables, nearest_option
from prefix_grouper_plugins.usage import UsageError, errors_in_one_line
from prefix_grouper_plugins.version import __version__

_TRL_SCRIPTS = {name: f"trl.scripts.{name}" for name in ("grpo", "rloo", "dpo", "kto", "reward", "sft")}
_YES, _NO = {"true", "yes", "t", "y", "1"}, {"false", "no", "f", "n", "0"}
# Hyphens, and the dashes that word processors make of them.
_DASHES = "-\N{EN DASH}\N{EM DASH}"
# Our modules that put the classes in the place of TRL's, each with what it defines last.
_MODULES = {
    f"{ours.__name__}.config": "PrefixGrouperRLOOConfig",
    f"{ours.__name__}.trainer": "PrefixGrouperRLOOTrainer",
}
# Of TRL, with the class that is replaced as soon as each has been imported. Its packages take the class from there.
_SAID: set[str] = set()  # trainers that have said that they share nothing
_ROWS = {
    module: f"{name}{kind}"
    for kind in ("Trainer", "Config")
    for name in ALGORITHMS
    for module in modules_of(name, kind)
}


def main(argv: list[str] | None = None) -> None:
    """Run the script named in ``argv`` (by default the command line), with or without prefix grouping.

    Raises:
        UsageError: nothing to run, or an option of ours that is misspelt or has a wrong value.
    """
    with errors_in_one_line():
        target, arguments, wanted = _prepare(sys.argv[1:] if argv is None else argv)
    try:
        _run(target, arguments)
    except SystemExit as end:  # sys.exit(main())
        if wanted and not end.code:
            _warn_if_unused()
        raise
    if wanted:
        _warn_if_unused()


def _prepare(argv: list[str]) -> tuple[str, list[str], bool]:
    """What to run, its arguments, and whether sharing is asked for; sets the hooks that turn it on."""
    options, rest = split_arguments(argv)
    if not rest or rest[0] in ("-h", "--help"):
        print(__doc__)
        if rest:
            raise SystemExit(0)
        raise UsageError(f"prefix-grouper trl: name the script to run, or one of TRL's own: {', '.join(_TRL_SCRIPTS)}")
    if rest[0] == "--version":
        print(f"prefix-grouper-plugins {__version__}")
        raise SystemExit(0)
    target, arguments = _target(rest)
    in_yaml = _options_in_yaml(arguments)
    switch = "use_prefix_grouper"
    if slips := misspelt_variables(os.environ):
        raise UsageError(slips[0])
    in_environment = {switch: os.environ[switch.upper()]} if switch.upper() in os.environ else {}
    if in_environment:
        _check(switch, in_environment[switch], switch.upper())
    given = {**in_yaml, **in_environment, **options}
    wanted = bool(given) and _is_yes(given.get(switch, True))
    if not given and (unused := next((name for name in map(str.upper, TRL_OPTIONS) if name in os.environ), None)):
        logger.warning("prefix grouper: %s is set, and sharing is off: add --%s", unused, switch)
    if wanted or in_yaml:  # TRL's parser would not know our keys in the YAML file, even where they say "off"
        # The script's own parser never sees our options; its config reads them from the environment, where they win
        # over YAML as a command line should.
        os.environ.update({name.upper(): value for name, value in options.items()})
        if importlib.util.find_spec("trl") is None:
            raise UsageError("trl is not installed: pip install 'prefix-grouper-plugins[trl]'")
        for module in ("trl", *_MODULES):
            after_import(module, _patch_unless_half_imported)
        for module in _ROWS:
            after_import(module, _patch_rows_trainer)
        for module in NOTHING_TO_SHARE:
            after_import(module, _say_that_nothing_is_shared)
    return target, arguments, wanted


def split_arguments(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Our own options by name, and everything else in its order.

    Raises:
        UsageError: an option of ours is misspelt, lacks its value or has a wrong one.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(argv)
    while waiting:
        token = waiting.pop(0)
        name, has_value, value = _option_name(token)
        if name is None:
            rest.append(token)
            continue
        if not has_value:
            if TRL_OPTIONS[name].is_switch:
                value = waiting.pop(0) if waiting and _is_bool(waiting[0]) else "true"
            elif waiting:
                value = waiting.pop(0)
            else:
                raise UsageError(f"--{name} needs a value")
        _check(name, value, f"--{name}")
        options[name] = value
    return options, rest


def _option_name(token: str) -> tuple[str | None, bool, str]:
    """The option of ours in an argument, None if it is another's; whether a value follows an equals sign, and it."""
    key, equals, value = token.partition("=")
    if not key or key[0] not in _DASHES:
        return None, False, ""
    name = key.removeprefix("--").replace("-", "_")
    if key.startswith("--") and name in TRL_OPTIONS:
        return name, bool(equals), value
    if nearest := nearest_option(key):
        listed = ", --".join(sorted(TRL_OPTIONS))
        raise UsageError(f"{key} is unknown: the options are --{listed}; did you mean --{nearest}?")
    return None, False, ""


def _check(name: str, value: object, called: str) -> None:
    """
    Args:
        name: of an option of ours.
        value: from the command line, the environment or YAML.
        called: what the user calls the option.

    Raises:
        UsageError: the option does not take ``value``.
    """
    setting = TRL_OPTIONS[name]
    if setting.is_switch and not _is_bool(value):
        raise UsageError(f"{called} is {str(value)!r}: it takes true or false")
    try:
        setting.check(value, called)
    except ValueError as error:
        raise UsageError(str(error)) from error


def patch_trl() -> None:
    """Put the prefix-grouping classes in the place of TRL's, wherever a script may import them from."""
    for algorithm in ("grpo", "rloo"):
        for kind in ("trainer", "config"):
            name = f"{algorithm.upper()}{kind.capitalize()}"
            homes = ("trl", "trl.trainer", f"trl.trainer.{algorithm}_trainer", f"trl.trainer.{algorithm}_config")
            for home in map(importlib.import_module, homes):
                if hasattr(home, name):
                    setattr(home, name, getattr(ours, f"PrefixGrouper{name}"))


def _patch_rows_trainer(module: ModuleType) -> None:
    """Put our subclass in the place of the one class that ``module``, of TRL, is there for."""
    from prefix_grouper_plugins.integrations.trl.trainers import shared_class

    name = _ROWS[module.__name__]
    setattr(module, name, shared_class(f"PrefixGrouper{name}", getattr(module, name)))


def _say_that_nothing_is_shared(module: ModuleType) -> None:
    """Let the trainer of ``module``, whose rows have no prompt in common, say so once it is built."""
    trainer = getattr(module, NOTHING_TO_SHARE[module.__name__])
    build = trainer.__init__

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        _SAID.add(trainer.__name__)
        logger.warning(
            "prefix grouper: nothing is shared by %s, which forwards one completion of each prompt: it trains as without "
            "use_prefix_grouper",
            type(self).__name__,
        )

    trainer.__init__ = built


def _patch_unless_half_imported(_: ModuleType) -> None:
    """Once TRL has been imported. Where our own modules import it, for a script that uses them, once they are done."""
    for name, last in _MODULES.items():
        if name in sys.modules and not hasattr(sys.modules[name], last):
            return
    patch_trl()


def _is_bool(value: object) -> bool:
    return str(value).lower() in _YES | _NO


def _is_yes(value: object) -> bool:
    return str(value).lower() in _YES


def _target(rest: list[str]) -> tuple[str, list[str]]:
    """What to run (a path, or a module's name) and its arguments."""
    target, *arguments = rest
    if target == "-m":
        if not arguments:
            raise UsageError("-m needs the name of a module")
        return arguments[0], arguments[1:]
    if target in _TRL_SCRIPTS:
        return _TRL_SCRIPTS[target], arguments
    if not Path(target).is_file():
        raise UsageError(f"there is no script {target!r}; TRL's own scripts are: {', '.join(_TRL_SCRIPTS)}")
    return target, arguments


def _options_in_yaml(arguments: list[str]) -> dict[str, object]:
    """Our own options in the file given to TRL's ``--config``.

    Raises:
        UsageError: a key of the file looks like an option of ours and is none, or its value is wrong.
    """
    found: dict[str, object] = {}
    for i, token in enumerate(arguments):
        name, has_value, value = token.partition("=")
        path = Path(value if has_value else arguments[i + 1] if i + 1 < len(arguments) else "")
        if name != "--config" or not path.is_file():
            continue
        import yaml  # a dependency of transformers

        settings = yaml.safe_load(path.read_text())
        for key, value in settings.items() if isinstance(settings, dict) else ():
            if key in TRL_OPTIONS:
                _check(key, value, f"{key} in {path}")
                found[key] = value
            elif nearest := nearest_option(str(key)):  # hyphens too: TRL's own parser reads the file, and takes none
                raise UsageError(f"{key} in {path} is unknown: did you mean {nearest}?")
    return found


def _run(target: str, arguments: list[str]) -> None:
    sys.argv = [target, *arguments]
    if Path(target).is_file():
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _warn_if_unused() -> None:
    built = 0
    for module, mixin in (("trainer", "PrefixGrouperMixin"), ("rows_trainer", "ShareRowsMixin")):
        found = sys.modules.get(f"{ours.__name__}.{module}")  # never imported where the script did not import TRL
        built += 0 if found is None else getattr(found, mixin).built
    if not built and not _SAID:
        logger.warning(
            "prefix grouper: the script built no trainer of TRL that shares prompts (GRPOTrainer, DPOTrainer and others), so "
            "nothing was shared. Scripts with a trainer of their own can put PrefixGrouperMixin or ShareRowsMixin in front "
            "of its base class"
        )


if __name__ == "__main__":
    main()
