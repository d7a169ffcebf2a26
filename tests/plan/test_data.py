"""Prompts and lengths are read from what trainings have, and mistakes are named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefix_grouper_plugins.plan.data import draw_lengths, read_lengths, read_prompts, read_records, tokenizer_of
from prefix_grouper_plugins.usage import UsageError
from tests import tiny

ROWS = [{"prompt": "w0 w1 w2", "answer": "x"}, {"prompt": "w0 w3", "answer": "y"}]
CHAT = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1 w2"}]
WHITESPACE = tokenizer_of("whitespace")


def saved(folder: Path, kind: str) -> Path:
    """``ROWS`` in a file of this kind."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        datasets = pytest.importorskip("datasets")
        whole = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict(test=whole.select([0]), train=whole) if kind == "splits" else whole).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "splits"])
def test_rows_are_read_from_each_kind_of_file(tmp_path: Path, kind: str) -> None:
    assert list(read_records(saved(tmp_path, kind))) == ROWS


def test_prompts_are_tokenized_as_the_tokenizer_does_it(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w20{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "w0 w1 w2"}) + "\n\n" + json.dumps({"prompt": CHAT}) + "\n")
    found = read_prompts(path, tokenizer_of(str(tmp_path / "tokenizer")))
    expected = [tokenizer("w0 w1 w2")["input_ids"], tokenizer("w5 w1 w2 w20")["input_ids"]]
    assert [ids.tolist() for ids in found] == expected


def test_whitespace_gives_equal_words_equal_ids(tmp_path: Path) -> None:
    path = saved(tmp_path, "jsonl")
    (a, b) = read_prompts(path, WHITESPACE)
    assert len(a) == 3 and len(b) == 2 and a[0] == b[0] and a[1] != b[1]
    assert len(WHITESPACE(CHAT)) == 5  # the roles too
    assert len(read_prompts(path, WHITESPACE, limit=1)) == 1
    assert len(read_prompts(path, WHITESPACE, column="answer")[0]) == 1


@pytest.mark.parametrize(
    ("name", "content", "lengths"),
    [
        ("a.txt", "3\n5 7\n", [3, 5, 7]),
        ("a.json", "[3, 5]", [3, 5]),
        ("a.jsonl", '{"output": "a b c", "score": 1}\n{"output": "a", "score": 2}', [3, 1]),
        ("a.jsonl", '{"completion": [{"role": "assistant", "content": "a b"}]}', [3]),
        ("a.jsonl", '{"length": 9}', [9]),
    ],
)
def test_lengths_of_responses_come_from_files(tmp_path: Path, name: str, content: str, lengths: list[int]) -> None:
    (tmp_path / name).write_text(content)
    assert read_lengths([str(tmp_path / name)], WHITESPACE) == lengths


def test_lengths_are_drawn_from_the_samples_alone() -> None:
    drawn = draw_lengths([3, 8], 200, seed=0)
    assert set(drawn) == {3, 8} and drawn == draw_lengths([3, 8], 200, seed=0) != draw_lengths([3, 8], 200, seed=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "it has no rows"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "row 1 is [1], where an object"),
        ("a.jsonl", '{"text": "a"}', "none of its columns is called prompt, messages, question, query, input; name one of text"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "a"}', "row 2 has no column 'prompt'; it has text"),
        ("a.jsonl", '{"prompt": 3}', "'prompt' of row 1 is neither text nor a list of messages"),
        ("a.jsonl", '{"prompt": " "}', "'prompt' of row 1 is empty"),
        ("a.json", "{}", "holds one list of rows"),
        ("a.csv", "a,b", "give a .jsonl, .json or .parquet file"),
        ("a.parquet", "no parquet", "it cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_data_is_told_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as stopped:
        read_prompts(tmp_path / name, WHITESPACE)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["0"], "the smallest of which is 0"),
        (["3", "a.txt"], "give numbers of tokens, or one file of samples"),
        (["missing.txt"], "there is no such file"),
        (["missing.jsonl"], "there is no such file or folder"),
    ],
)
def test_responses_that_are_no_lengths_are_told_in_one_line(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_lengths(given, WHITESPACE)


def test_a_tokenizer_without_a_chat_template_says_so(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    tokenize: Any = tokenizer_of(str(tmp_path))
    with pytest.raises(UsageError, match="its chat template refuses a prompt: "):
        tokenize(CHAT)
    with pytest.raises(UsageError, match="--tokenizer no/such: it cannot be read: "):
        tokenizer_of("no/such")
