"""The package loads nothing that could run code, and opens no connection: not when imported, not while it runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import tiny
from tests.integrations.trl.training import run_python

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("prefix_grouper_plugins", "integrations", "examples", "benchmarks", "tests/trust")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.resolve() == path  # the integrations are a link inside of the package
]
# Formats that run code when they are read, and what opens connections.
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MODULES |= {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def faults(source: str) -> list[str]:
    """What `source` does that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
                found.append(f"calls {name}")
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("calls torch.load without weights_only=True")
    return found


def test_no_source_reads_pickles_evaluates_text_or_opens_connections():
    assert len(SOURCES) > 100
    assert {str(path): wrong for path in SOURCES if (wrong := faults(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import urllib.request",
        "eval(text)",
        "yaml.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_is_forbidden_is_found(source):
    assert len(faults(source)) == 1
    assert faults("torch.load(path, weights_only=True); import json; numpy.load(path)") == []


# Hooks of the interpreter see every connection and every name that is looked up, from whichever library.
GUARD = """
import os, sys
def guard(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[0] if event.startswith("socket.get") else ""
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname") and isinstance(address, (tuple, str)):
        os.write(2, f"a connection: {event} {arguments}".encode())
        os._exit(1)  # an exception would end no other thread than its own
os.environ.pop("HF_HUB_OFFLINE", None)  # which would hide an attempt
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = False  # of a process that has read the variable
sys.addaudithook(guard)
"""
CONNECTS = "import socket\ndef connect():\n  try: socket.create_connection(('127.0.0.1', 9), timeout=1)\n  except OSError: pass\n"
RUN = """
import importlib, pkgutil, sys
path, data = sys.argv[1:]
import prefix_grouper_plugins
for module in pkgutil.walk_packages(prefix_grouper_plugins.__path__, "prefix_grouper_plugins."):
    if ".verl" not in module.name and "triton" not in module.name:
        importlib.import_module(module.name)
import torch
from transformers import AutoModelForCausalLM
from prefix_grouper_plugins import cli, enable_prefix_grouper, prefix_grouped_logps
model = enable_prefix_grouper(AutoModelForCausalLM.from_pretrained(path))
ids, mask = torch.full((4, 3), 5), torch.ones(4, 3, dtype=torch.long)
prefix_grouped_logps(model, ids, mask, ids, mask)[0].sum().backward()
assert cli.main(["doctor", "--model", path]) == 0
assert cli.main(["plan", data, "--model", path, "--responses", "8"]) == 0
print("no connection")
"""


def test_importing_and_running_opens_no_connection(tmp_path):
    path = tiny.saved_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "w1 w2 w3"}\n' * 4)
    done = run_python(tmp_path, "-c", GUARD + RUN, path, str(data), in_fork=True)
    assert "no connection" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "code",
    [
        CONNECTS + "connect()",
        CONNECTS + "import threading\nthread = threading.Thread(target=connect)\nthread.start()\nthread.join()",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained('no-such-owner/no-such-model')",
    ],
    ids=["a socket", "in a thread", "of the hub"],
)
def test_the_guard_sees_a_connection(tmp_path, code):
    with pytest.raises(AssertionError, match="a connection: socket"):
        run_python(tmp_path, "-c", GUARD + code, in_fork=True)
