"""The audit trail's file: what a line holds, and what becomes of damaged lines and other formats."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from ot_federated.cli import main
from ot_federated.data_owner.audit_trail import (
    Entry,
    TrailError,
    append_entry,
    choose_trail,
    describe_content,
    format_version,
    read_trail,
)
from ot_federated.privacy_guarantee import Guarantee

guarantee = Guarantee(epsilon=1.25, delta=1e-5, unit="example", adjacency="add-remove-one", sampling="poisson")


def build_entry(**changes: object) -> Entry:
    values = {
        "message": "train",
        "client": "ward-7",
        "flower_run": "77",
        "run": "run-a",
        "server_round": 2,
        "status": "ok",
        "guarantee": guarantee,
    }
    return Entry(**{**values, **changes})


def test_content_is_named_counted_and_digested() -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = RecordDict(
        {
            "config": ConfigRecord({"status": "ok", "note": b"\x00\x01"}),
            "metrics": MetricRecord({"loss": 0.5}),
            "arrays": ArrayRecord({"w": Array(weights)}),
        }
    )
    found = describe_content(content)
    data = content.array_records["arrays"]["w"].data
    assert found.fields == ("config.note", "config.status", "metrics.loss")
    assert found.num_arrays == 1
    assert found.num_bytes == len(data) + len('"ok"') + 2 + len("0.5")
    # The documented recipe, written out.
    text = json.dumps(
        {
            "arrays": {"w": ["float32", [2, 3], hashlib.sha256(data).hexdigest()]},
            "config": {"note": hashlib.sha256(b"\x00\x01").hexdigest(), "status": "ok"},
            "metrics": {"loss": 0.5},
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_lists_of_bytes_are_digested_item_by_item() -> None:
    """As secure aggregation's replies have them: masked vectors, and shares for the neighbours."""
    found = describe_content({"config": ConfigRecord({"masked": [b"\x00", b"\xff\xff"], "to": [7, 12]})})
    assert found.num_bytes == 3 + len("7") + len("12")
    masked = [hashlib.sha256(item).hexdigest() for item in (b"\x00", b"\xff\xff")]
    text = json.dumps({"config": {"masked": masked, "to": [7, 12]}}, sort_keys=True, separators=(",", ":"))
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_every_change_changes_the_digest_and_only_layouts_change_the_layout() -> None:
    def describe(weights: np.ndarray, loss: float = 0.5):
        return describe_content({"arrays": ArrayRecord({"w": Array(weights)}), "metrics": {"loss": loss}})

    base = describe(np.zeros(4, np.float32))
    other_values, other_loss = describe(np.ones(4, np.float32)), describe(np.zeros(4, np.float32), loss=0.25)
    other_shape = describe(np.zeros((2, 2), np.float32))
    assert len({found.sha256 for found in (base, other_values, other_loss, other_shape)}) == 4
    assert base.layout_sha256 == other_values.layout_sha256 == other_loss.layout_sha256 != other_shape.layout_sha256


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trail.jsonl"
    entries = [build_entry(server_round=number) for number in (1, 2)]
    for entry in entries:
        append_entry(path, entry)
    assert list(read_trail(path)) == entries
    assert all(json.loads(line)["format"] == format_version for line in path.read_text().splitlines())


def test_a_line_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "trail.jsonl", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    append_entry(path, build_entry())
    assert path.stat().st_ino in synced
    assert tmp_path.stat().st_ino in synced  # the new name too


def test_a_torn_line_stays_alone_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trail.jsonl"
    append_entry(path, build_entry(server_round=1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    append_entry(path, build_entry(server_round=2))
    first, torn, second = read_trail(path)
    assert (first.server_round, second.server_round) == (1, 2)
    assert "line 2 is cut short" in torn
    assert main(["trail", "show", "--path", str(path)]) == 0
    assert "line 2 is cut short" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["[]", "7", "{}", '{"format": 1}', '{"format": 1, "content": {}, "x": 2}'])
def test_what_is_no_entry_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trail.jsonl"
    path.write_text(line + "\n")
    (told,) = read_trail(path)
    assert isinstance(told, str)


def test_another_format_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "trail.jsonl"
    append_entry(path, build_entry())
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(TrailError, match=r"format 2; this release reads 1\. Read it with"):
        list(read_trail(path))


def test_where_a_trail_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OT_FEDERATED_TRAIL", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert choose_trail({}) == tmp_path / "ot-federated" / "trail.jsonl"
    assert choose_trail({"trail": str(tmp_path / "mine")}) == tmp_path / "mine"
    assert choose_trail({"partition-id": 0}) is None
    monkeypatch.setenv("OT_FEDERATED_TRAIL", str(tmp_path / "all"))
    assert choose_trail({"partition-id": 0}) == choose_trail({}) == tmp_path / "all"


def test_show_is_a_table_that_can_be_cut_and_filtered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trail.jsonl"
    content = describe_content({"arrays": ArrayRecord({"w": Array(np.zeros(4, np.float32))})})
    for number in (1, 2, 3):
        append_entry(path, build_entry(server_round=number, content=content))
    append_entry(path, build_entry(flower_run="78", run="run-b", guarantee=None, content=content))
    append_entry(path, build_entry(flower_run="79", run="", status="error", reason="no \x1b[2Jdata", guarantee=None))
    assert main(["trail", "show", "--path", str(path), "--last", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 5 messages answered, {4 * content.num_bytes:,} bytes left"
    assert lines[1] == f"last guarantee, for everything that ever left its data set: {guarantee}"
    assert len(lines) == 3 + 3 + 1
    assert lines[3].split()[2:] == [
        *("run-a", "3", "ward-7", "train", "ok", "1", f"{content.num_bytes:,}", "1.2500", "1e-05"),
        content.sha256[:12],
    ]
    assert "unbounded" in lines[4]
    assert lines[6] == "    no ?[2Jdata"
    for name in ("78", "run-b"):
        assert main(["trail", "show", "--path", str(path), "--run", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3


def test_no_trail_says_where_one_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trail", "show", "--path", str(tmp_path / "none")]) == 1
    assert "OT_FEDERATED_TRAIL" in capsys.readouterr().err
