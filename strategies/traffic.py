"""What crosses the network: a grid that counts the bytes of everything a run says and hears.

Flower counts a run's bytes too (``flwr list``), where SuperLink and SuperNodes are, and not in a simulation. Here the
ServerApp counts, so that a run's summary has the figure wherever it ran: contents exactly, and what Flower puts around
them (names, ids of 64 hexadecimal digits, tables of chunks) by the sizes that Flower 1.41's objects have. A test holds
the sum against Flower's serialised objects, and ``tests/deployment/test_real_federation.py`` against ``flwr list``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

chunk_bytes = 5 * 2**20
# What surrounds a message, an array, a further chunk of an array, and a piece of a shard.
message_frame_bytes, array_frame_bytes, chunk_frame_bytes, piece_frame_bytes = 1000, 450, 156, 180


def count_wire_bytes(content: RecordDict) -> int:
    """Return about how many bytes a message with this content takes on the wire.

    Equal arrays in one message travel once: Flower addresses contents by their digest.
    """
    total = message_frame_bytes + piece_frame_bytes * max(0, len(content.config_records) - 1)
    distinct: set[bytes] = set()
    for record in content.array_records.values():
        for name, array in record.items():
            distinct.add(array.data)
            total += array_frame_bytes + len(name) + chunk_frame_bytes * (len(array.data) // chunk_bytes)
    total += sum(map(len, distinct))
    records: list[Mapping[str, Any]] = [*content.config_records.values(), *content.metric_records.values()]
    return total + sum(len(name) + count_scalar_bytes(value) for record in records for name, value in record.items())


def count_scalar_bytes(value: object) -> int:
    """Return the bytes of a scalar, or of a list of them, with their tags."""
    if isinstance(value, (list, tuple)):
        return sum(map(count_scalar_bytes, value))
    if isinstance(value, str):
        return len(value.encode()) + 6
    return len(value) + 6 if isinstance(value, bytes) else 10


class MeteredGrid(Grid):
    """A grid that counts what passes through it.

    Attributes:
        bytes_to_clients: Bytes of messages that were sent.
        bytes_to_server: Bytes of replies that came.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.bytes_to_clients = 0
        self.bytes_to_server = 0

    def take(self) -> tuple[int, int]:
        """Return the bytes to clients and to the server since this was last called."""
        taken = self.bytes_to_clients, self.bytes_to_server
        self.bytes_to_clients = self.bytes_to_server = 0
        return taken

    def set_run(self, run: Run) -> None:
        """Pass the run on."""
        self.grid.set_run(run)

    @property
    def run(self) -> Run:
        """The grid's run."""
        return self.grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Return what is known of the connected nodes."""
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        messages = list(messages)
        sent = list(self.grid.push_messages(messages))
        # Flower returns fewer ids than messages where some could not be sent: only in sum is it known which.
        if len(sent) == len(messages):
            self.bytes_to_clients += sum(count_wire_bytes(message.content) for message in messages)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come."""
        replies = list(self.grid.pull_messages(message_ids))
        self._count_replies(replies)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies."""
        messages = list(messages)
        self.bytes_to_clients += sum(count_wire_bytes(message.content) for message in messages)
        replies = list(self.grid.send_and_receive(messages, timeout=timeout))
        self._count_replies(replies)
        return replies

    def _count_replies(self, replies: Iterable[Message]) -> None:
        for reply in replies:
            # An error reply that Flower makes up itself has crossed no network.
            self.bytes_to_server += 0 if reply.has_error() else count_wire_bytes(reply.content)
