"""The ledger counts everything, once, whatever crashes; and says so when it was altered."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ot_federated.data_owner import privacy_ledger
from ot_federated.data_owner.ledger_entries import LedgerError, Release
from ot_federated.data_owner.privacy_ledger import (
    BudgetError,
    PrivacyLedger,
    identify_dataset,
    ledger_root,
    list_ledgers,
    read_anchored_dataset,
)
from ot_federated.errors import ConfigError, DataError, OtFederatedError, ProtocolError
from ot_federated.privacy_accounting import Mechanism, epsilon_of

delta = 1e-5
plan = Release(
    run="run-a",
    server_round=1,
    client="hospital-1",
    noise_multiplier=1.1,
    sample_rate=0.05,
    num_steps=20,
    max_grad_norm=0.5,
    num_examples=2000,
)


def release(server_round: int = 1, **changes: object) -> Release:
    return dataclasses.replace(plan, server_round=server_round, **changes)


def cheap_epsilon(history, *, delta):
    return float(sum(item.num_steps for item in history))


@pytest.fixture
def steps_as_epsilon(monkeypatch):
    """Where the test is about books, not about epsilon."""
    monkeypatch.setattr(privacy_ledger, "epsilon_of", cheap_epsilon)


@pytest.fixture
def filled(tmp_path, steps_as_epsilon) -> PrivacyLedger:
    """A ledger of five rounds."""
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    for server_round in range(1, 6):
        ledger.spend(release(server_round), budget_epsilon=math.inf, delta=delta)
    return ledger


def lines_of(ledger: PrivacyLedger) -> list[bytes]:
    return (ledger.directory / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def write_lines(ledger: PrivacyLedger, lines: list[bytes]) -> None:
    (ledger.directory / "ledger.jsonl").write_bytes(b"".join(lines))


def test_twenty_rounds_of_two_runs_with_three_restarts_cost_what_they_cost_at_once(tmp_path, monkeypatch):
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    from ot_federated import privacy_accounting

    # Equal on every grid; on a coarse one it is quick.
    monkeypatch.setattr(privacy_accounting, "num_grid_points", 2**13)
    # Each "restart" is a process of its own; the second run has other settings.
    code = """
import sys
from pathlib import Path
from ot_federated import privacy_accounting
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, Release
privacy_accounting.num_grid_points = 2**13
root, run, first, last, sigma = sys.argv[1:]
ledger = PrivacyLedger.open(Path(root), dataset_id="ward-7")
for server_round in range(int(first), int(last) + 1):
    release = Release(run=run, server_round=server_round, client="c", noise_multiplier=float(sigma), sample_rate=0.05,
        num_steps=20, max_grad_norm=0.5, num_examples=2000)
    assert not ledger.spend(release, budget_epsilon=20, delta=1e-5).already_spent
"""
    parts = [
        ("run-a", "1", "6", "1.1"),
        ("run-a", "7", "12", "1.1"),
        ("run-b", "1", "4", "0.9"),
        ("run-b", "5", "8", "0.9"),
    ]
    for part in parts:
        subprocess.run([sys.executable, "-c", code, str(tmp_path), *part], check=True, timeout=300)
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    assert len(ledger.entries) == 20
    found = ledger.epsilon(delta=delta)
    at_once = [
        Mechanism(noise_multiplier=1.1, sample_rate=0.05, num_steps=240),
        Mechanism(noise_multiplier=0.9, sample_rate=0.05, num_steps=160),
    ]
    assert found == pytest.approx(epsilon_of(at_once, delta=delta), abs=1e-6)
    width = privacy_accounting._grid_width({(1.1, 0.05): 240, (0.9, 0.05): 160}, coarsening=1)
    accountant = PLDAccountant(value_discretization_interval=width)
    for item in at_once:
        event = PoissonSampledDpEvent(item.sample_rate, GaussianDpEvent(item.noise_multiplier))
        accountant.compose(event, item.num_steps)
    assert found == pytest.approx(accountant.get_epsilon(delta), abs=1e-6)


def test_entry_holds_what_an_epsilon_needs_to_mean_something(filled):
    fields = json.loads(lines_of(filled)[0])
    assert fields | {"time": "", "previous": "", "sha256": ""} == {
        "schema": 1,
        "time": "",
        "unit": "example",
        "adjacency": "add-remove-one",
        "sampling": "poisson",
        "noise_multiplier": 1.1,
        "sample_rate": 0.05,
        "num_steps": 20,
        "max_grad_norm": 0.5,
        "num_examples": 2000,
        "delta": 1e-5,
        "run": "run-a",
        "round": 1,
        "dataset": "ward-7",
        "client": "hospital-1",
        "previous": "",
        "sha256": "",
    }
    assert json.loads(lines_of(filled)[1])["previous"] == fields["sha256"]
    assert filled.entries[4].release == release(5)


def test_budget_is_enforced_with_the_numbers_and_nothing_is_written(tmp_path):
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    first = ledger.spend(release(1), budget_epsilon=2.1, delta=delta)
    second = ledger.spend(release(2), budget_epsilon=2.1, delta=delta)
    before = lines_of(ledger)
    with pytest.raises(BudgetError, match="let the data owner raise max-epsilon") as caught:
        ledger.spend(release(3), budget_epsilon=2.1, delta=delta)
    assert lines_of(ledger) == before
    assert first.epsilon < second.epsilon == ledger.epsilon(delta=delta) <= 2.1
    assert f"over its budget of 2.1; {second.epsilon:.4g} is spent" in str(caught.value)
    refused = epsilon_of([plan.mechanism] * 3, delta=delta)
    assert f"epsilon={refused:.4g} at delta=1e-05" in str(caught.value)


def test_a_round_without_noise_fits_no_budget_but_can_be_booked(tmp_path):
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    with pytest.raises(BudgetError, match="epsilon=inf"):
        ledger.spend(release(noise_multiplier=0.0), budget_epsilon=1e6, delta=delta)
    assert ledger.entries == []
    assert not (tmp_path / "ward-7" / "ledger.jsonl").exists()
    ledger.spend(release(noise_multiplier=0.0), budget_epsilon=math.inf, delta=delta)
    assert ledger.epsilon(delta=delta) == math.inf


@pytest.mark.parametrize("bad_delta", [1 / 2000, 0.1])
def test_delta_of_one_over_n_is_refused_without_saying_n(tmp_path, bad_delta):
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    with pytest.raises(ConfigError, match="not below 1 over this client's number of examples") as caught:
        ledger.spend(plan, budget_epsilon=8, delta=bad_delta)
    assert "2000" not in str(caught.value)
    assert list_ledgers(tmp_path) == []


@pytest.mark.parametrize("budget", [0, -1, math.nan])
def test_impossible_budgets_are_refused(tmp_path, budget):
    with pytest.raises(ConfigError, match="privacy budget"):
        PrivacyLedger.open(tmp_path, dataset_id="ward-7").spend(plan, budget_epsilon=budget, delta=delta)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": ""},
        {"run": "a\nb"},
        {"run": "x" * 201},
        {"server_round": 0},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": math.inf},
        {"num_examples": 0},
        {"noise_multiplier": math.nan},
        {"sample_rate": 2.0},
    ],
)
def test_impossible_releases_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        dataclasses.replace(plan, **changes)


# ---- repeated rounds ---------------------------------------------------------------------------


def test_a_round_asked_twice_costs_nothing_and_gets_the_same_bytes(filled):
    before = lines_of(filled)
    filled.save_reply(b"update of round 5", run="run-a", server_round=5)
    again = PrivacyLedger.open(filled.directory.parent, dataset_id="ward-7")
    receipt = again.spend(release(5), budget_epsilon=100, delta=delta)
    assert receipt.already_spent
    assert receipt.reply == b"update of round 5"
    assert receipt.epsilon == 100
    assert lines_of(filled) == before
    assert filled.load_reply(run="run-a", server_round=5) == b"update of round 5"
    assert filled.load_reply(run="run-b", server_round=5) is None


def test_an_empty_reply_is_a_reply(filled):
    filled.save_reply(b"", run="run-a", server_round=5)
    assert filled.spend(release(5), budget_epsilon=100, delta=delta).already_spent


def test_a_spent_round_without_a_saved_reply_is_paid_again(filled):
    receipt = filled.spend(release(5), budget_epsilon=math.inf, delta=delta)
    assert not receipt.already_spent
    assert receipt.epsilon == 120
    assert [entry.release.server_round for entry in filled.entries] == [1, 2, 3, 4, 5, 5]
    with pytest.raises(BudgetError):
        filled.spend(release(5), budget_epsilon=120, delta=delta)


def test_a_damaged_reply_is_not_sent(filled):
    filled.save_reply(b"update", run="run-a", server_round=5)
    (path,) = (filled.directory / "replies").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert filled.load_reply(run="run-a", server_round=5) is None
    assert not filled.spend(release(5), budget_epsilon=math.inf, delta=delta).already_spent


@pytest.mark.parametrize(
    "changes",
    [{"noise_multiplier": 0.5}, {"sample_rate": 0.1}, {"num_steps": 19}, {"max_grad_norm": 1.0}, {"num_examples": 9}],
)
@pytest.mark.parametrize("saved", [True, False])
def test_a_repeated_round_with_other_parameters_is_refused(filled, changes, saved):
    if saved:
        filled.save_reply(b"update", run="run-a", server_round=5)
    before = lines_of(filled)
    with pytest.raises(ProtocolError, match="already paid with other parameters") as caught:
        filled.spend(release(5, **changes), budget_epsilon=math.inf, delta=delta)
    assert lines_of(filled) == before
    if "num_examples" in changes:
        assert "2000" not in str(caught.value)


def test_the_same_round_of_another_run_is_another_round(filled):
    filled.save_reply(b"update", run="run-a", server_round=5)
    assert not filled.spend(release(5, run="run-b"), budget_epsilon=math.inf, delta=delta).already_spent


def test_only_the_last_replies_are_kept(filled):
    for server_round in range(1, 6):
        filled.save_reply(b"%d" % server_round, run="run-a", server_round=server_round)
    loaded = [filled.load_reply(run="run-a", server_round=server_round) for server_round in range(1, 6)]
    assert loaded == [None, None, b"3", b"4", b"5"]


def test_what_was_not_paid_cannot_be_saved_to_be_sent(filled):
    with pytest.raises(LedgerError, match="must not be sent"):
        filled.save_reply(b"update", run="run-a", server_round=6)


def test_the_servers_run_id_chooses_no_path(filled):
    run = "../../../escape"
    filled.spend(release(1, run=run), budget_epsilon=math.inf, delta=delta)
    filled.save_reply(b"update", run=run, server_round=1)
    assert filled.load_reply(run=run, server_round=1) == b"update"
    assert len(list((filled.directory / "replies").iterdir())) == 1


# ---- altered ledgers ---------------------------------------------------------------------------


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
        (lambda rows: [edit(rows[0], schema=2), *rows[1:]], "line 1 has schema 2"),
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


# ---- crashes and other processes ---------------------------------------------------------------


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


# ---- identity and place ------------------------------------------------------------------------


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
        identify_dataset([{"x": "secret"}, {"x": b"secret"}])
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
