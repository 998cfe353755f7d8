"""A real federation whose parties are hosts of their own: what of each the others reach, and what a cut link costs.

The model owner and two data owners are network namespaces behind a router. A host that is cut off has its packets lost
at the router: nothing is refused, connections stay open, and both sides only find that nobody answers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.networks import Namespace, network
from tests.parties import Node, needs_real_processes, wait_until
from tests.real_federation import Outcome, RealFederation, examine, trained

pytestmark = [pytest.mark.slow, *needs_real_processes]
# The learning rate does not depend on how many rounds there will be, so that runs of one and of two can be compared.
settings: dict[str, Any] = {
    "train.lr-schedule": "constant",
    "train.warmup-fraction": 0.0,
    # Long enough to be cut off in.
    "train.local-epochs": 6,
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Namespace]]:
    with network("owner", "hospital-a", "hospital-b") as made:
        yield made


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, llama_directory: Path, hosts: dict[str, Namespace]
) -> Iterator[RealFederation]:
    root = tmp_path_factory.mktemp("hosts")
    with RealFederation(root, model=llama_directory, num_nodes=2, hosts=hosts).running() as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(federation: RealFederation) -> Outcome:
    return federation.run({**settings, "num-server-rounds": 2})


def test_of_the_owner_only_the_door_answers_and_of_data_owners_nothing(
    federation: RealFederation, hosts: dict[str, Namespace]
) -> None:
    """All parties are up; every TCP port is tried."""
    owner, data_owner = hosts["owner"], hosts["hospital-a"]
    assert owner.find_open_ports(seen_from=data_owner) == {9443}
    assert data_owner.find_open_ports(seen_from=owner) == set()
    # Which both do listen, on their own loopback: the SuperLink, and what the SuperNode has for its ClientApps.
    assert federation.superlink.is_listening("127.0.0.1", 9093)
    assert federation.nodes[0].is_listening("127.0.0.1", 9094)
    levels = {found["check"]: found["level"] for found in examine(federation, "owner")["findings"]}
    assert (levels["loopback"], levels["door"], levels["nodes"]) == ("ok", "ok", "ok")
    levels = {
        found["check"]: found["level"]
        for found in examine(federation, "data-owner", node=federation.nodes[0])["findings"]
    }
    assert levels["model owner"] == "ok"


def test_a_cut_in_the_middle_of_a_shard(
    federation: RealFederation, hosts: dict[str, Namespace], undisturbed: Outcome
) -> None:
    """What is left of the shard comes later; what had come of it counts only then."""
    node, host = federation.nodes[1], hosts["hospital-b"]
    digest = undisturbed.summary["offsite"]["bundle_digest"]
    (node.bundles / digest).rename(node.directory / "put-aside")
    # 2.6 s for a shard: long enough to be seen on its way.
    with host.slowed(kbits_per_second=200):
        run_id, output = federation.submit({**settings, "strategy.shard-bytes": 2**16})
        wait_until(lambda: list(node.bundles.glob("incoming-*/have-*")), seconds=300, what=federation.logs)
        announced = host.received_bytes
        wait_until(lambda: host.received_bytes > announced + 2**15, seconds=60, what=federation.logs)
        shards = marks(node)
        with cut_off(federation, host, seconds=12):
            assert marks(node) == shards
            assert not (node.bundles / digest).exists()
    run = federation.wait(run_id, output)
    assert (node.bundles / digest).is_dir()
    assert_same_rounds(run, undisturbed, num_rounds=1)
    assert [entry.server_round for entry in trained(node, run_id)] == [1]


def test_cuts_while_a_data_owner_trains(
    federation: RealFederation, hosts: dict[str, Namespace], undisturbed: Outcome
) -> None:
    """A short one in the first round; in the second one so long that Flower takes the node for gone."""
    node, host = federation.nodes[1], hosts["hospital-b"]
    process, identity = node.process, node.node_id
    run_id, output = federation.submit({**settings, "num-server-rounds": 2})
    wait_until(lambda: is_training(node), seconds=300, what=federation.logs)
    with cut_off(federation, host, seconds=12):
        assert not (output / "checkpoints" / "round-0001").exists()
    wait_until((output / "checkpoints" / "round-0001").is_dir, seconds=120, what=federation.logs)
    wait_until(lambda: is_training(node), seconds=100, what=federation.logs)
    with cut_off(federation, host, seconds=60):
        wait_until(lambda: status_of(federation, identity) == "offline", seconds=100, what=federation.logs)
        assert not (output / "checkpoints" / "round-0002").exists()
    run = federation.wait(run_id, output)
    assert_same_rounds(run, undisturbed, num_rounds=2)
    assert run.summary["adapter_sha256"] == undisturbed.summary["adapter_sha256"]
    # Round 2 may have been trained twice: what is answered to a message that Flower has given up does not count.
    assert {entry.server_round for entry in trained(node, run_id)} == {1, 2}
    # The same process, under the id that it had.
    assert node.process is process
    assert node.is_alive
    assert status_of(federation, identity) == "online"


@contextlib.contextmanager
def cut_off(federation: RealFederation, host: Namespace, *, seconds: float) -> Iterator[None]:
    """Cut a host off for so long, and for the length of the block after it."""
    with host.cut_off():
        # Not a word comes back.
        with host.entered(), pytest.raises(TimeoutError):
            socket.create_connection((federation.proxy.host.address, federation.proxy.port), timeout=2)
        time.sleep(seconds)
        yield


def is_training(node: Node) -> bool:
    """Say whether a node has the whole of a train message, and has not begun to send its answer."""
    _, _, said = node.text.rpartition("Receiving: ")
    return said.startswith("train message") and "Received successfully" in said and "Sending: " not in said


def marks(node: Node) -> list[str]:
    """Return the shards that have come, of a bundle that is on its way."""
    return sorted(path.name for path in node.bundles.glob("incoming-*/have-*"))


def status_of(federation: RealFederation, node_id: str) -> str:
    """Return what Flower takes a node for."""
    listing = json.loads(federation.execute("flwr", "supernode", "list", "owner", "--format", "json").stdout)
    return next(node["status"] for node in listing["nodes"] if node["node-id"] == node_id)


def assert_same_rounds(run: Outcome, undisturbed: Outcome, *, num_rounds: int) -> None:
    """As many updates in each round, of the same clients with the same weights, and the same adapter to the bit."""
    assert run.status == undisturbed.status == "finished:completed"
    for field in ("clients", "num_replies", "num_examples"):
        assert [line[field] for line in run.rounds] == [line[field] for line in undisturbed.rounds[:num_rounds]]
    for number in range(1, num_rounds + 1):
        one, other = run.checkpoint(number), undisturbed.checkpoint(number)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
