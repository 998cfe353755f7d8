"""A federation inside one process: real messages, no SuperLink, no Ray.

:class:`InProcessGrid` hands every message to the ClientApp by a function call. What makes it worth testing
against is that nothing else is simplified: messages, replies and a client's state go through Flower's own
serialiser in both directions, node ids are 64-bit numbers as the SuperLink deals them, and an exception in
the ClientApp comes back as the error reply that a SuperNode would send.

This is the module that touches Flower identifiers that are not public, with ``faults.forked_grid`` and
``benchmarks.message_link``, which need the wire format alone: a new Flower release breaks nothing else. They are
``TaskIdentity`` (who creates a message), the inflatable objects (the wire format), the serialiser of contexts, ``Run``
and two constants.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import cast
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Scalar = bool | int | float | str
ReplyHook = Callable[[Message], list[Message]]

_run_ids = itertools.count(1)


class InProcessGrid(Grid):
    """A Flower grid whose nodes are calls of one ClientApp in this process.

    Attributes:
        bytes_to_clients: Serialised bytes that clients received, by message type.
        bytes_to_server: Serialised bytes that the server received, by message type.
        num_messages: Messages that were pushed to clients, by message type.
        num_error_replies: Replies that carried an error, by message type of the request.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        run_config: Mapping[str, Scalar],
        num_clients: int,
        node_config: Mapping[str, Scalar] | None = None,
        on_reply: ReplyHook | None = None,
    ) -> None:
        """Connect ``num_clients`` nodes.

        Args:
            client_app: What every node runs.
            run_config: Flat run config, as both apps see it.
            num_clients: Number of nodes.
            node_config: Keys that every node has besides ``partition-id`` and ``num-partitions``.
            on_reply: Receives each reply before it is serialised and returns the replies that travel instead:
                none to drop it, two to duplicate it, a changed one to corrupt it. A reply that the hook keeps
                and returns with a later one arrives late.
        """
        self._client_app = client_app
        self._run = Run.create_empty(next(_run_ids))
        self._run_config = dict(run_config)
        self._on_reply = on_reply
        self._contexts = {
            node_id_of(partition): Context(
                run_id=self._run.run_id,
                node_id=node_id_of(partition),
                node_config={**(node_config or {}), "partition-id": partition, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for partition in range(num_clients)
        }
        self._queue: dict[str, Message] = {}
        self._replies: list[Message] = []
        self.bytes_to_clients: Counter[str] = Counter()
        self.bytes_to_server: Counter[str] = Counter()
        self.num_messages: Counter[str] = Counter()
        self.num_error_replies: Counter[str] = Counter()
        self._become_server()

    def _become_server(self) -> None:
        # Another grid may have changed it.
        identify_as_server(self._run.run_id)

    def run_server_app(self, server_app: ServerApp) -> None:
        """Run the ServerApp's main on this grid; its exceptions propagate."""
        self._become_server()
        context = Context(
            run_id=self._run.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(self._run_config),
        )
        server_app(self, context)

    def state_of(self, node_id: int) -> RecordDict:
        """Return what a node keeps in ``context.state`` between messages."""
        return self._contexts[node_id].state

    def set_run(self, run: Run) -> None:
        """Ignore the run: this grid has its own."""

    @property
    def run(self) -> Run:
        """The run; only its id is filled in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; Flower's own grids deprecate this in favour of ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes, in the order of their partitions."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids; a message to an unknown node gets none, as in a simulation.

        Raises:
            ValueError: If a message holds what Flower cannot serialise.
        """
        message_ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                continue
            message_id = str(uuid4())
            received, num_bytes = send_over_wire(message, message_id=message_id)
            self.bytes_to_clients[message.metadata.message_type] += num_bytes
            self.num_messages[message.metadata.message_type] += 1
            # Flower's grids name the caller's message too, and strategies read its id.
            message.metadata.__dict__["_message_id"] = message_id
            self._queue[message_id] = received
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Execute at most one of the queued messages and return the replies that are there.

        One at a time, so that a server which polls sees replies arrive one after the other.

        Raises:
            ValueError: If a reply holds what Flower cannot serialise; a SuperNode would never reply.
        """
        wanted = set(message_ids)
        ready = next((message_id for message_id in self._queue if message_id in wanted), None)
        if ready is not None:
            self._deliver(self._queue.pop(ready))
        pulled = [reply for reply in self._replies if reply.metadata.reply_to_message_id in wanted]
        self._replies = [reply for reply in self._replies if reply.metadata.reply_to_message_id not in wanted]
        return pulled

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and return all their replies.

        ``timeout`` is ignored: once nothing is queued, no reply can come, and waiting would not help.
        """
        del timeout
        message_ids = self.push_messages(messages)
        replies = []
        for _ in message_ids:
            replies += self.pull_messages(message_ids)
        return replies

    def _deliver(self, message: Message) -> None:
        reply = self._execute(message)
        for sent in [reply] if self._on_reply is None else self._on_reply(reply):
            received, num_bytes = send_over_wire(sent, message_id=str(uuid4()))
            self.bytes_to_server[message.metadata.message_type] += num_bytes
            self.num_error_replies[message.metadata.message_type] += received.has_error()
            self._replies.append(received)

    def _execute(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        # A copy: what an app that fails has done to its state must not survive.
        context = _copy_context(self._contexts[node_id])
        try:
            reply = self._client_app(message=message, context=context)
            self._contexts[node_id] = _copy_context(context)
        except Exception as error:  # a SuperNode survives whatever its app raises
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        return reply


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    run_config: Mapping[str, Scalar],
    num_clients: int,
    node_config: Mapping[str, Scalar] | None = None,
    on_reply: ReplyHook | None = None,
) -> InProcessGrid:
    """Run a whole federation in this process and return its grid, with the traffic it counted.

    Exceptions of the ServerApp propagate. The arguments are those of :class:`InProcessGrid`.
    """
    grid = InProcessGrid(
        client_app, run_config=run_config, num_clients=num_clients, node_config=node_config, on_reply=on_reply
    )
    grid.run_server_app(server_app)
    return grid


def identify_as_server(run_id: int) -> None:
    """Make this process the server of a run: ``Message()`` takes run and sender from a process-wide identity."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def node_id_of(partition: int) -> int:
    """Return the node id of a partition: the same in every run, unsigned 64-bit like the SuperLink's."""
    return int.from_bytes(hashlib.sha256(f"node {partition}".encode()).digest()[:8])


def send_over_wire(message: Message, *, message_id: str) -> tuple[Message, int]:
    """Return the message as its receiver sees it, under ``message_id``, and its size in bytes.

    The bytes are those of Flower's objects: metadata, records, array headers and 5 MB chunks. Equal arrays in
    one message count once, as on the wire.
    """
    contents = {object_id: item.deflate() for object_id, item in get_all_nested_objects(message).items()}
    num_bytes = sum(map(len, contents.values()))
    received = cast(Message, inflate_object_from_contents(message.object_id, contents))
    received.metadata.__dict__["_message_id"] = message_id
    return received, num_bytes


def _copy_context(context: Context) -> Context:
    return context_from_proto(context_to_proto(context))
