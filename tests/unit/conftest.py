"""A ledger of five rounds, for tests about books rather than epsilon."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ot_federated.data_owner import privacy_ledger
from ot_federated.data_owner.privacy_ledger import PrivacyLedger
from tests.ledgers import delta, release


def cheap_epsilon(history, *, delta):
    return float(sum(item.num_steps for item in history))


@pytest.fixture
def steps_as_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test is about books, not about epsilon."""
    monkeypatch.setattr(privacy_ledger, "epsilon_of", cheap_epsilon)


@pytest.fixture
def filled(tmp_path: Path, steps_as_epsilon: None) -> PrivacyLedger:
    """A ledger of five rounds."""
    ledger = PrivacyLedger.open(tmp_path, dataset_id="ward-7")
    for server_round in range(1, 6):
        ledger.spend(release(server_round), budget_epsilon=math.inf, delta=delta)
    return ledger
