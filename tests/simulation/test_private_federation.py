"""A federation under example-level differential privacy: policy, ledger, replies and resume, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ot_federated.cli import main as command_line
from ot_federated.data_owner.privacy_ledger import PrivacyLedger, ledger_root, list_ledgers
from ot_federated.privacy_accounting import Mechanism, epsilon_of
from tests.federations import build_questions, prepare_federation, write_rows

delta = 1e-5
private = {
    "num-server-rounds": 2,
    "privacy.mode": "example",
    "privacy.target-epsilon": 4.0,
    "privacy.target-delta": delta,
    "privacy.engine": "loop",
    "train.max-steps": 3,
}


@pytest.fixture(autouse=True)
def own_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))


def start(directory: Path, model: Path, **changes: object):
    return prepare_federation(
        directory, model, num_rows=24, settings={**private, **changes.pop("settings", {})}, **changes
    )


def run(federation) -> None:
    from ot_federated.model_owner.server_app import app

    federation.grid.run_server_app(app)


def test_every_client_spends_what_was_asked_and_no_more(tmp_path: Path, llama_directory: Path) -> None:
    federation = start(tmp_path, llama_directory)
    run(federation)
    datasets = list_ledgers(ledger_root())
    assert len(datasets) == 2
    for dataset in datasets:
        ledger = PrivacyLedger.open(ledger_root(), dataset_id=dataset)
        releases = [entry.release for entry in ledger.entries]
        assert [release.server_round for release in releases] == [1, 2]
        # One calibration for all rounds: the two rounds of three steps are one mechanism of six.
        whole = Mechanism(
            noise_multiplier=releases[0].noise_multiplier, sample_rate=releases[0].sample_rate, num_steps=6
        )
        assert ledger.epsilon(delta=delta) == pytest.approx(epsilon_of([whole], delta=delta), abs=1e-6)
        assert 3.5 < ledger.epsilon(delta=delta) <= 4.0
    assert federation.summary["privacy"]["target_epsilon"] == 4.0
    assert command_line(["ledger", "verify"]) == 0


def test_nothing_of_the_data_but_the_noised_update_leaves(tmp_path: Path, llama_directory: Path) -> None:
    seen = []
    federation = start(tmp_path, llama_directory, on_reply=lambda reply: seen.append(reply) or [reply])
    run(federation)
    trained = [reply for reply in seen if reply.metadata.message_type == "train"]
    assert len(trained) == 4
    for reply in trained:
        (metrics,) = reply.content.metric_records.values()
        assert dict(metrics) == {"num-examples": 1, "num-steps": 3}
        (config,) = reply.content.config_records.values()
        assert set(config) == {"wire-version", "status", "bundle-digest", "server-round"}


def test_an_epsilon_that_is_told_is_told_with_its_delta(tmp_path: Path, llama_directory: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('reply-fields = ["epsilon"]\ndelta = 1e-4\nmax-epsilon = 20\n')
    federation = start(tmp_path, llama_directory, node_config={"policy": str(policy)})
    run(federation)
    ledgers = [PrivacyLedger.open(ledger_root(), dataset_id=dataset) for dataset in list_ledgers(ledger_root())]
    # At the policy's delta, which is not the one that the server plans with.
    largest = {"epsilon": max(ledger.epsilon(delta=1e-4) for ledger in ledgers), "delta": 1e-4}
    assert {key: federation.rounds[2][key] for key in largest} == largest
    shown = federation.summary["privacy"]
    assert shown["largest_epsilon_reported"] == largest["epsilon"]
    assert shown["largest_epsilon_reported_at_delta"] == largest["delta"]
    assert (shown["epsilon"], shown["delta"], shown["epsilon_is"]) == (largest["epsilon"], 1e-4, "reported")
    assert (shown["unit"], shown["adjacency"], shown["sampling"]) == ("example", "add-remove-one", "poisson")


def test_a_round_asked_for_twice_costs_nothing_and_shows_nothing_new(tmp_path: Path, llama_directory: Path) -> None:
    settings = {"num-server-rounds": 1}
    first = start(tmp_path, llama_directory, settings=settings)
    run(first)
    before = {d: PrivacyLedger.open(ledger_root(), dataset_id=d).head for d in list_ledgers(ledger_root())}
    # The server lost its checkpoint and repeats the round under the same run id.
    run_id, digest = (first.output / "run_id").read_text(), first.digest
    for path in (first.output / "run_config.json", first.output / "metrics.jsonl"):
        path.unlink()
    second = start(tmp_path, llama_directory, settings=settings)
    run(second)
    assert (second.output / "run_id").read_text() == run_id
    assert second.digest == digest
    assert {d: PrivacyLedger.open(ledger_root(), dataset_id=d).head for d in list_ledgers(ledger_root())} == before
    lines = (second.output / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["failures"] == {}


@pytest.mark.parametrize("name", ["", "ward-7"])
def test_data_without_a_name_is_warned_about(
    name: str, tmp_path: Path, llama_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a ledger that begins anew, silently, when a record is added; and two clients that share one."""
    data = write_rows(tmp_path / "own.jsonl", build_questions(24))
    policy = tmp_path / "policy.toml"
    policy.write_text("max-epsilon = 20\n")
    node_config = {"policy": str(policy), "data-path": str(data), "dataset": name}
    run(start(tmp_path, llama_directory, node_config=node_config, settings={"num-server-rounds": 1}))
    captured = capsys.readouterr()
    log = captured.out + captured.err
    assert ("names no dataset" in log) == (not name)
    assert ('dataset = "ward-7"' in log) == (not name)
    (dataset,) = list_ledgers(ledger_root())
    assert (dataset == name) or not name
    entries = PrivacyLedger.open(ledger_root(), dataset_id=dataset).entries
    assert [entry.release.client for entry in entries] == ["client-0000", "client-0001"]
