"""Which ledger belongs to which data, and where it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from ot_federated.data_owner.dataset_identity import identify_dataset
from ot_federated.data_owner.privacy_ledger import (
    PrivacyLedger,
    ledger_root,
)
from ot_federated.errors import ConfigError, DataError


def test_a_data_set_is_its_rows_in_any_order():
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2.5}, {"text": "b", "n": 2.5}, {"text": "ä", "n": None}]
    shuffled = [{"n": row["n"], "text": row["text"]} for row in reversed(rows)]
    found = identify_dataset(rows)
    assert len(found) == 64
    assert identify_dataset(shuffled) == found
    assert identify_dataset(rows[:3]) != found
    assert identify_dataset([*rows[:2], rows[3]]) != found, "equal rows count each"
    assert identify_dataset([{**rows[0], "n": 2}, *rows[1:]]) != found
    assert PrivacyLedger.open(Path("/nowhere"), dataset_id=found).entries == []


def test_rows_that_json_cannot_hold_need_a_name():
    with pytest.raises(DataError, match="Row 1 holds a value") as caught:
        identify_dataset([{"x": "secret"}, {"x": {"secret"}}])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 101, "a\n"])
def test_ids_that_cannot_name_a_directory_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="data set's id"):
        PrivacyLedger.open(tmp_path, dataset_id=name)


def test_ledgers_are_kept_away_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("OT_FEDERATED_LEDGERS", raising=False)
    assert ledger_root() == tmp_path / ".local" / "state" / "ot-federated" / "ledgers"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert ledger_root() == tmp_path / "state" / "ot-federated" / "ledgers"
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", "~/own")
    assert ledger_root() == tmp_path / "own"
