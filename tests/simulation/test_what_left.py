"""The audit trail of a whole federation: every message has its line before its reply leaves, and no line has data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Message

from ot_federated.data_owner.audit_trail import Entry, describe_content, read_trail
from strategies.offsite_tuning import AggregationError
from tests.federations import build_questions, prepare_federation, run_federation, start

private = {
    "num-server-rounds": 2,
    "privacy.mode": "example",
    "privacy.target-epsilon": 4.0,
    "privacy.engine": "loop",
    "train.max-steps": 2,
}


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OT_FEDERATED_LEDGERS", str(tmp_path / "ledgers"))
    monkeypatch.setenv("OT_FEDERATED_TRAIL", str(tmp_path / "trail.jsonl"))
    return tmp_path / "trail.jsonl"


def test_every_reply_is_in_the_trail_before_it_leaves(tmp_path: Path, llama_directory: Path, trail: Path) -> None:
    left: list[str] = []

    def compare(reply: Message) -> list[Message]:
        entry = list(read_trail(trail))[-1]
        assert isinstance(entry, Entry)
        assert entry.content == describe_content(reply.content)
        assert entry.message == reply.metadata.message_type
        left.append(entry.content.sha256)
        return [reply]

    federation = run_federation(tmp_path, llama_directory, settings=private, num_rows=24, on_reply=compare)
    entries = list(read_trail(trail))
    assert [entry.content.sha256 for entry in entries] == left
    trained = [entry for entry in entries if entry.message == "train"]
    assert [(entry.server_round, entry.status) for entry in trained] == [(1, "ok"), (1, "ok"), (2, "ok"), (2, "ok")]
    assert {entry.client for entry in trained} == {"client-0000", "client-0001"}
    assert len({entry.flower_run for entry in entries}) == 1
    # Epsilon of everything so far, although the policy lets it not leave; the second round added to it.
    spent = {(entry.client, entry.server_round): entry.guarantee.epsilon for entry in trained if entry.guarantee}
    for client in ("client-0000", "client-0001"):
        assert 0 < spent[client, 1] < spent[client, 2] <= 4.0
    assert all("epsilon" not in name for entry in entries for name in entry.content.fields)
    assert len({entry.content.layout_sha256 for entry in trained}) == 1
    received = sum(line["bytes_to_server"] for line in federation.rounds.values() if "bytes_to_server" in line)
    scalars = sum(entry.content.num_bytes for entry in trained) - received
    assert 0 < scalars < 1000 * len(trained)


def test_no_line_holds_data(tmp_path: Path, llama_directory: Path, trail: Path) -> None:
    run_federation(tmp_path, llama_directory, num_rows=8)
    text = trail.read_text()
    for row in build_questions(8):
        assert row["question"] not in text
    for line in map(json.loads, text.splitlines()):
        # Names, counts and digests; no value of a metric.
        assert all(isinstance(value, (str, int, list)) for value in line["content"].values())
        assert all("=" not in name for name in line["content"]["fields"])


def test_errors_are_told_with_the_reason_that_left(tmp_path: Path, llama_directory: Path, trail: Path) -> None:
    (tmp_path / "policy.toml").write_text("require-privacy = true\n")
    federation = prepare_federation(
        tmp_path, llama_directory, node_config={"policy": str(tmp_path / "policy.toml")}, num_rows=8
    )
    with pytest.raises(AggregationError, match="require-privacy"):
        start(federation)
    refused = [entry for entry in read_trail(trail) if entry.message == "train"]
    assert {entry.status for entry in refused} == {"error"}
    assert all("require-privacy" in entry.reason and entry.content.num_arrays == 0 for entry in refused)


def test_without_a_trail_nothing_leaves(tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trail.jsonl").mkdir()
    monkeypatch.setenv("OT_FEDERATED_TRAIL", str(tmp_path / "trail.jsonl"))
    federation = prepare_federation(tmp_path, llama_directory, num_rows=8)
    with pytest.raises(AggregationError, match="cannot write its audit trail"):
        start(federation)


def test_a_simulation_leaves_no_trail_unless_asked(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run_federation(tmp_path, llama_directory, num_rows=8)
    assert not (tmp_path / "state").exists()
