"""Flower's SuperNode, running approved code only.

Flower's SuperNode fetches the app bundle (FAB) of a run from the SuperLink and hands it to the process that runs the
ClientApp, which extracts it, puts it first on ``sys.path`` and imports it. Here the bundle is stopped at two places,
both in the SuperNode's own process and before anything is extracted:

- where the SuperNode fetches it: a bundle that is not on the data owner's list is refused, the server gets the reason
  as its reply, and the SuperNode goes on;
- where ClientApp processes get it: the SuperNode's state gives out approved bundles alone. This is the only source
  of code there is, in both isolation modes, so that it holds even should the first be passed by.

The list is read at every message: what is revoked answers no further message.

ClientApp processes extract into a ``FLWR_HOME`` of this SuperNode's own. Flower takes a directory that exists there
for the bundle's content when it agrees in name, version and eight digits of the digest, which can be forged.

Flower offers no hook for this. The few private names that are replaced are checked at the start, and another Flower
is refused.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Error, Message
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.nodestate.nodestate_factory import NodeStateFactory

from ot_federated.cache import state_root
from ot_federated.data_owner import warm_start
from ot_federated.data_owner.app_bundle import AppBundleError, max_bundle_bytes
from ot_federated.data_owner.approved_code import ApprovalError, ApprovedCode
from ot_federated.data_owner.audit_trail import Content, Entry, append_entry, choose_trail
from ot_federated.data_owner.first_contact import look_at_connection, not_taken
from ot_federated.data_owner.message_limits import (
    BoundedClient,
    MessageMeter,
    RefusedMessageError,
    allocator_environment,
)
from ot_federated.data_owner.node_config import message_limit
from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.logs import log_fields, logger, show_lines

# By name: the package flwr.supernode.cli has a function with the name of this module.
_command: Any = importlib.import_module("flwr.supernode.cli.flower_supernode")
_worker: Any = importlib.import_module("flwr.supernode.start_client_internal")
_connection: Any = importlib.import_module("flwr.supernode.fleet_http_connection")

# Flower's codes, of those that a server need not ask again after.
invalid_fab_code, failed_condition_code = 7, 6
client_app_command = "flwr-clientapp"
_pull_parameters = {
    *("state", "object_store", "node_config", "receive", "get_run", "get_fab", "pull_object"),
    *("confirm_message_received", "trusted_entities"),
}


class RefusedCodeError(OtFederatedError):
    """A run's app bundle is not approved."""


def run_supernode(arguments: Sequence[str], approved: ApprovedCode, *, warm: bool = True) -> None:
    """Run Flower's SuperNode with the arguments of ``flower-supernode`` until it is stopped.

    Args:
        arguments: Options of ``flower-supernode``.
        approved: What may run.
        warm: Whether messages are answered by forks of a process that has imported what they need:
            :mod:`ot_federated.data_owner.warm_start`.

    Raises:
        ConfigError: If an option would bring in code that nobody approved.
        ApprovalError: If the list cannot be trusted, or this Flower is not one that can be guarded.
    """
    show_lines()
    superlink, authority = check_options(arguments)
    num_approved = len(approved.read())
    guard(approved)
    logger.info(
        "%d approved app bundles in %s%s",
        num_approved,
        approved.path,
        "" if num_approved else ": every run will be refused until one is approved (ot-federated approve)",
    )
    look_at_connection(superlink, authority)
    sys.argv = ["flower-supernode", *arguments]
    with own_flower_home() as home:
        os.environ |= {
            **{name: os.environ.get(name, value) for name, value in allocator_environment.items()},
            "FLWR_HOME": str(home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # The SuperNode starts further commands by name: those of this installation.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        }
        with serve_warm_starts(home) if warm else nullcontext():
            try:
                _command.flower_supernode()
            except SystemExit as end:
                if end.code:
                    logger.error(not_taken)
                raise


def check_options(arguments: Sequence[str]) -> tuple[str, Path | None]:
    """Check the options as Flower's own parser understands them, abbreviations included.

    Returns:
        The SuperLink's address, and the authority's certificate where there is one.

    Raises:
        ConfigError: If one of them would bring in code that nobody approved.
    """
    parsed = _command._parse_args_run_supernode().parse_args(list(arguments))
    if parsed.runtime_dependency_install:
        raise ConfigError(
            "--allow-runtime-dependency-installation lets a run install packages that nobody approved. Install what "
            "it needs with pip beforehand, and leave the option out."
        )
    if parsed.isolation == "process":
        logger.info(
            "isolation process: give the flower-superexec that you start a FLWR_HOME of its own, into which nothing "
            "but this SuperNode's runs was ever extracted, and no --allow-runtime-dependency-installation"
        )
    authority = None if parsed.insecure else parsed.root_certificates
    return str(parsed.superlink or ""), Path(authority).expanduser() if authority else None


def guard(approved: ApprovedCode) -> None:
    """Replace, in this process, Flower's two steps through which code comes in.

    Raises:
        ApprovalError: If this Flower does not have them as they are known.
    """
    pull = getattr(_worker, "_pull_and_store_message", None)
    known = (
        callable(pull)
        and set(inspect.signature(pull).parameters) == _pull_parameters
        and callable(getattr(_worker, "_insert_message", None))
        and getattr(_command, "NodeStateFactory", None) is NodeStateFactory
        and {"store_fab", "get_fab"} <= set(dir(InMemoryNodeState))
        and getattr(_connection, "FleetHttpClient", None) is BoundedClient.__base__
    )
    if not known or pull is None:
        raise ApprovalError(
            f"flwr {importlib.metadata.version('flwr')} takes in code in another way than the releases that "
            "ot-federated can guard. Install the flwr that ot-federated asks for: pip install ot-federated."
        )
    _worker._pull_and_store_message = functools.partial(pull_approved, pull, approved)
    _connection.FleetHttpClient = BoundedClient
    _command.NodeStateFactory = functools.partial(ApprovedStateFactory, approved=approved)


def pull_approved(pull: Callable[..., int | None], approved: ApprovedCode, **arguments: Any) -> int | None:
    """Fetch one message as Flower does; answer it with the reason where its run's code is not approved.

    Args:
        pull: Flower's own step.
        approved: What may run.
        arguments: Those of Flower's step.

    Returns:
        The run of the message, or None where there was none.
    """
    state = arguments["state"]
    received: list[Message] = []
    runs: dict[int, Run] = {}

    def receive() -> Any:
        found = arguments["receive"]()
        if found is not None:
            received.append(found[0])
            # A run whose bundle was let in: it may have been revoked since.
            if run := state.get_run(found[0].metadata.run_id):
                require_approved(approved, run, run.fab_hash)
        return found

    def get_run(run_id: int) -> Run:
        runs[run_id] = arguments["get_run"](run_id)
        return runs[run_id]

    def get_fab(fab_hash: str, run_id: int) -> Fab:
        fab: Fab = arguments["get_fab"](fab_hash, run_id)
        require_approved(approved, runs[run_id], hashlib.sha256(fab.content).hexdigest(), data=fab.content)
        return fab

    def pull_object(run_id: int, object_id: str) -> bytes:
        content: bytes = arguments["pull_object"](run_id, object_id)
        meter.add(object_id, content)
        return content

    node = str(arguments["node_config"].get("name") or f"node-{state.get_node_id()}")
    meter = MessageMeter(message_limit(arguments["node_config"]))
    guarded = {"receive": receive, "get_run": get_run, "get_fab": get_fab, "pull_object": pull_object}
    with log_fields(node=node):
        try:
            run_id = pull(**{**arguments, **guarded})
            # Flower has logged it, and forgotten the message.
            if meter.error:
                raise meter.error
            return run_id
        except (RefusedCodeError, RefusedMessageError) as error:
            message = received[0]
            note_refusal(message, error, arguments["node_config"], node=node)
            code = invalid_fab_code if isinstance(error, RefusedCodeError) else failed_condition_code
            reply = Message(Error(code, str(error)), reply_to=message)
            _worker._insert_message(reply, state, arguments["object_store"])
            return message.metadata.run_id


def require_approved(approved: ApprovedCode, run: Run, sha256: str, *, data: bytes | None = None) -> None:
    """Refuse a run whose bundle is not approved, or that calls it by another name, version or digest.

    The names count: Flower makes the place from which it imports of what the run, not the bundle, says of itself.

    Args:
        approved: What may run.
        run: The run as the server describes it.
        sha256: Digest of the bundle's bytes.
        data: These bytes, where they just came; they are kept for the data owner to look into.

    Raises:
        RefusedCodeError: With a reason for the server; this side's log has more.
    """
    claim = f"{run.fab_id} {run.fab_version} {run.fab_hash}"
    try:
        approval = approved.find(sha256)
        if approval and claim == f"{approval.name} {approval.version} {approval.sha256}":
            return
        hint = "" if data is None else keep_refused(approved, data)
    except OtFederatedError as error:
        hint = str(error)
    with log_fields(run=str(run.run_id)):
        logger.warning("REFUSED, and nothing of it was run: the app bundle %s, sent as %r. %s", sha256, claim, hint)
    raise RefusedCodeError(
        f"this data owner runs approved code only, and the app bundle {sha256} is not approved. Send the data owner "
        "the release as a file (flwr build), to be approved with: ot-federated approve FILE"
    )


def keep_refused(approved: ApprovedCode, data: bytes) -> str:
    """Keep a refused bundle and return what its data owner can do."""
    if len(data) > max_bundle_bytes:
        return f"It has {len(data):,} bytes, more than Flower allows, and was not kept."
    return f"To look into it: ot-federated approve {approved.keep_refused(data)}"


def note_refusal(message: Message, error: Exception, node_config: Mapping[str, object], *, node: str) -> None:
    """Write a refusal into the audit trail; what leaves with it is the reason alone."""
    entry = Entry(
        message=message.metadata.message_type,
        client=node,
        flower_run=str(message.metadata.run_id),
        status="refused",
        reason=str(error),
        content=Content(num_bytes=len(str(error).encode())),
    )
    try:
        if path := choose_trail(node_config):
            append_entry(path, entry)
    # The reason holds nothing of the data, and the node must stay alive for the runs that are approved.
    except (OtFederatedError, OSError) as failure:
        logger.error("the refusal could not be written into the audit trail: %s", failure)


class ApprovedNodeState(InMemoryNodeState):
    """The SuperNode's state, which takes in and gives out approved bundles alone."""

    approved: ApprovedCode

    def store_fab(self, fab: Fab) -> str:
        """Store an approved bundle.

        Raises:
            ApprovalError: If it is not approved.
        """
        if not self.approved.find(hashlib.sha256(fab.content).hexdigest()):
            raise ApprovalError("An app bundle that is not approved came as far as the SuperNode's state.")
        return super().store_fab(fab)

    def get_fab(self, fab_hash: str) -> Fab | None:
        """Return an approved bundle; None where there is no such bundle, or no longer."""
        fab = super().get_fab(fab_hash)
        approval = self.approved.find(hashlib.sha256(fab.content).hexdigest()) if fab else None
        return fab if approval else None


class ApprovedStateFactory(NodeStateFactory):
    """Flower's factory of the state, making :class:`ApprovedNodeState`."""

    def __init__(self, objectstore_factory: Any, *, approved: ApprovedCode) -> None:
        super().__init__(objectstore_factory)
        state = ApprovedNodeState(objectstore_factory.store())
        state.approved = approved
        self.state_instance = state


@contextmanager
def serve_warm_starts(home: Path) -> Iterator[None]:
    """Put a stand-in for ``flwr-clientapp`` before Flower's own, and keep the process that it has forked.

    Args:
        home: A directory that only this user can enter: whoever reaches the socket in it has code run.
    """
    commands = home / "warm"
    commands.mkdir()
    script = commands / client_app_command
    cold = str(Path(sysconfig.get_path("scripts")) / client_app_command)
    words = [sys.executable, "-IS", warm_start.__file__, "run", str(home), cold]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)
    os.environ["PATH"] = os.pathsep.join([str(commands), os.environ["PATH"]])
    server = subprocess.Popen([sys.executable, "-P", warm_start.__file__, "serve"], cwd=home, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def own_flower_home() -> Iterator[Path]:
    """Yield an empty directory, readable for this user alone, and remove it at the end.

    Not in the system's temporary directory, where files of a SuperNode that runs for weeks are cleared away one by
    one. What killed SuperNodes of this machine left is removed.
    """
    root = state_root() / "supernodes"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    begin = f"{socket.gethostname()}-"
    for leftover in root.glob(f"{begin}*"):
        process_id = leftover.name.removeprefix(begin).partition("-")[0]
        if process_id.isdecimal() and not psutil.pid_exists(int(process_id)):
            shutil.rmtree(leftover, ignore_errors=True)
    home = Path(tempfile.mkdtemp(prefix=f"{begin}{os.getpid()}-", dir=root))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def build_app_bundle(checkout: Path) -> bytes:
    """Return the bundle that ``flwr build`` and ``flwr run`` make of a checkout; none of its code is run for it.

    Raises:
        AppBundleError: If it is not a Flower app.
    """
    try:
        return build_fab_from_disk(checkout)
    except (ValueError, OSError) as error:
        raise AppBundleError(f"{checkout} is not a Flower app: {error}") from error
