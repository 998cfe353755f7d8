"""Talking to nodes over a Flower grid: bounded waits, replies taken as they come.

Flower's ``send_and_receive`` returns when all replies are there and its ``sample_nodes`` waits for ever. Here a
reply is handed on as soon as it arrives, what should be said next is sent at once, and every wait has an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from ot_federated.errors import OtFederatedError

poll_seconds = 0.3


class NodeTimeoutError(OtFederatedError):
    """Too few clients connected in time."""


def wait_for_nodes(
    grid: Grid,
    *,
    min_nodes: int,
    timeout_seconds: float,
    on_progress: Callable[[str], None],
    without: Callable[[int], bool] = lambda _node_id: False,
    why: str = "",
) -> list[int]:
    """Return the ids of the connected nodes once there are ``min_nodes``.

    Args:
        grid: Flower's grid.
        min_nodes: So many are waited for.
        timeout_seconds: Longest wait.
        on_progress: Told how many are connected.
        without: Says of a node whether it is to be left out.
        why: Ends the message of an error.

    Raises:
        NodeTimeoutError: If they do not come in time.
    """
    deadline = time.monotonic() + timeout_seconds
    told = -1
    while len(node_ids := sorted(node_id for node_id in grid.get_node_ids() if not without(node_id))) < min_nodes:
        if time.monotonic() > deadline:
            raise NodeTimeoutError(
                f"{len(node_ids)} of at least {min_nodes} clients connected within {timeout_seconds:g} s. Start more "
                "clients (in a simulation: num-clients), wait longer (strategy.node-timeout-seconds), or ask for fewer "
                f"(strategy.min-nodes).{why}"
            )
        if len(node_ids) != told:
            told = len(node_ids)
            on_progress(f"waiting for clients: {told} of {min_nodes} are connected")
        time.sleep(poll_seconds)
    return node_ids


@dataclass(frozen=True)
class Again:
    """A message to a node whose connection broke: it is sent once the node is connected."""

    message: Message


@dataclass(frozen=True)
class Patience:
    """How long to wait for the last ones.

    Attributes:
        enough: Says whether the answers that are there would do.
        seconds: Longest wait for the others from then on; 0 for no such limit.
    """

    enough: Callable[[], bool]
    seconds: float


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    *,
    timeout_seconds: float,
    on_reply: Callable[[int, Message], Sequence[Message | Again]],
    on_lost: Callable[[int, str], Sequence[Message | Again]],
    on_late: Callable[[int, str], object],
    patience: Patience | None = None,
) -> None:
    """Send messages and handle each reply when it comes, until all are answered or the time is up.

    Args:
        grid: Flower's grid.
        messages: What to send first.
        timeout_seconds: For the whole exchange.
        on_reply: Gets the node that was written to (an error reply names the SuperLink as its sender) and its
            reply; returns what to send next, to any node.
        on_lost: Gets a node that a message could not be sent to, and why; returns what to send next.
        on_late: Gets a node that has not answered when the time is up, and why.
        patience: Ends the exchange earlier, once enough have answered.
    """
    deadline, limit = time.monotonic() + timeout_seconds, f"no reply within {timeout_seconds:g} s"
    pending: dict[str, int] = {}
    parked: list[Message] = []
    outbox: list[Message | Again] = list(messages)
    hurried = False
    while outbox or pending or parked:
        while outbox:
            item = outbox.pop(0)
            if isinstance(item, Again):
                parked.append(item.message)
                continue
            node_id = item.metadata.dst_node_id
            # One at a time: Flower may return fewer ids than messages, and a shard need not wait in memory.
            message_id = next(iter(grid.push_messages([item])), None)
            del item
            if message_id is None:
                outbox += on_lost(node_id, "the message could not be delivered; is the node still connected?")
            else:
                pending[message_id] = node_id
        if patience and patience.seconds and not hurried and patience.enough():
            hurried = True
            if time.monotonic() + patience.seconds < deadline:
                deadline = time.monotonic() + patience.seconds
                limit = f"no reply within {patience.seconds:g} s after enough others had answered"
        if time.monotonic() > deadline:
            for node_id in [*pending.values(), *(message.metadata.dst_node_id for message in parked)]:
                on_late(node_id, limit)
            return
        replies = list(grid.pull_messages(list(pending))) if pending else []
        for reply in replies:
            # A reply that was not asked for, or comes twice, is not in the table.
            answered = pending.pop(reply.metadata.reply_to_message_id, None)
            if answered is not None:
                outbox += on_reply(answered, reply)
        if parked:
            connected = set(grid.get_node_ids())
            outbox += [message for message in parked if message.metadata.dst_node_id in connected]
            parked = [message for message in parked if message.metadata.dst_node_id not in connected]
        if not replies and (pending or parked):
            time.sleep(poll_seconds)


class FixedNodes(Grid):
    """A grid that shows an aggregator exactly the nodes which our strategy chose; it sends nothing."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> list[int]:
        """Return the chosen nodes."""
        return self._node_ids

    def set_run(self, run: Run) -> None:
        """Refuse: the run belongs to the real grid."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """The real grid's run."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refuse: aggregators send nothing themselves."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refuse: aggregators receive nothing themselves."""
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refuse: aggregators send nothing themselves."""
        raise NotImplementedError
