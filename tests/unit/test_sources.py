from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ot_federated
from ot_federated.errors import DataError, OtFederatedError, SourceError
from ot_federated.sources import is_local_source, list_files, load_table

rows = [
    {"question": 'Was "it", über\nall?', "answer": 1, "weight": 0.5},
    {"question": "None", "answer": 0, "weight": 2.0},
    {"question": "", "answer": 3, "weight": -1.5},
]


def as_json_lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values).encode()


def as_json(values: list[dict[str, Any]]) -> bytes:
    return json.dumps(values, indent=2).encode()


def as_csv(values: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(values[0]))
    writer.writeheader()
    writer.writerows(values)
    return stream.getvalue().encode()


def as_parquet(values: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(values), stream)
    return stream.getvalue()


writers: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_json_lines,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", writers)
def test_formats_give_the_same_rows(tmp_path: Path, kind: str, *, packed: bool) -> None:
    data = writers[kind](rows)
    path = tmp_path / (f"a.{kind}.gz" if packed else f"a.{kind}")
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)
    table = load_table(str(path), split="test", columns=["question", "answer"])
    assert table.to_list() == rows
    assert table.cache_files == []


def test_json_may_be_one_object_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + as_json_lines(rows) + b"\n  \n")
    assert load_table(str(tmp_path / "a.json"), split=None).to_list() == rows


def test_lists_and_missing_keys_survive(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"c": ["x", "y"]}\n{"c": [], "id": "7"}\n')
    table = load_table(str(tmp_path / "a.jsonl"), split=None)
    assert table.to_list() == [{"c": ["x", "y"], "id": None}, {"c": [], "id": "7"}]


def test_text_is_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\nthr\u2028ee\n".encode())
    table = load_table(str(tmp_path / "a.txt"), split=None, columns=["text"])
    assert table.to_list() == [{"text": "one"}, {"text": ""}, {"text": "thr\u2028ee"}]


def test_glob_is_read_in_order_of_the_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name, number in (("sub/c.jsonl", 2), ("b.jsonl", 1.5), ("a.jsonl", 0)):
        (tmp_path / name).write_text(json.dumps({"n": number}) + "\n")
    assert load_table("*.jsonl", split=None)["n"] == [0.0, 1.5]
    assert [str(path) for path in list_files("**/*.jsonl")] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert list_files(str(tmp_path / "sub" / "?.jsonl")) == [tmp_path / "sub" / "c.jsonl"]


def test_a_files_own_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("x\n")
    assert list_files(str(path)) == [path]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("no*.csv", r"'no\*\.csv' matches no file"),
        ("./nowhere", "does not exist"),
        ("~/nowhere/at/all", "does not exist"),
    ],
)
def test_missing_files_name_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=said) as caught:
        load_table(source, split=None)
    assert f"working directory: {tmp_path}" in str(caught.value)


def test_directories_and_unknown_formats_are_answered(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a directory.*\*\.jsonl"):
        load_table(str(tmp_path), split=None)
    (tmp_path / "a.tsv").write_text("a\tb\n")
    with pytest.raises(SourceError, match=r"a\.tsv has no known format.*\.json, \.jsonl, \.csv"):
        load_table(str(tmp_path / "a.tsv"), split=None)
    with pytest.raises(SourceError, match="source is empty"):
        load_table("", split=None)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"q": "SECRET"}\n{"q": SECRET}\n', "line 2 is not JSON: Expecting value"),
        ("a.jsonl", b'{"q": "SECRET"}\n["SECRET"]\n', "entry 2 is not a JSON object but list"),
        ("a.jsonl", b'{"q": "SECRET"}\n{"q": 3}\n', r"'q' have no common type \(int, str\)"),
        ("a.jsonl", b'{"q": ["SECRET"]}\n{"q": [3]}\n', "'q' have no common type"),
        ("a.jsonl", b'{"q": "SECRET\\ud800"}\n', "no valid text"),
        ("a.jsonl", b'{"q": 99999999999999999999999}\n{"q": "SECRET"}\n', "64-bit"),
        ("a.jsonl", b'{"q": "SECRET\xff"}\n', r"not UTF-8 \(byte 13\)"),
        ("a.jsonl", b'{"q":' * 3 + b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"q": "SECRET"},\n{"q": SECRET}]', r"not JSON \(line 2: Expecting value\)"),
        ("a.json", b'{\n"rows": ["SECRET"]}', "line 1 is not JSON.*Write one JSON object a line"),
        ("a.csv", b"q,a\nx,1\nSECRET,2,SECRET\n", r"no valid \.csv file: row 3 has another number"),
        ("a.csv", b"q,a\nSECRET\xff,1\n", r"not UTF-8 \(byte 10\)"),
        ("a.parquet", b"SECRET" * 9, r"no valid \.parquet file"),
        ("a.txt", b"SECRET\xff\n", "not UTF-8"),
        ("a.txt.gz", b"SECRET", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"SECRET" * 99, mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_damaged_rows_are_placed_and_never_quoted(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        load_table(str(tmp_path / name), split=None)
    assert str(tmp_path / name) in str(caught.value)
    # The whole of what a log would show, causes included.
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_files_that_disagree_name_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "SECRET", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"q": 1, "n": 2}\n')
    with pytest.raises(DataError, match=r"\(q: int64, string\)"):
        load_table(str(tmp_path / "*.jsonl"), split=None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="has no rows"):
        load_table(str(tmp_path / name), split=None)


def test_missing_columns_name_the_nearest_and_the_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_json_lines(rows))
    with pytest.raises(DataError) as caught:
        load_table(str(tmp_path / "a.jsonl"), split=None, columns=["answer", "questions", "text"])
    message = str(caught.value)
    assert "has no column 'questions', 'text' (did you mean 'question'?)" in message
    assert "it has: question, answer, weight." in message
    assert "data.question-column='question'" in message


def test_what_reads_as_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "set").write_text("")
    local = ["a.jsonl", "data/*.parquet", "/data/x", "./x", "~/x", "x.txt.gz", "owner/set"]
    assert [is_local_source(source) for source in local] == [True] * len(local)
    hub = ["owner/other", "squad", "owner/set-2:main:train", "ai2_arc:ARC-Easy"]
    assert [is_local_source(source) for source in hub] == [False] * len(hub)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the hub: it has one set with splits train and test, and notes how it was asked."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, revision: str | None) -> datasets.DatasetDict:
        asked.append((path, name, revision))
        if path != "owner/set":
            raise ConnectionError("Couldn't reach the Hub.\nDetails.")
        splits = ("train", "test") if name != "single" else ("validation",)
        return datasets.DatasetDict({split: datasets.Dataset.from_list([{"q": split}]) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "split", "revision", "got", "asked"),
    [
        ("owner/set", "test", "", "test", ("owner/set", None, None)),
        ("owner/set:main", None, "v1", "train", ("owner/set", "main", "v1")),
        ("owner/set:main:test", "train", "", "test", ("owner/set", "main", None)),
        ("owner/set::test", "train", "", "test", ("owner/set", None, None)),
        ("owner/set:single", None, "", "validation", ("owner/set", "single", None)),
    ],
)
def test_hub_ids(
    hub: list[tuple[Any, ...]], source: str, split: str | None, revision: str, got: str, asked: tuple[Any, ...]
) -> None:
    assert load_table(source, split=split, columns=["q"], revision=revision).to_list() == [{"q": got}]
    assert hub == [asked]


def test_hub_errors_say_what_to_do(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(SourceError, match="has no split 'validation'; it has: train, test"):
        load_table("owner/set", split="validation")
    with pytest.raises(SourceError, match=r"Couldn't reach the Hub\. It was read as a hub id.*local file"):
        load_table("owner/sett", split="train")
    with pytest.raises(SourceError, match=r"ID\[:CONFIG\[:SPLIT\]\]"):
        load_table("owner/set:a:b:c", split="train")


def test_revision_of_a_file_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.warns(UserWarning, match="revision='v1' is ignored"):
        load_table(str(tmp_path / "a.txt"), split=None, revision="v1")


def run_isolated(tmp_path: Path, code: str) -> str:
    """Run code in a new process whose home, caches and temporary directory are empty ones of its own."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "OT_FEDERATED_CACHE"), str(home))
    root = str(Path(ot_federated.__file__).parents[1])
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_private_files_are_copied_nowhere(tmp_path: Path) -> None:
    (tmp_path / "private.jsonl").write_bytes(as_json_lines(rows))
    code = (
        "from ot_federated.sources import load_table\n"
        "table = load_table('private.jsonl', split='train')\n"
        "print(table.map(lambda row: {'n': len(row['question'])}).shuffle(seed=0).select([0, 1]).num_rows)"
    )
    assert run_isolated(tmp_path, code).strip() == "2"
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


def test_hub_without_network_is_a_source_error(tmp_path: Path) -> None:
    code = (
        "from ot_federated.sources import load_table\n"
        "from ot_federated.errors import SourceError\n"
        "try: load_table('some-owner/some-set', split='train')\n"
        "except SourceError as error: print(error)"
    )
    message = run_isolated(tmp_path, code)
    assert "'some-owner/some-set' could not be loaded" in message
    assert "connect to the hub once" in message


def test_every_error_is_one_that_users_may_see() -> None:
    assert issubclass(DataError, OtFederatedError)
    assert issubclass(SourceError, OtFederatedError)
