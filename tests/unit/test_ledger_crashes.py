"""The ledger counts everything once, whatever crashes and whoever else writes."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest

from ot_federated.data_owner import privacy_ledger
from ot_federated.data_owner.ledger_entries import LedgerError, Release
from ot_federated.data_owner.privacy_ledger import PrivacyLedger
from ot_federated.errors import OtFederatedError
from tests.ledgers import delta, lines_of, plan, release


def spend_and_crash(ledger: PrivacyLedger, asked: Release, monkeypatch: pytest.MonkeyPatch, *, at_write: int) -> None:
    write, num_writes = privacy_ledger.atomic_write_bytes, 0

    def crash(path: Path, data: bytes) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == at_write:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(privacy_ledger, "atomic_write_bytes", crash)
        with pytest.raises(KeyboardInterrupt):
            ledger.spend(asked, budget_epsilon=math.inf, delta=delta)


@pytest.mark.parametrize("at_write", [1, 2])
def test_a_crash_between_any_two_writes_never_counts_too_little(filled, monkeypatch, at_write):
    spend_and_crash(filled, release(6), monkeypatch, at_write=at_write)
    # Nothing was trained, as spend did not return: 5 is right and 6 is too much; both are allowed.
    assert len(filled.entries) == 4 + at_write
    filled.verify()
    receipt = filled.spend(release(7), budget_epsilon=math.inf, delta=delta)
    assert receipt.epsilon == 20 * (5 + at_write)
    filled.spend(release(8), budget_epsilon=math.inf, delta=delta)
    filled.verify()


def test_crash_after_crash_leaves_a_good_ledger(filled, monkeypatch):
    spend_and_crash(filled, release(6), monkeypatch, at_write=2)
    # The first write mends the anchor now, the second is the ledger, the third the anchor again.
    spend_and_crash(filled, release(7), monkeypatch, at_write=3)
    filled.verify()
    assert len(filled.entries) == 7


@pytest.mark.parametrize("at_write", [1, 2, 3])
def test_a_crash_during_the_very_first_spend(tmp_path, steps_as_epsilon, monkeypatch, at_write):
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    spend_and_crash(ledger, plan, monkeypatch, at_write=at_write)
    assert len(ledger.entries) == (at_write == 3)
    ledger.spend(release(2), budget_epsilon=math.inf, delta=delta)
    assert len(PrivacyLedger.open(tmp_path, dataset_id="ward-7").entries) == 1 + (at_write == 3)


def test_the_entry_is_flushed_to_the_disk_before_spend_returns(filled, monkeypatch):
    import os

    from ot_federated import cache

    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(cache.os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(
        cache.Path, "replace", lambda self, target: (events.append(target.name), replace(self, target))[1]
    )
    filled.spend(release(6), budget_epsilon=math.inf, delta=delta)
    assert events == ["fsync", "ledger.jsonl", "fsync", "fsync", "anchor.json", "fsync"]


def test_left_overs_of_killed_processes_are_removed(filled):
    (filled.directory / ".ledger.jsonl.0123abcd.partial").write_bytes(b"x")
    filled.spend(release(6), budget_epsilon=math.inf, delta=delta)
    assert sorted(path.name for path in filled.directory.iterdir()) == ["anchor.json", "ledger.jsonl", "lock"]


def test_threads_that_spend_at_once_are_all_counted(tmp_path, steps_as_epsilon):
    def work(run: str) -> None:
        ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
        for server_round in range(1, 6):
            ledger.spend(release(server_round, run=run), budget_epsilon=math.inf, delta=delta)

    workers = [threading.Thread(target=work, args=(f"run-{index}",)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    assert sorted((entry.release.run, entry.release.server_round) for entry in ledger.entries) == [
        (f"run-{index}", server_round) for index in range(4) for server_round in range(1, 6)
    ]


def test_a_disk_without_locks_keeps_no_ledger(tmp_path, monkeypatch, steps_as_epsilon):
    from contextlib import contextmanager

    @contextmanager
    def no_lock(path):
        yield False

    monkeypatch.setattr(privacy_ledger, "file_lock", no_lock)
    with pytest.raises(LedgerError, match="no file locks"):
        PrivacyLedger.open(tmp_path, dataset_id="ward-7").spend(plan, budget_epsilon=8, delta=delta)


def test_a_full_disk_spends_nothing(filled, monkeypatch):
    import errno
    import os

    from ot_federated import cache

    before = lines_of(filled)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "fsync", fail)
        with pytest.raises(OtFederatedError, match="disk is full"):
            filled.spend(release(6), budget_epsilon=math.inf, delta=delta)
    assert lines_of(filled) == before
    filled.verify()
