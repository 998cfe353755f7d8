"""Whole federations in one process: what travels, what goes wrong on the way, and what is delivered."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from ot_federated.data_owner import client_app
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.errors import OtFederatedError
from strategies import exchange
from strategies.exchange import NodeTimeoutError
from strategies.offsite_tuning import AggregationError
from tests.clocks import FakeClock
from tests.federations import (
    Federation,
    build_questions,
    is_train_reply,
    prepare_federation,
    run_federation,
    start,
    write_rows,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(exchange, "time", fake)
    return fake


# ---- The bundle on its way ------------------------------------------------------------------------------------


def num_shards(federation: Federation) -> int:
    return -(-federation.summary["bytes"]["bundle_per_client"] // 65536)


def test_clients_that_share_a_cache_are_sent_the_bundle_once(llama_directory: Path, tmp_path: Path) -> None:
    federation = run_federation(tmp_path, llama_directory, num_clients=3, settings={"num-server-rounds": 2})
    assert num_shards(federation) > 2
    assert federation.grid.num_messages == {
        "query.hello": 3,
        "query.shard": num_shards(federation),
        "train": 6,
    }
    bundle_bytes = federation.summary["bytes"]["bundle_per_client"]
    assert [federation.rounds[number]["bundle_bytes"] for number in (1, 2)] == [bundle_bytes, 0]


def give_caches(monkeypatch: pytest.MonkeyPatch, root: Path) -> Callable[[int], Path]:
    """Give every client a bundle cache of its own, as on machines of their own; return where each one is."""

    def place(partition: int) -> Path:
        return root / f"cache-{partition}"

    def open_cache(context: Context) -> BundleCache:
        return BundleCache(place(int(context.node_config["partition-id"])))

    monkeypatch.setattr(client_app, "open_cache", open_cache)
    return place


def test_clients_with_caches_of_their_own_are_sent_it_once_each(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_caches(monkeypatch, tmp_path)
    federation = run_federation(tmp_path, llama_directory, num_clients=3, settings={"num-server-rounds": 2})
    assert federation.grid.num_messages == {
        "query.hello": 3,
        "query.shard": 3 * num_shards(federation),
        "train": 6,
    }


@pytest.mark.parametrize("num_clients", [1, 3])
def test_bundle_lost_between_rounds_comes_again_in_the_same_round(
    num_clients: int, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = give_caches(monkeypatch, tmp_path)

    def lose(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=1, partition=0):
            shutil.rmtree(place(0))
        return [reply]

    settings = {"num-server-rounds": 3}
    federation = run_federation(tmp_path, llama_directory, num_clients=num_clients, settings=settings, on_reply=lose)
    bundle_bytes = federation.summary["bytes"]["bundle_per_client"]
    assert [federation.rounds[number]["bundle_bytes"] for number in (1, 2, 3)] == [
        num_clients * bundle_bytes,
        bundle_bytes,
        0,
    ]
    assert federation.rounds[2]["failures"] == {}
    assert federation.rounds[2]["num_replies"] == num_clients
    untroubled = run_federation(tmp_path / "untroubled", llama_directory, num_clients=num_clients, settings=settings)
    assert federation.digest == untroubled.digest


def test_shared_bundle_lost_between_rounds_comes_again(llama_directory: Path, tmp_path: Path) -> None:
    def lose(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=1, partition=1):
            shutil.rmtree(tmp_path / "received-bundles")
        return [reply]

    federation = run_federation(tmp_path, llama_directory, settings={"num-server-rounds": 2}, on_reply=lose)
    assert federation.rounds[2]["failures"] == {}
    assert federation.rounds[2]["num_replies"] == 2


def test_client_that_never_keeps_its_bundle_fails_and_the_round_ends(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = give_caches(monkeypatch, tmp_path)
    find = BundleCache.find

    def forget(self: BundleCache, digest: str) -> Path | None:
        if self.root == place(1):
            shutil.rmtree(self.root / digest, ignore_errors=True)
        return find(self, digest)

    monkeypatch.setattr(BundleCache, "find", forget)
    federation = run_federation(tmp_path, llama_directory)
    assert federation.rounds[1]["num_replies"] == 1
    assert "lacked the bundle" in federation.rounds[1]["failures"]["client-0001"]


def test_shard_damaged_on_the_way_to_one_client(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client who got it fails; one who shared its cache and waited gets the bundle and trains."""
    from ot_federated.data_owner import client_app as module

    decode, spoiled = module.decode_shard, []

    def flip(message: Message, *, num_bytes: int) -> list[bytes]:
        first, *others = decode(message, num_bytes=num_bytes)
        if not spoiled:
            spoiled.append(1)
            return [bytes([first[0] ^ 1]) + first[1:], *others]
        return [first, *others]

    monkeypatch.setattr(module, "decode_shard", flip)
    federation = run_federation(tmp_path, llama_directory)
    assert federation.rounds[1]["num_replies"] == 1
    assert "damaged on the way" in federation.rounds[1]["failures"]["client-0000"]


def test_only_adapters_come_back(llama_directory: Path, tmp_path: Path) -> None:
    """Embeddings, emulator, norm and head reach the clients in the bundle and never return."""
    names: set[str] = set()

    def note(reply: Message) -> list[Message]:
        if is_train_reply(reply):
            names.update(reply.content.array_records["arrays"])
        return [reply]

    federation = run_federation(tmp_path, llama_directory, on_reply=note)
    assert {name.split(".")[0] for name in names} == {"bottom", "top"}
    num_adapter = sum(tensor.numel() for tensor in federation.adapter.values())
    # Two bytes a weight, a header of 128 bytes an array; flags, metrics and envelopes come on top.
    assert federation.summary["bytes"]["update_per_client_round"] == 2 * num_adapter + 128 * len(names)
    assert federation.grid.bytes_to_server["train"] < 2 * (2 * num_adapter + 2500 * len(names))


# ---- Clients that are missing, silent, late or empty-handed ---------------------------------------------------


def test_too_few_clients_end_the_run_after_a_bounded_wait(
    llama_directory: Path, tmp_path: Path, clock: FakeClock
) -> None:
    settings = {"strategy.min-nodes": 3, "strategy.node-timeout-seconds": 40.0}
    federation = prepare_federation(tmp_path, llama_directory, settings=settings)
    with pytest.raises(NodeTimeoutError) as caught:
        start(federation)
    assert 40 <= clock.now < 41
    message = str(caught.value)
    assert "2 of at least 3 clients connected within 40 s" in message
    for remedy in ("num-clients", "strategy.node-timeout-seconds", "strategy.min-nodes"):
        assert remedy in message
    assert (federation.output / "failure.txt").read_text().strip() == message
    assert federation.grid.num_messages["train"] == 0


@pytest.mark.parametrize(("name", "needs"), [("krum", 5), ("multikrum", 5), ("bulyan", 7)])
def test_aggregators_that_need_more_clients_say_so_before_training(
    name: str, needs: int, llama_directory: Path, tmp_path: Path, clock: FakeClock
) -> None:
    federation = prepare_federation(tmp_path, llama_directory, num_clients=3, settings={"strategy.name": name})
    with pytest.raises(OtFederatedError) as caught:
        start(federation)
    message = str(caught.value)
    assert federation.grid.num_messages["train"] == 0
    assert str(needs) in message
    # The user asked for two nodes: asking for fewer would not help.
    assert name in message.lower()
    assert "strategy.num-malicious-nodes" in message


def test_silent_client_is_a_failure_after_the_round_timeout(
    llama_directory: Path, tmp_path: Path, clock: FakeClock
) -> None:
    def drop(reply: Message) -> list[Message]:
        return [] if is_train_reply(reply, server_round=1, partition=1) else [reply]

    settings = {"num-server-rounds": 2, "strategy.round-timeout-seconds": 30.0}
    federation = run_federation(tmp_path, llama_directory, settings=settings, on_reply=drop)
    assert 30 <= clock.now < 31
    assert federation.rounds[1]["failures"] == {"client-0001": "no reply within 30 s"}
    assert federation.rounds[1]["num_replies"] == 1
    # It is asked again in the next round.
    assert federation.rounds[2]["failures"] == {}
    assert federation.rounds[2]["num_replies"] == 2
    assert federation.summary["federation"]["num_failures"] == 1


def test_late_reply_is_not_taken_for_one_of_the_next_round(
    llama_directory: Path, tmp_path: Path, clock: FakeClock
) -> None:
    kept: list[Message] = []

    def delay(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=1, partition=1):
            kept.append(reply)
            return []
        if is_train_reply(reply, server_round=2, partition=0) and kept:
            return [kept.pop(), reply]
        return [reply]

    settings = {"num-server-rounds": 2, "strategy.round-timeout-seconds": 30.0}
    federation = run_federation(tmp_path, llama_directory, settings=settings, on_reply=delay)
    assert not kept
    assert [federation.rounds[number]["num_replies"] for number in (1, 2)] == [1, 2]


def test_duplicate_replies_count_once(llama_directory: Path, tmp_path: Path) -> None:
    settings = {"num-server-rounds": 2}
    plain = run_federation(tmp_path / "plain", llama_directory, settings=settings)
    doubled = run_federation(
        tmp_path / "doubled", llama_directory, settings=settings, on_reply=lambda reply: [reply, reply]
    )
    assert doubled.digest == plain.digest
    assert doubled.rounds[1]["num_replies"] == 2
    assert doubled.rounds[1]["num_examples"] == 16


def write_files(directory: Path, **rows: Any) -> str:
    """Write one file of questions a client and return the glob."""
    for name, content in rows.items():
        write_rows(directory / "files" / f"{name}.jsonl", content)
    return str(directory / "files" / "*.jsonl")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param([], "has no rows", id="empty file"),
        pytest.param(
            [{"question": "?", "options": ["a", "b"], "answer": 0}], "no column 'choices'", id="missing column"
        ),
        pytest.param(
            [{"question": "?", "choices": ["a", "b"], "answer": 2}], "Row 0: 'answer' must be", id="answer out of range"
        ),
        pytest.param(
            [{"question": "?", "choices": "a", "answer": 0}], "Row 0: .*'choices' a list", id="choices are no list"
        ),
    ],
)
def test_client_with_unusable_data_is_a_counted_failure_with_the_reason(
    content: list[dict[str, Any]], reason: str, llama_directory: Path, tmp_path: Path
) -> None:
    files = write_files(tmp_path, a=build_questions(8), b=content)
    settings = {"data.train": files, "data.partitioner": "files"}
    federation = run_federation(tmp_path, llama_directory, settings=settings)
    failures = federation.rounds[1]["failures"]
    assert set(failures) == {"client-0001"}
    assert re.search(reason, failures["client-0001"]), failures
    assert federation.rounds[1]["num_replies"] == 1


def test_fewer_examples_than_clients(llama_directory: Path, tmp_path: Path) -> None:
    federation = prepare_federation(tmp_path, llama_directory, num_clients=3, settings={"data.max-train-examples": 2})
    with pytest.raises(AggregationError, match=r"2 examples.*3 clients.*Lower num-clients"):
        start(federation)


def test_training_that_diverges_is_said_by_the_client(llama_directory: Path, tmp_path: Path) -> None:
    federation = prepare_federation(tmp_path, llama_directory, settings={"train.learning-rate": 1e30})
    with pytest.raises(AggregationError, match=r"not finite in float16.*Lower train\.learning-rate"):
        start(federation)


def test_clients_of_one_name_are_counted_apart(llama_directory: Path, tmp_path: Path) -> None:
    """Two owners may both call themselves "hospital" in their node config."""

    def spoil(reply: Message) -> list[Message]:
        if is_train_reply(reply) and not is_train_reply(reply, partition=2):
            del reply.content["arrays"]
        return [reply]

    federation = run_federation(
        tmp_path, llama_directory, num_clients=3, node_config={"name": "hospital"}, on_reply=spoil
    )
    assert federation.rounds[1]["num_replies"] == 1
    assert len(federation.rounds[1]["failures"]) == 2
    assert federation.summary["federation"]["num_failures"] == 2
    assert federation.summary["federation"]["num_clients"] == 3
