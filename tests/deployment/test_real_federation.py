"""A real federation as ``deploy/`` describes it: what comes out of it, who does not get in, and what faults do to it.

One federation is shared by all checks; those that break something come last, and mend it. Nodes are registered by
name; their own word for themselves is another. Runs with the same settings give the same adapter, whatever happens to
them on the way: the faults are judged by that.
"""

from __future__ import annotations

import http.client
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ot_federated.certificates import make_authority
from ot_federated.data_owner.audit_trail import Entry, read_trail
from strategies.secure_aggregation import choose_range, quantisation_error
from tests.networks import find_free_port
from tests.parties import needs_real_processes, wait_until
from tests.real_federation import Outcome, RealFederation, call, examine, refusal_of, trained

pytestmark = [pytest.mark.slow, *needs_real_processes]
# So that a secure run of one round can be compared with the first of two plain ones: updates travel in fp32, and the
# learning rate does not depend on how many rounds there will be.
settings: dict[str, Any] = {
    "num-server-rounds": 2,
    "strategy.update-dtype": "float32",
    "train.lr-schedule": "constant",
    "train.warmup-fraction": 0.0,
}
faketime = shutil.which("faketime")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, llama_directory: Path) -> Iterator[RealFederation]:
    built = RealFederation(tmp_path_factory.mktemp("federation"), model=llama_directory, num_nodes=3)
    with built.running():
        yield built


@pytest.fixture(scope="module")
def outcome(federation: RealFederation) -> Outcome:
    return federation.run(settings)


def test_two_rounds_of_three_nodes_deliver_a_plugged_in_model(federation: RealFederation, outcome: Outcome) -> None:
    assert outcome.status == "finished:completed"
    assert [line["num_replies"] for line in outcome.rounds] == [3, 3]
    # As registered, not as they call themselves.
    names = ["hospital-a", "hospital-b", "hospital-c"]
    assert [line["clients"] for line in outcome.rounds] == [names, names]
    before = AutoModelForCausalLM.from_pretrained(federation.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(outcome.output / "model").state_dict()
    adapter = load_file(outcome.output / "adapter" / "adapter.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed
    assert changed <= set(adapter)
    for node in federation.nodes:
        entries = [entry for entry in read_trail(node.trail) if isinstance(entry, Entry)]
        assert [entry.message for entry in entries if entry.content.num_arrays] == ["train", "train"]
        # Each bundle cache is its owner's own.
        assert (node.bundles / outcome.summary["offsite"]["bundle_digest"] / "manifest.json").is_file()


def test_the_summary_tells_the_bytes_that_flower_counted(outcome: Outcome) -> None:
    sizes = outcome.summary["bytes"]
    assert sizes["wire_to_clients"] == pytest.approx(outcome.bytes_to_clients, rel=0.05)
    assert sizes["wire_to_server"] == pytest.approx(outcome.bytes_to_server, rel=0.05)


def test_a_node_that_is_not_registered_is_refused(federation: RealFederation) -> None:
    stranger = federation.build_node("stranger")
    federation.approve(stranger)
    stranger.start("--cold", "--max-retries", "1")
    assert refusal_of(federation, stranger, "[code: 2004] Failed to activate SuperNode")
    # The data owner is told what that may mean.
    assert "its key is not registered there" in stranger.text


def test_a_node_without_a_key_is_refused(federation: RealFederation) -> None:
    keyless = federation.build_node("keyless")
    options = ["--superlink", federation.proxy.address, "--root-certificates", str(keyless.etc / "ca.crt")]
    options += ["--host", "127.0.0.1", "--port", str(find_free_port()), "--max-retries", "1"]
    keyless.launch(["flower-supernode", *options])
    assert refusal_of(federation, keyless, "[code: 2001]")


def test_a_client_without_the_authority_goes_no_further(federation: RealFederation) -> None:
    """Registered and with its key, but with another authority: it is the client that refuses, before it says a word."""
    doubtful = federation.build_node("doubtful")
    federation.register(doubtful)
    make_authority(doubtful.directory / "other")
    shutil.copyfile(doubtful.directory / "other" / "ca.crt", doubtful.etc / "ca.crt")
    federation.approve(doubtful)
    doubtful.start("--cold", "--max-retries", "1")
    assert refusal_of(federation, doubtful, "CERTIFICATE_VERIFY_FAILED", "certificate verify failed")


@pytest.mark.skipif(faketime is None, reason="faketime is missing (Debian: apt-get install faketime)")
def test_a_node_whose_clock_is_ahead_is_refused_and_told_so(federation: RealFederation) -> None:
    """Flower lets it end without a word."""
    early = federation.build_node("early")
    federation.register(early)
    federation.approve(early)
    assert faketime is not None
    early.start("--cold", "--max-retries", "1", before=(faketime, "-f", "+30s"))
    assert refusal_of(federation, early, "SuperNode terminated gracefully")
    assert "30 s ahead of the model owner's" in early.text


@pytest.mark.skipif(faketime is None, reason="faketime is missing (Debian: apt-get install faketime)")
def test_a_node_whose_clock_is_two_minutes_behind_is_taken(federation: RealFederation) -> None:
    late = federation.build_node("late")
    federation.register(late)
    federation.approve(late)
    assert faketime is not None
    late.start("--cold", "--max-retries", "1", before=(faketime, "-f", "-120s"))
    wait_until(lambda: late.node_id, seconds=120, what=federation.logs)
    assert "behind the model owner's" not in late.text
    late.stop()


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-messages"),
        *("/", "/health", "/docs", "/openapi.json", "/v1/fleet/", "//v1/control/list-runs", "/v1/fleet"),
        *("/v1/fleet/../control/list-runs", "/v1/fleet/..%2fcontrol/list-runs", "/v1/control/..%2ffleet/list-runs"),
        *("/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet/pull-messages?a=b", "/V1/FLEET/pull-messages"),
    ],
)
def test_the_door_passes_nothing_but_calls_of_supernodes(federation: RealFederation, path: str) -> None:
    status, body = call(federation, federation.proxy.port, path)
    assert status in (400, 403)
    assert "nginx" in body


def test_the_same_calls_reach_the_superlink_from_its_own_machine(federation: RealFederation) -> None:
    """So the refusals above are the door's: behind it the Control API answers whoever comes."""
    status, _ = call(federation, federation.superlink.port, "/v1/control/list-runs", protobuf=True)
    assert status == http.client.OK
    # And a SuperNode's call does pass the door: it is the SuperLink that refuses an unsigned one.
    status, body = call(federation, federation.proxy.port, "/v1/fleet/pull-messages", protobuf=True)
    assert status == http.client.UNAUTHORIZED
    assert "nginx" not in body
    status, body = call(federation, federation.proxy.port, "/v1/fleet/pull-messages", method="GET")
    assert status == http.client.FORBIDDEN


def test_a_request_beyond_the_size_is_refused(federation: RealFederation) -> None:
    status, _ = call(federation, federation.proxy.port, "/v1/fleet/push-object", body=bytes(17 * 2**20))
    assert status == http.client.REQUEST_ENTITY_TOO_LARGE


def test_the_doctor_finds_both_sides_well(federation: RealFederation, outcome: Outcome) -> None:
    owner = examine(federation, "owner")
    levels = {finding["check"]: finding["level"] for finding in owner["findings"]}
    for check in ("authority", "certificate", "superlink", "loopback", "door", "nodes", "versions"):
        assert levels[check] == "ok", owner
    node = federation.nodes[0]
    found = examine(federation, "data-owner", node=node)
    levels = {finding["check"]: finding["level"] for finding in found["findings"]}
    for check in ("model owner", "clock", "node key", "authority", "data", "bundle cache"):
        assert levels[check] == "ok", found
    assert found["errors"] == 0


def test_secure_aggregation_gives_the_plain_mean(federation: RealFederation, outcome: Outcome) -> None:
    """Every node has as many rows, so that the plain mean weighs them alike; quantisation is all that may differ."""
    secure = federation.run({**settings, "num-server-rounds": 1, "strategy.secure-aggregation": True})
    assert secure.status == "finished:completed"
    assert secure.rounds[0]["num_replies"] == 3
    config = federation.settings(**settings)
    clipping_range = choose_range(
        learning_rate=float(config["train.learning-rate"]), max_steps=int(config["train.max-steps"])
    )
    one, other = outcome.checkpoint(1), secure.checkpoint(1)
    assert one.keys() == other.keys()
    largest = max(float((one[name] - other[name]).abs().max()) for name in one)
    # One level of quantisation, and the rounding of fp32 sums in another order.
    assert 0 < largest <= quantisation_error(clipping_range) + 1e-6


def test_a_cut_network_and_a_killed_node_cost_time_alone(federation: RealFederation, outcome: Outcome) -> None:
    """In the first round the network is cut for 12 s, in the second a SuperNode is killed with all it has started."""
    node = federation.nodes[2]
    identity = node.node_id
    run_id, output = federation.submit(settings)
    wait_until(node.client_apps, seconds=300, what=federation.logs)
    # nginx stands still with its connections open: to both sides the line is dead, and longer than a heartbeat waits.
    with federation.proxy.frozen():
        time.sleep(12)
    wait_until(lambda: (output / "checkpoints" / "round-0001").is_dir(), seconds=300, what=federation.logs)
    wait_until(node.client_apps, seconds=100, what=federation.logs)
    node.kill()
    node.come_back(seconds=200)
    # By its key: under the id, and so the name, that it had.
    assert node.node_id == identity
    continued = federation.wait(run_id, output)
    assert_same_result(continued, outcome)
    assert [entry.server_round for entry in trained(node, run_id)] == [1, 2]


def test_a_superlink_killed_in_a_round_loses_that_round_at_most(federation: RealFederation, outcome: Outcome) -> None:
    """Flower does not go on with the run, which fails once its ServerApp is missed; the owner's checkpoints do."""
    lost_id, output = federation.submit(settings)
    wait_until(lambda: (output / "checkpoints" / "round-0001").is_dir(), seconds=300, what=federation.logs)
    wait_until(federation.nodes[0].client_apps, seconds=100, what=federation.logs)
    # As systemd and Docker see to it, what the SuperLink has started goes with it.
    federation.superlink.kill()
    assert not (output / "summary.json").exists()
    processes = [node.process for node in federation.nodes]
    federation.superlink.start()
    resumed_id, _ = federation.submit({**settings, "resume": True, "output-dir": str(output)})
    resumed = federation.wait(resumed_id, output)
    assert_same_result(resumed, outcome)
    # The SuperNodes have lived on, and the first round was not trained again.
    assert [node.process for node in federation.nodes] == processes
    assert all(node.is_alive for node in federation.nodes)
    for node in federation.nodes:
        rounds = [entry.server_round for entry in trained(node, lost_id, resumed_id)]
        assert rounds.count(1) == 1
        assert rounds.count(2) in (1, 2)
    wait_until(lambda: federation.find_run(lost_id)["status"] == "finished:failed", seconds=120, what=federation.logs)


def assert_same_result(run: Outcome, undisturbed: Outcome) -> None:
    assert run.status == "finished:completed"
    assert [line["num_replies"] for line in run.rounds] == [3, 3]
    assert [line["num_examples"] for line in run.rounds] == [line["num_examples"] for line in undisturbed.rounds]
    assert run.summary["adapter_sha256"] == undisturbed.summary["adapter_sha256"]
