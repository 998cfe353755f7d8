"""The ledger counts everything that was ever released, and keeps the budget."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from ot_federated.data_owner.privacy_ledger import (
    BudgetError,
    PrivacyLedger,
    list_ledgers,
)
from ot_federated.errors import ConfigError
from ot_federated.privacy_accounting import Mechanism, epsilon_of
from tests.ledgers import delta, lines_of, plan, release


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
