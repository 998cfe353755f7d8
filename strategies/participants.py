"""Who takes part: clients are waited for, asked who they are, named, chosen, and put aside for what they reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from ot_federated.errors import ProtocolError, RefusalError
from ot_federated.logs import log_fields
from ot_federated.messages import Hello, hello_type
from strategies.aggregators import Aggregator
from strategies.conversation import BundleSource, Conversation, is_broken, raise_flower_error
from strategies.exchange import Again, Patience, exchange, wait_for_nodes
from strategies.rejections import Rejections
from strategies.replies import RoundRecord
from strategies.secure_aggregation import min_clients


class Participants:
    """The clients of a run, and what each has said of itself.

    Args:
        source: The bundle that they are to have.
        min_nodes: Clients that must be connected, and at least train.
        why: Ends the message of an error that there are fewer.
        fraction_train: Share of the connected clients that train in a round, in (0, 1].
        max_retries: How often a client is asked again in a round after its process or its connection broke.
        straggler_seconds: Once ``min_nodes`` have said who they are, longest wait for the others; 0 for no such limit.
        node_timeout_seconds: Longest wait for ``min_nodes``.
        rejections: Whose replies were rejected, and how many put a client aside.
        seed: Seed of the choice of clients.
        on_progress: Told a line of text whenever something happened that a waiting person wants to know.

    Attributes:
        hellos: What each client said of itself, by node: without those that have to be asked before they train again.
    """

    def __init__(
        self,
        *,
        source: BundleSource,
        min_nodes: int,
        why: str,
        fraction_train: float,
        max_retries: int,
        straggler_seconds: float,
        node_timeout_seconds: float,
        rejections: Rejections,
        seed: int,
        on_progress: Callable[[str], None],
    ) -> None:
        self.source = source
        self.min_nodes = min_nodes
        self.why = why
        self.fraction_train = fraction_train
        self.max_retries = max_retries
        self.straggler_seconds = straggler_seconds
        self.node_timeout_seconds = node_timeout_seconds
        self.rejections = rejections
        self.seed = seed
        self.on_progress = on_progress
        self.hellos: dict[int, Hello] = {}

    def use(self, source: BundleSource) -> None:
        """Go on with this version of the bundle; what clients said of another one counts no more."""
        if source.digest != self.source.digest:
            self.source = source
            self.hellos.clear()

    def wait(self, grid: Grid) -> list[int]:
        """Wait until enough clients are connected and return their nodes.

        Raises:
            NodeTimeoutError: If too few connect in time.
        """
        return wait_for_nodes(
            grid,
            min_nodes=self.min_nodes,
            timeout_seconds=self.node_timeout_seconds,
            on_progress=self.on_progress,
            without=self.rejections.is_aside,
            why=self.why,
        )

    def greet(self, grid: Grid, node_ids: Sequence[int], *, record: RoundRecord) -> list[int]:
        """Return which of the connected nodes can take part; why others cannot is then in the record."""
        self._ask_who([node_id for node_id in node_ids if node_id not in self.hellos], grid=grid, record=record)
        greeted = {node_id: self.hellos[node_id].name for node_id in node_ids if node_id in self.hellos}
        self.rejections.recognise(dict.fromkeys(grid.get_node_ids(), "") | greeted)
        record.put_aside = self.rejections.names_aside()
        return [node_id for node_id in greeted if not self.rejections.is_aside(node_id)]

    def choose(self, server_round: int, present: Sequence[int], *, max_clients: int) -> list[int]:
        """Return the round's nodes in the order of their names, the same in a run that was stopped and resumed.

        Args:
            server_round: The round.
            present: The nodes to choose from.
            max_clients: So many at the most; 0: no limit.
        """
        ordered = sorted(present, key=lambda node_id: (self.hellos[node_id].name, node_id))
        size = min(len(ordered), max(self.min_nodes, round(len(ordered) * self.fraction_train)))
        size = min(size, max_clients or size)
        picked = np.random.default_rng([self.seed, server_round]).choice(len(ordered), size=size, replace=False)
        return [ordered[index] for index in sorted(picked)]

    def name(self, node_id: int) -> str:
        """Return a client's name, with its node where another client gave the same name."""
        name = self.hellos[node_id].name
        namesakes = sum(hello.name == name for hello in self.hellos.values())
        return name if namesakes == 1 else f"{name} (node {node_id})"

    def open_conversations(self, messages: Iterable[Message], *, only_deliver: bool = False) -> list[Conversation]:
        """Return a conversation with each client that a message is for, to end in the message or in the bundle."""
        return [
            Conversation(
                node_id,
                self.hellos[node_id],
                self.source,
                message,
                only_deliver=only_deliver,
                max_retries=self.max_retries,
            )
            for message in messages
            for node_id in [message.metadata.dst_node_id]
        ]

    def note_bundle(self, node_id: int, hello: Hello) -> None:
        """Note that a client, which said this of itself, has the whole bundle."""
        self.hellos[node_id] = replace(hello, missing_shards=())

    def forget(self, node_id: int) -> None:
        """Ask a client again who it is before the next round: it may have lost its bundle, or be gone."""
        self.hellos.pop(node_id, None)

    def reject(self, node_id: int, name: str, reason: str, *, record: RoundRecord) -> None:
        """Note that a client sent what no honest one sends; over the limit it is not asked again."""
        aside = self.rejections.add(node_id, name=name, reason=reason, server_round=record.number)
        record.failures[name] = f"rejected: {reason}"
        with log_fields(node=name):
            self.on_progress(f"round {record.number}  {name}  reply rejected: {reason}")
            if aside:
                self.on_progress(
                    f"{name} is put aside for the rest of the run, after "
                    f"{self.rejections.offenders[node_id].num_rejections} rejected replies (strategy.max-rejections)"
                )

    def _ask_who(self, node_ids: Sequence[int], *, grid: Grid, record: RoundRecord) -> None:
        """Ask new nodes who they are and which shards they lack."""
        if not node_ids:
            return
        content = self.source.hello_content()
        ttl = self.node_timeout_seconds
        registered = {node.node_id: node.name for node in grid.get_nodes()}
        messages = {node_id: Message(content, node_id, hello_type, ttl=ttl) for node_id in node_ids}
        retries = dict.fromkeys(node_ids, self.max_retries)

        def note(node_id: int, reply: Message) -> list[Again]:
            try:
                if is_broken(reply) and retries[node_id]:
                    retries[node_id] -= 1
                    return [Again(messages[node_id])]
                raise_flower_error(reply)
                hello = self.source.read_hello(reply)
                # The name under which the model owner registered the node's key, before the one it gives itself.
                self.hellos[node_id] = replace(hello, name=registered.get(node_id) or hello.name)
            except RefusalError as error:
                lose(node_id, str(error))
            except ProtocolError as error:
                self.reject(node_id, f"node {node_id}", str(error), record=record)
            return []

        def lose(node_id: int, reason: str) -> list[Again]:
            record.failures[f"node {node_id}"] = reason
            with log_fields(node=f"node-{node_id}"):
                self.on_progress(f"node {node_id} cannot take part: {reason}")
            return []

        exchange(
            grid,
            messages.values(),
            timeout_seconds=ttl,
            on_reply=note,
            on_lost=lose,
            on_late=lose,
            patience=Patience(lambda: len(self.hellos) >= self.min_nodes, self.straggler_seconds),
        )


def count_nodes_needed(aggregator: Aggregator, *, min_nodes: int, secure: bool) -> tuple[int, str]:
    """Return how many clients must be connected, and a sentence on why where these are more than ``min_nodes``."""
    if secure and max(min_nodes, aggregator.min_replies) < min_clients:
        return min_clients, f" Secure aggregation needs {min_clients} clients: with fewer it would hide nothing."
    if aggregator.min_replies > min_nodes:
        return aggregator.min_replies, (
            f" {type(aggregator.strategy).__name__} needs {aggregator.min_replies} replies to withstand the "
            "strategy.num-malicious-nodes that are set: set fewer of those, or another strategy.name."
        )
    return min_nodes, ""
