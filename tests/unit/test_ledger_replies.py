"""A round that is asked for twice costs nothing and shows nothing new."""

from __future__ import annotations

import math

import pytest

from ot_federated.data_owner.ledger_entries import LedgerError
from ot_federated.data_owner.privacy_ledger import (
    BudgetError,
    PrivacyLedger,
)
from ot_federated.errors import ProtocolError
from tests.ledgers import delta, lines_of, release


def test_a_round_asked_twice_costs_nothing_and_gets_the_same_bytes(filled):
    before = lines_of(filled)
    filled.save_reply(b"update of round 5", run="run-a", server_round=5, client="hospital-1")
    again = PrivacyLedger.open(filled.directory.parent, dataset_id="ward-7")
    receipt = again.spend(release(5), budget_epsilon=100, delta=delta)
    assert receipt.already_spent
    assert receipt.reply == b"update of round 5"
    assert receipt.epsilon == 100
    assert lines_of(filled) == before
    assert filled.load_reply(run="run-a", server_round=5, client="hospital-1") == b"update of round 5"
    assert filled.load_reply(run="run-b", server_round=5, client="hospital-1") is None


def test_an_empty_reply_is_a_reply(filled):
    filled.save_reply(b"", run="run-a", server_round=5, client="hospital-1")
    assert filled.spend(release(5), budget_epsilon=100, delta=delta).already_spent


def test_a_spent_round_without_a_saved_reply_is_paid_again(filled):
    receipt = filled.spend(release(5), budget_epsilon=math.inf, delta=delta)
    assert not receipt.already_spent
    assert receipt.epsilon == 120
    assert [entry.release.server_round for entry in filled.entries] == [1, 2, 3, 4, 5, 5]
    with pytest.raises(BudgetError):
        filled.spend(release(5), budget_epsilon=120, delta=delta)


def test_a_damaged_reply_is_not_sent(filled):
    filled.save_reply(b"update", run="run-a", server_round=5, client="hospital-1")
    (path,) = (filled.directory / "replies").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert filled.load_reply(run="run-a", server_round=5, client="hospital-1") is None
    assert not filled.spend(release(5), budget_epsilon=math.inf, delta=delta).already_spent


@pytest.mark.parametrize(
    "changes",
    [{"noise_multiplier": 0.5}, {"sample_rate": 0.1}, {"num_steps": 19}, {"max_grad_norm": 1.0}, {"num_examples": 9}],
)
@pytest.mark.parametrize("saved", [True, False])
def test_a_repeated_round_with_other_parameters_is_refused(filled, changes, saved):
    if saved:
        filled.save_reply(b"update", run="run-a", server_round=5, client="hospital-1")
    before = lines_of(filled)
    with pytest.raises(ProtocolError, match="already paid with other parameters") as caught:
        filled.spend(release(5, **changes), budget_epsilon=math.inf, delta=delta)
    assert lines_of(filled) == before
    if "num_examples" in changes:
        assert "2000" not in str(caught.value)


def test_the_same_round_of_another_run_is_another_round(filled):
    filled.save_reply(b"update", run="run-a", server_round=5, client="hospital-1")
    assert not filled.spend(release(5, run="run-b"), budget_epsilon=math.inf, delta=delta).already_spent


def test_two_clients_of_one_data_set_send_their_own_updates(filled):
    """Catches one client's update sent again under another's name."""
    filled.save_reply(b"update of hospital-1", run="run-a", server_round=5, client="hospital-1")
    other = release(5, client="hospital-2")
    assert not filled.spend(other, budget_epsilon=math.inf, delta=delta).already_spent
    filled.save_reply(b"update of hospital-2", run="run-a", server_round=5, client="hospital-2")
    assert filled.spend(release(5), budget_epsilon=math.inf, delta=delta).reply == b"update of hospital-1"
    assert filled.spend(other, budget_epsilon=math.inf, delta=delta).reply == b"update of hospital-2"
    assert [entry.release.client for entry in filled.entries[-2:]] == ["hospital-1", "hospital-2"]
    with pytest.raises(LedgerError, match="'hospital-3': it must not be sent"):
        filled.save_reply(b"update", run="run-a", server_round=5, client="hospital-3")


def test_only_the_last_replies_are_kept(filled):
    for server_round in range(1, 6):
        filled.save_reply(b"%d" % server_round, run="run-a", server_round=server_round, client="hospital-1")
    loaded = [
        filled.load_reply(run="run-a", server_round=server_round, client="hospital-1") for server_round in range(1, 6)
    ]
    assert loaded == [None, None, b"3", b"4", b"5"]


def test_what_was_not_paid_cannot_be_saved_to_be_sent(filled):
    with pytest.raises(LedgerError, match="must not be sent"):
        filled.save_reply(b"update", run="run-a", server_round=6, client="hospital-1")


def test_the_servers_run_id_chooses_no_path(filled):
    run = "../../../escape"
    filled.spend(release(1, run=run), budget_epsilon=math.inf, delta=delta)
    filled.save_reply(b"update", run=run, server_round=1, client="hospital-1")
    assert filled.load_reply(run=run, server_round=1, client="hospital-1") == b"update"
    assert len(list((filled.directory / "replies").iterdir())) == 1
