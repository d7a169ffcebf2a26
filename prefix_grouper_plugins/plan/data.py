"""Prompts as token ids, and lengths of responses, from files that a training has already.

Files of JSON lines or one JSON list, parquet, and folders that ``datasets`` has saved. Parquet needs pyarrow, folders need
datasets; both come with TRL and verl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefix_grouper_plugins.usage import UsageError, first_line

PROMPT_COLUMNS = ("prompt", "messages", "question", "query", "input")
RESPONSE_COLUMNS = ("completion", "response", "output", "completion_length", "response_length", "length")
WHITESPACE = "whitespace"  # the tokenizer that needs no files: words between spaces

Tokenize = Callable[[Any], list[int]]  # of a text, or of a list of messages


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of a folder that ``datasets.save_to_disk`` wrote (of several splits: ``train``).

    Raises:
        UsageError: there is no such file, or it cannot be read as what its name says.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such file or folder")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".parquet": _parquet}
    reader = _datasets_folder if path.is_dir() else readers.get(path.suffix)
    if reader is None:
        raise UsageError(f"{path}: give a .jsonl, .json or .parquet file, or a folder that datasets.save_to_disk wrote")
    try:
        yield from reader(path)
    except ModuleNotFoundError as error:
        raise UsageError(f"{path}: reading it needs the package {error.name}: pip install {error.name}") from error
    except UsageError:
        raise
    except Exception as error:  # of a parser, for which there are many classes
        raise UsageError(f"{path}: it cannot be read: {first_line(error)}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path}: line {number} is not JSON: {error}") from error


def _json(path: Path) -> Iterator[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list):
        raise UsageError(f"{path}: a .json file holds one list of rows; name it .jsonl if each line is a row")
    yield from found


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _datasets_folder(path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    yield from found


# ------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(
    path: Path, tokenize: Tokenize, *, column: str | None = None, limit: int | None = None
) -> list[Tensor]:
    """Token ids of each prompt, ``LongTensor[P]``.

    Args:
        path: see :func:`read_records`.
        tokenize: of :func:`tokenizer_of`.
        column: where the prompts are, by default the first of ``PROMPT_COLUMNS`` that the first row has.
        limit: prompts to read, None for all.

    Raises:
        UsageError: no row, no such column, or a prompt that is empty or neither text nor messages.
    """
    prompts = []
    for number, record in enumerate(islice(read_records(path), limit), 1):
        if not isinstance(record, dict):
            raise UsageError(f"{path}: row {number} is {record!r}, where an object with a column of prompts is needed")
        column = column or _column(path, record, PROMPT_COLUMNS, "--prompt-column")
        if column not in record:
            raise UsageError(f"{path}: row {number} has no column {column!r}; it has {', '.join(record)}")
        value = record[column]
        if not isinstance(value, (str, list)):
            raise UsageError(f"{path}: {column!r} of row {number} is neither text nor a list of messages")
        ids = tokenize(value)
        if not ids:
            raise UsageError(f"{path}: {column!r} of row {number} is empty")
        prompts.append(torch.tensor(ids))
    if not prompts:
        raise UsageError(f"{path}: it has no rows")
    return prompts


def _column(path: Path, record: dict[str, Any], names: Sequence[str], option: str) -> str:
    found = next((name for name in names if name in record), None)
    if found is None:
        raise UsageError(
            f"{path}: none of its columns is called {', '.join(names)}; name one of {', '.join(record)} by {option}"
        )
    return found


def tokenizer_of(name: str) -> Tokenize:
    """Token ids as TRL makes them: texts as they are, messages through the chat template with a generation prompt.

    Args:
        name: a tokenizer's folder or hub name, or ``whitespace`` for an estimate: one token for each word between spaces.

    Raises:
        UsageError: there is no such tokenizer, or it has no chat template for messages.
    """
    if name == WHITESPACE:
        ids: dict[str, int] = {}
        return lambda value: [ids.setdefault(word, len(ids)) for word in _words(value)]
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of the hub, of a parser
        raise UsageError(f"--tokenizer {name}: it cannot be read: {first_line(error)}") from error

    def tokenize(value: str | list[Any]) -> list[int]:
        if isinstance(value, str):
            return list(tokenizer(value)["input_ids"])
        try:
            found = tokenizer.apply_chat_template(value, add_generation_prompt=True, tokenize=True, return_dict=True)
        except Exception as error:  # of the template's own language
            raise UsageError(f"--tokenizer {name}: its chat template refuses a prompt: {first_line(error)}") from error
        return list(found["input_ids"])

    return tokenize


def _words(value: str | list[Any]) -> list[str]:
    if isinstance(value, str):
        return value.split()
    return [word for message in value for word in (str(message["role"]), *str(message["content"]).split())]


# ----------------------------------------------------------------------------------------------------------- responses


def read_lengths(given: Sequence[str], tokenize: Tokenize, column: str | None = None) -> list[int]:
    """Lengths of responses, of which every row of a training gets one: numbers, or those in a file.

    Args:
        given: numbers of tokens, or one path: a text file with a number in each line, or what :func:`read_records` reads,
            with a column of lengths, of texts, or of lists of messages (what TRL's ``log_completions`` and verl's
            ``rollout_data_dir`` write).
        tokenize: for texts.
        column: where they are, by default the first of ``RESPONSE_COLUMNS``.

    Raises:
        UsageError: neither numbers from 1 on nor a file of them.
    """
    if all(text.isdecimal() for text in given):
        lengths = [int(text) for text in given]
    elif len(given) > 1:
        raise UsageError(f"--responses {' '.join(given)}: give numbers of tokens, or one file of samples")
    else:
        path = Path(given[0])
        lengths = _lengths_in(path, tokenize, column)
    if not lengths or min(lengths) < 1:
        raise UsageError(f"--responses: there are {len(lengths)} lengths, the smallest of which is {min(lengths, default=0)}; "
                         "each must be at least 1")  # fmt: skip
    return lengths


def _lengths_in(path: Path, tokenize: Tokenize, column: str | None) -> list[int]:
    if path.suffix == ".txt":
        if not path.exists():
            raise UsageError(f"--responses {path}: there is no such file")
        words = path.read_text(encoding="utf-8").split()
        wrong = next((word for word in words if not word.isdecimal()), None)
        if wrong is not None:
            raise UsageError(f"--responses {path}: {wrong!r} is not a number of tokens")
        return [int(word) for word in words]
    lengths: list[int] = []
    for number, record in enumerate(read_records(path), 1):
        value: Any = record
        if isinstance(record, dict):
            column = column or _column(path, record, RESPONSE_COLUMNS, "--response-column")
            value = record.get(column)
        if isinstance(value, (str, list)):
            lengths.append(max(len(tokenize(value)), 1))
        elif isinstance(value, (int, float)) and value == int(value):
            lengths.append(int(value))
        else:
            raise UsageError(f"--responses {path}: row {number} has {value!r}, neither a number of tokens nor text")
    return lengths


def draw_lengths(lengths: Sequence[int], count: int, seed: int) -> list[int]:
    """``count`` of ``lengths``, drawn with replacement."""
    return np.random.default_rng(seed).choice(np.array(lengths), count).tolist()  # type: ignore[no-any-return]
