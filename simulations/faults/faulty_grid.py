"""A grid on which a schedule's faults happen, each once, whatever processes die meanwhile."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from ot_federated.data_owner import bundle_cache, client_app
from ot_federated.training import StepReport
from simulations.faults.forked_grid import ForkedGrid, Writer, kill_this_process
from simulations.faults.schedules import Fault
from simulations.in_process import Scalar, node_id_of, send_over_wire

modules_file = "modules.txt"


def note_modules(directory: Path) -> None:
    """Note what this process has imported, for :func:`simulations.faults.player.import_what_was_needed`."""
    descriptor = os.open(directory / modules_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ours = [name for name in sys.modules if not name.startswith("__")]
    os.write(descriptor, ("\n".join(ours) + "\n").encode())
    os.close(descriptor)


class Happened:
    """Which faults have happened: a file for each, so that every process knows.

    Args:
        directory: Where the files are.
        faults: The schedule's.
    """

    def __init__(self, directory: Path, faults: Sequence[Fault]) -> None:
        self.directory = directory
        self.faults = tuple(faults)
        directory.mkdir(parents=True, exist_ok=True)

    def claim(self, fault: Fault) -> bool:
        """Say whether this fault is still to happen; from now on it has."""
        try:
            os.close(os.open(self.directory / f"{self.faults.index(fault):02d}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def list(self) -> list[str]:
        """Return the faults that have happened, in the order of the schedule."""
        return [str(self.faults[int(path.name)]) for path in sorted(self.directory.iterdir())]


class FaultyGrid(ForkedGrid):
    """Clients that die and messages that are lost, late, or there twice.

    Args:
        app: The ClientApp.
        run_config: The run config.
        num_clients: Number of clients; each has a bundle cache of its own.
        directory: Where these caches are.
        happened: The schedule's faults.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        run_config: Mapping[str, Scalar],
        num_clients: int,
        directory: Path,
        happened: Happened,
    ) -> None:
        self.directory = directory
        super().__init__(app, run_config=run_config, num_clients=num_clients, on_reply=self._pass_on)
        self.happened = happened
        self._numbers = {node_id_of(number): number for number in range(num_clients)}
        self._late: list[Message] = []
        self._again: list[tuple[int, Message]] = []
        for node_id, number in self._numbers.items():
            self._contexts[node_id].node_config["cache-dir"] = str(directory / f"client-{number}")

    def _find(self, what: str, message: Message, *, node_id: int) -> Fault | None:
        """Return the fault of this kind that strikes a message or its reply now, if there is one."""
        record: Mapping[str, Any] = message.content.config_records.get("config", {}) if message.has_content() else {}
        for fault in self.happened.faults:
            if fault.what != what or fault.client != self._numbers[node_id]:
                continue
            of_shard = message.metadata.message_type == "query.shard" and record.get("shard-index") == fault.count
            of_round = message.metadata.message_type == "train" and record.get("server-round") == fault.server_round
            if (of_shard if "shard" in what else of_round) and self.happened.claim(fault):
                return fault
        return None

    def in_client(self, message: Message) -> None:
        """Die before or while a message is handled, or lose the bundle."""
        node_id = message.metadata.dst_node_id
        if self._find("client killed before training", message, node_id=node_id):
            kill_this_process()
        if self._find("client loses its bundle", message, node_id=node_id):
            shutil.rmtree(str(self._contexts[node_id].node_config["cache-dir"]))
        if fault := self._find("client killed in training", message, node_id=node_id):
            client_app.progress_line = lambda *_: _killer(fault.count)
        if self._find("client killed with a shard", message, node_id=node_id):
            # Its bytes are in their place, and nothing says so yet.
            bundle_cache.atomic_write_bytes = lambda *_, **__: kill_this_process()  # type: ignore[attr-defined]

    def upload(self, message: Message, data: bytes, write: Writer) -> None:
        """Send the reply, or die in the middle of it."""
        if self._find("client killed in upload", message, node_id=message.metadata.dst_node_id):
            write(data[: len(data) // 2])
            kill_this_process()
        write(data)
        note_modules(self.directory.parent)

    def _pass_on(self, reply: Message) -> list[Message]:
        node_id = reply.metadata.src_node_id
        if self._find("reply lost in silence", reply, node_id=node_id):
            return []
        for what in ("reply lost, node reported gone", "shard lost"):
            if self._find(what, reply, node_id=node_id):
                return [_reported_gone(reply)]
        if self._find("reply late", reply, node_id=node_id):
            self._late.append(reply)
            return []
        replies = [reply, *self._late]
        self._late = []
        if self._find("reply twice", reply, node_id=node_id):
            replies.append(reply)
        server_round = _round_of(reply)
        replies += [old for old_round, old in self._again if old_round < server_round]
        self._again = [(old_round, old) for old_round, old in self._again if old_round >= server_round]
        if self._find("reply again in the next round", reply, node_id=node_id):
            self._again.append((server_round, reply))
        return replies

    def pull_messages(self, message_ids: Any) -> list[Message]:
        """Return the replies that are there; a late one comes when no other can come before it."""
        pulled = super().pull_messages(message_ids)
        if not pulled and not self._queue and self._late:
            self._replies += [send_over_wire(reply, message_id=str(uuid4()))[0] for reply in self._late]
            self._late = []
        return pulled


def _round_of(reply: Message) -> int:
    record = reply.content.config_records.get("config") if reply.has_content() else None
    value = record.get("server-round") if record else None
    return value if isinstance(value, int) else 0


def _killer(step: int) -> Any:
    def report(done: StepReport) -> None:
        if done.step > step or done.step == done.num_steps:
            kill_this_process()

    return report


def _reported_gone(reply: Message) -> Message:
    error = Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="the node is gone"), reply_to=reply)
    for name in ("_reply_to_message_id", "_src_node_id", "_dst_node_id"):
        error.metadata.__dict__[name] = reply.metadata.__dict__[name]
    return error
