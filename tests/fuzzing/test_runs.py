"""A run of the fuzzer: it keeps what it found, beside the inputs that have a name, and counts what it did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzzing.__main__ import is_found, keep_row, list_words, run_target


def test_a_run_keeps_what_the_seeds_do_not_reach(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    named = tmp_path / "corpus" / "anchor" / "infinite-count"
    named.parent.mkdir(parents=True)
    named.write_bytes(b'{"dataset": "d", "num_entries": Infinity, "sha256": ""}')
    row = run_target("anchor", executions=300, corpus=tmp_path / "corpus", crashes=tmp_path / "crashes", seed=1)
    assert {key: row[key] for key in ("target", "crashes", "hangs")} == {"target": "anchor", "crashes": 0, "hangs": 0}
    assert 290 <= row["executions"] <= 310
    assert named.is_file()
    found = [path for path in named.parent.iterdir() if is_found(path)]
    assert found
    assert all(path.stat().st_size <= 512 for path in found)


def test_a_row_takes_the_place_of_its_targets_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations.benchmarks import fault_results

    path, update, read = tmp_path / "faults.json", fault_results.update_results, fault_results.read_part
    monkeypatch.setattr(
        fault_results, "update_results", lambda part, rows, *, command: update(part, rows, command=command, path=path)
    )
    monkeypatch.setattr(fault_results, "read_part", lambda part: read(part, path=path))
    for target, executions in (("policy", 1), ("manifest", 2), ("policy", 3)):
        keep_row({"target": target, "executions": executions}, command="again")
    rows = [{"target": "manifest", "executions": 2}, {"target": "policy", "executions": 3}]
    assert read("fuzzing", path=path) == rows
    assert read("stages", path=path) is None


def test_words_are_those_of_the_seeds() -> None:
    assert list_words([b'{"max-rounds": 1}', b"max-rounds = true"]) == ["max-rounds", "true"]


planted = """
import sys
from dataclasses import replace
from tests.fuzzing import __main__ as fuzzing

def parse(data):
    if data[:1] == b"B":
        raise IndexError("planted")

fuzzing.targets["anchor"] = replace(fuzzing.targets["anchor"], build=lambda: parse)
fuzzing.fuzz_here("anchor", sys.argv[1:])
"""


def test_a_crash_stops_its_target_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every report of no crash rests on it: a parser with a mistake in it is found to have one."""
    pytest.importorskip("atheris")
    script = tmp_path / "planted.py"
    script.write_text(planted)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr("tests.fuzzing.__main__.fuzzer_command", lambda name: [sys.executable, str(script)])
    crashes = tmp_path / "crashes"
    row = run_target("anchor", executions=100_000, corpus=tmp_path / "corpus", crashes=crashes, seed=1)
    assert (row["crashes"], row["hangs"]) == (1, 0)
    assert 0 < row["executions"] < 100_000
    (kept,) = crashes.glob("anchor-crash-*")
    assert kept.read_bytes()[:1] == b"B"
    assert "IndexError: planted" in (crashes / "anchor.log").read_text()


def test_a_fuzzer_that_does_not_start_is_no_fuzzing_without_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzzing.__main__.fuzzer_command", lambda name: [sys.executable, "-c", "print('no')"])
    with pytest.raises(RuntimeError, match="fuzzer of anchor did not run; it said: no"):
        run_target("anchor", executions=10, corpus=tmp_path / "corpus", crashes=tmp_path, seed=1)
