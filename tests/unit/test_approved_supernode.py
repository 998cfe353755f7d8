"""The SuperNode that runs approved code only: Flower's own steps, with a server that lies at each of them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient

from ot_federated.data_owner import approved_supernode
from ot_federated.data_owner.approved_code import Approval, ApprovalError, ApprovedCode
from ot_federated.data_owner.approved_supernode import (
    ApprovedNodeState,
    ApprovedStateFactory,
    check_options,
    guard,
    own_flower_home,
    pull_approved,
)
from ot_federated.data_owner.audit_trail import read_trail
from ot_federated.data_owner.message_limits import BoundedClient
from ot_federated.errors import ConfigError
from tests.app_bundles import pack, release

run_id, node_id = 77, 5
good, evil = pack(release()), pack(release(ot_federated__errors=b"steal()\n"))
original_pull = approved_supernode._worker._pull_and_store_message


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_run(data: bytes = good, **claims: str) -> Run:
    """Return a run as a server describes it."""
    run = Run.create_empty(run_id=run_id)
    values = {"fab_id": "ot-federated/ot-federated", "fab_version": "0.1.0", "fab_hash": digest(data)}
    for name, value in (values | claims).items():
        setattr(run, name, value)
    return run


@dataclass
class Node:
    """A SuperNode's state and the server it asks."""

    approved: ApprovedCode
    state: ApprovedNodeState
    store: Any
    trail: Path
    runs: list[Run] = field(default_factory=list)
    content: bytes = good
    told_hash: str = ""
    message: RecordDict = field(default_factory=lambda: RecordDict({"config": ConfigRecord({"a": 1})}))
    num_pulled: int = 0
    node_config: dict[str, Any] = field(default_factory=dict)

    def pull(self, *, pull: Callable[..., int | None] = original_pull) -> str | None:
        """Let one message come; return the error that it was answered with, or None where it waits for its app."""
        message = Message(self.message, node_id, "train")
        message.metadata.__dict__["_run_id"] = run_id
        message.metadata.__dict__["_message_id"] = message.object_id
        tree = get_object_tree(message)
        objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}

        def pull_object(_run: int, object_id: str) -> bytes:
            self.num_pulled += 1
            return objects[object_id]

        found = pull_approved(
            pull,
            self.approved,
            state=self.state,
            object_store=self.store,
            node_config={"trail": str(self.trail), "name": "ward-7", **self.node_config},
            receive=lambda: (message, tree),
            get_run=lambda _: self.runs.pop(0) if len(self.runs) > 1 else self.runs[0],
            get_fab=lambda _hash, _run: Fab(self.told_hash or digest(self.content), self.content, {}),
            pull_object=pull_object,
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )
        assert found == run_id
        replies = self.state.get_messages_legacy(is_reply=True)
        return replies[0].error.reason if replies else None

    @property
    def has_code(self) -> bool:
        """Whether a ClientApp process would get any code."""
        return bool(self.state.get_tasks()) and self.state.get_fab(self.state.get_tasks()[0].fab_hash) is not None


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    for name, value in {"_task_id": 1, "_run_id": run_id, "_node_id": node_id}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    approved = ApprovedCode(tmp_path / "owner" / "approved.json")
    approved.approve(
        Approval(sha256=digest(good), name="ot-federated/ot-federated", version="0.1.0", num_differences=0)
    )
    objects = ObjectStoreFactory()
    state = ApprovedStateFactory(objects, approved=approved).state()
    assert isinstance(state, ApprovedNodeState)
    state.set_node_id(node_id)
    return Node(
        approved=approved, state=state, store=objects.store(), trail=tmp_path / "trail.jsonl", runs=[build_run()]
    )


def test_approved_code_is_handed_out(node: Node) -> None:
    assert node.pull() is None
    assert node.has_code
    assert node.pull() is None


def test_other_code_is_refused_kept_and_noted(node: Node) -> None:
    node.runs, node.content = [build_run(evil)], evil
    reason = node.pull()
    assert f"the app bundle {digest(evil)} is not approved" in reason
    assert "ot-federated approve FILE" in reason
    assert str(node.approved.path.parent) not in reason  # a server need not know the places of this disk
    assert not node.has_code
    kept = node.approved.path.parent / "refused-bundles" / f"{digest(evil)}.fab"
    assert kept.read_bytes() == evil
    (entry,) = read_trail(node.trail)
    assert (entry.status, entry.client, entry.flower_run, entry.reason) == ("refused", "ward-7", str(run_id), reason)


def test_approving_and_revoking_count_from_the_next_message_on(node: Node) -> None:
    node.runs, node.content = [build_run(evil)], evil
    assert node.pull() is not None
    node.approved.approve(
        Approval(sha256=digest(evil), name="ot-federated/ot-federated", version="0.1.0", num_differences=1)
    )
    assert node.pull() is None
    assert node.has_code
    node.approved.revoke(digest(evil))
    assert "not approved" in node.pull()
    assert not node.has_code


@pytest.mark.parametrize(
    "claims",
    [
        {"fab_hash": digest(evil)},
        {"fab_id": "somebody/else"},
        # Flower would import from outside of its directory of apps.
        {"fab_version": f"0.1.0.{digest(good)[:8]}/../../../elsewhere/app"},
        {"fab_id": "../x"},
    ],
)
def test_approved_bytes_under_another_name_are_refused(node: Node, claims: dict[str, str]) -> None:
    node.runs = [build_run(**claims)]
    assert "not approved" in node.pull()
    assert not node.has_code
    assert node.state.get_run(run_id) is None


def test_other_bytes_under_the_approved_digest_are_refused(node: Node) -> None:
    node.content, node.told_hash = evil, digest(good)
    assert "not approved" in node.pull()
    assert not node.has_code


def test_a_run_that_is_described_in_two_ways_is_judged_by_what_is_kept(node: Node) -> None:
    node.runs = [build_run(fab_version="../../x"), build_run(), build_run()]
    assert "not approved" in node.pull()


def test_a_list_that_cannot_be_trusted_refuses_everything(node: Node) -> None:
    node.approved.path.write_text("{}")
    assert "not approved" in node.pull()
    assert not node.trail.with_name("none").exists()


def test_a_huge_bundle_is_not_kept(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approved_supernode, "max_bundle_bytes", 100)
    node.runs, node.content = [build_run(evil)], evil
    assert "not approved" in node.pull()
    assert not (node.approved.path.parent / "refused-bundles").exists()


def test_a_full_trail_does_not_end_the_node(node: Node) -> None:
    node.trail.mkdir()
    node.runs, node.content = [build_run(evil)], evil
    assert "not approved" in node.pull()


def test_the_state_alone_keeps_other_code_out(node: Node) -> None:
    """The second lock, with the first taken away."""
    with pytest.raises(ApprovalError, match="came as far as"):
        node.state.store_fab(Fab(digest(evil), evil, {}))
    node.state.store_fab(Fab(digest(good), good, {}))
    assert node.state.get_fab(digest(good)).content == good
    node.approved.revoke(digest(good))
    assert node.state.get_fab(digest(good)) is None


def test_a_message_beyond_the_limit_is_not_fetched_to_its_end(node: Node) -> None:
    node.message = RecordDict({f"piece-{i}": ConfigRecord({"bytes": bytes([i]) * 2**16}) for i in range(200)})
    node.node_config = {"max-message-bytes": 2**20}
    reason = node.pull()
    assert reason is not None
    assert "more than the 1,048,576 bytes" in reason
    assert "max-message-bytes" in reason
    assert node.num_pulled < 25
    assert len(node.store) == 1  # the reply alone
    assert [(entry.status, entry.reason) for entry in read_trail(node.trail)] == [("refused", reason)]


def test_a_message_within_the_limit_is_fetched(node: Node) -> None:
    node.message = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(2**18, np.float32))})})
    node.node_config = {"max-message-bytes": 2**22}
    assert node.pull() is None


# ---- Around Flower's command ----------------------------------------------------------------------------------


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what :func:`guard` replaces in this process."""
    worker, command = approved_supernode._worker, approved_supernode._command
    monkeypatch.setattr(worker, "_pull_and_store_message", worker._pull_and_store_message)
    monkeypatch.setattr(command, "NodeStateFactory", command.NodeStateFactory)
    monkeypatch.setattr(approved_supernode._connection, "FleetHttpClient", FleetHttpClient)


@pytest.mark.usefixtures("unguarded")
def test_guard_replaces_both_steps(tmp_path: Path) -> None:
    approved = ApprovedCode(tmp_path / "approved.json")
    guard(approved)
    step = approved_supernode._worker._pull_and_store_message
    assert isinstance(step, functools.partial)
    assert step.func is pull_approved
    state = approved_supernode._command.NodeStateFactory(objectstore_factory=ObjectStoreFactory()).state()
    assert isinstance(state, ApprovedNodeState)
    assert state.approved is approved
    assert approved_supernode._connection.FleetHttpClient is BoundedClient


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("change", ["renamed", "other parameters", "other factory", "other client"])
def test_a_flower_that_works_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    worker, command = approved_supernode._worker, approved_supernode._command
    if change == "renamed":
        monkeypatch.delattr(worker, "_pull_and_store_message")
    elif change == "other parameters":
        monkeypatch.setattr(worker, "_pull_and_store_message", lambda *, state, receive: None)
    elif change == "other client":
        monkeypatch.setattr(approved_supernode._connection, "FleetHttpClient", object)
    else:
        monkeypatch.setattr(command, "NodeStateFactory", object)
    with pytest.raises(ApprovalError, match="Install the flwr that ot-federated asks for"):
        guard(ApprovedCode(tmp_path / "approved.json"))


@pytest.mark.parametrize("option", ["--allow-runtime-dependency-installation", "--allow-run"])
def test_installing_what_nobody_approved_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="packages that nobody approved"):
        check_options(["--insecure", option])


def test_flowers_options_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    check_options(["--insecure", "--isolation", "process", "--node-config", 'data-path="x"'])
    with pytest.raises(SystemExit):
        check_options(["--no-such-option"])
    assert "--no-such-option" in capsys.readouterr().err


def test_code_is_extracted_to_an_own_place_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with own_flower_home() as home:
        assert list(home.iterdir()) == []
        assert home.stat().st_mode & 0o077 == 0
        # Another SuperNode that starts meanwhile takes away what the dead left, and nothing else.
        dead = home.with_name(home.name.replace(f"-{os.getpid()}-", "-999999999-"))
        dead.mkdir()
        with own_flower_home() as other:
            assert other != home
        assert home.is_dir()
        assert not dead.exists()
    assert not home.exists()
