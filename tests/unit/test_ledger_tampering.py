"""A ledger that was altered says so, names its first bad line, and spends nothing."""

from __future__ import annotations

import json
import math

import pytest

from ot_federated.data_owner.ledger_entries import LedgerError
from ot_federated.data_owner.privacy_ledger import (
    PrivacyLedger,
    read_anchored_dataset,
)
from tests.ledgers import delta, lines_of, release, write_lines


def edit(line: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(line) | changes, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def rehash(line: bytes, **changes: object) -> bytes:
    from ot_federated.data_owner.ledger_entries import _canonical, _hash

    fields = json.loads(line) | changes
    fields.pop("sha256")
    return _canonical({**fields, "sha256": _hash(fields)}) + b"\n"


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda rows: [*rows[:2], edit(rows[2], noise_multiplier=9.0), *rows[3:]], "line 3 was edited"),
        (lambda rows: [edit(rows[0], num_steps=1), *rows[1:]], "line 1 was edited"),
        (lambda rows: [*rows[:4], edit(rows[4], num_steps=1)], "line 5 was edited"),
        (lambda rows: [*rows[:2], rows[2].replace(b'"run"', b'"run" '), *rows[3:]], "line 3 was edited"),
        (lambda rows: [*rows[:2], rehash(rows[2], num_steps=1), *rows[3:]], "line 4 does not follow"),
        (lambda rows: [*rows[:4], rehash(rows[4], num_steps=1)], "line 5 is not the one that its anchor remembers"),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], "line 2 does not follow"),
        (lambda rows: [rows[0], *rows[2:]], "line 2 does not follow"),
        (lambda rows: [rows[0], rows[0], *rows[1:]], "line 2 does not follow"),
        (lambda rows: rows[1:], "line 1 does not follow"),
        (lambda rows: rows[:4], "line 5 is missing"),
        (lambda rows: [], "line 1 is missing"),
        (lambda rows: [*rows[:4], rows[4][:-30]], "line 5 is torn"),
        (lambda rows: [*rows[:4], rows[4][:-1]], "line 5 is torn"),
        (lambda rows: [*rows[:2], b"\n", *rows[2:]], "line 3 is not JSON"),
        (lambda rows: [*rows[:2], b"\xff\n", *rows[2:]], "line 3 is not JSON"),
        (lambda rows: [*rows[:2], b"[1]\n", *rows[2:]], "line 3 is not a JSON object"),
        (
            lambda rows: [edit(rows[0], schema=2), *rows[1:]],
            "line 1 has schema 2; this release of ot-federated reads 1: install the one that wrote it",
        ),
        (lambda rows: [edit(rows[0], extra=2), *rows[1:]], "line 1 has missing, unknown"),
        (lambda rows: [edit(rows[0], num_steps=True), *rows[1:]], "line 1 has missing, unknown or mistyped"),
        (lambda rows: [edit(rows[0], noise_multiplier=math.nan), *rows[1:]], "line 1 was edited"),
        (lambda rows: [rehash(rows[0], unit="patient"), *rows[1:]], "line 1 counts in another unit"),
        (lambda rows: [rehash(rows[0], num_steps=-5), *rows[1:]], "line 1 holds a value that no entry can have"),
        (lambda rows: [rehash(rows[0], dataset="other"), *rows[1:]], "line 1 belongs to the data set 'other'"),
    ],
)
def test_an_altered_ledger_names_its_first_bad_line_and_spends_nothing(filled, alter, message):
    rows = alter(lines_of(filled))
    write_lines(filled, rows)
    for use in (
        filled.verify,
        lambda: filled.epsilon(delta=delta),
        lambda: filled.spend(release(6), budget_epsilon=math.inf, delta=delta),
        lambda: PrivacyLedger.open(filled.directory.parent, dataset_id="ward-7"),
    ):
        with pytest.raises(LedgerError, match=message) as caught:
            use()
        assert "Restore ledger.jsonl and anchor.json together" in str(caught.value)
    assert lines_of(filled) == b"".join(rows).splitlines(keepends=True)


def test_lines_appended_behind_the_anchors_back_are_found(filled, tmp_path):
    rows, anchor = lines_of(filled), (filled.directory / "anchor.json").read_bytes()
    filled.spend(release(6), budget_epsilon=math.inf, delta=delta)
    filled.spend(release(7), budget_epsilon=math.inf, delta=delta)
    (filled.directory / "anchor.json").write_bytes(anchor)
    with pytest.raises(LedgerError, match="line 7 was added without its anchor"):
        filled.verify()
    assert len(rows) == 5


def test_missing_files_are_found(filled):
    ledger, anchor = filled.directory / "ledger.jsonl", filled.directory / "anchor.json"
    saved = ledger.read_bytes()
    ledger.unlink()
    with pytest.raises(LedgerError, match="line 1 is missing"):
        filled.verify()
    ledger.write_bytes(saved)
    anchor.unlink()
    with pytest.raises(LedgerError, match=r"anchor.json is missing"):
        filled.verify()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"dataset":"ward-7","num_entries":-1,"sha256":"0"}\n', b"\xff"]
)
def test_a_damaged_anchor_is_found(filled, content):
    (filled.directory / "anchor.json").write_bytes(content)
    with pytest.raises(LedgerError, match=r"anchor.json cannot be read"):
        filled.verify()


def test_another_data_sets_ledger_is_refused(filled, tmp_path):
    (tmp_path / "ward-7").rename(tmp_path / "ward-8")
    with pytest.raises(LedgerError, match="line 1 belongs to the data set 'ward-7', not to 'ward-8'"):
        PrivacyLedger.open(tmp_path, dataset_id="ward-8")
    assert read_anchored_dataset(tmp_path / "ward-8") == "ward-7"
    (tmp_path / "ward-8" / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="belongs to the data set 'ward-7'"):
        PrivacyLedger.open(tmp_path, dataset_id="ward-8")


def test_a_head_kept_elsewhere_finds_an_older_copy_put_back(filled):
    files = {name: (filled.directory / name).read_bytes() for name in ("ledger.jsonl", "anchor.json")}
    filled.spend(release(6), budget_epsilon=math.inf, delta=delta)
    head = filled.head
    filled.verify(remembered=head)
    filled.spend(release(7), budget_epsilon=math.inf, delta=delta)
    filled.verify(remembered=head)
    for name, data in files.items():
        (filled.directory / name).write_bytes(data)
    filled.verify()  # from this directory alone it can't be seen
    with pytest.raises(LedgerError, match="line 6 is missing"):
        filled.verify(remembered=head)
