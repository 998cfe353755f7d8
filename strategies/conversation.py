"""The conversations of a round: bring the bundle to clients that lack it, then let them train.

Each client's part is a small state machine driven by its replies. A client that has lost its bundle says so in its
reply to ``train`` and gets the bundle and a second ``train`` in the same round. Clients that share a cache on one
machine wait while the first of them fills it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ot_federated.bundle import Manifest, manifest_name
from ot_federated.bundle_shards import changed_part, count_shards, locate_pieces, read_stretches, shard_size
from ot_federated.errors import ProtocolError, RefusalError
from ot_federated.messages import (
    Hello,
    build_content,
    config_of,
    encode_shard,
    hello_type,
    parse_hello,
    plain_text,
    shard_type,
    text_field,
    train_type,
)
from strategies.exchange import Again, Patience, exchange

max_deliveries = 3
# Flower's codes for an app that could not be loaded, a condition that is not met, and a bundle that is refused: asked
# again, the answer would be the same. All others tell of a process or a connection that broke.
lasting_errors = (1, 6, 7)


@dataclass(frozen=True)
class BundleSource:
    """The bundle as the server sends it: read from disk piece by piece, never in memory as a whole.

    Attributes:
        directory: Where it is.
        manifest: Its manifest.
        shard_bytes: Size of a shard.
        bases: Manifests of its earlier versions: to who has one, only what changed since is sent.
    """

    directory: Path
    manifest: Manifest
    shard_bytes: int
    bases: tuple[Manifest, ...] = ()

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self.manifest.digest

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return count_shards(self.manifest, shard_bytes=self.shard_bytes)

    def part(self, base: str) -> Manifest:
        """Return the manifest of what is sent to who has the earlier version ``base``; of all where that is empty."""
        return changed_part(self.manifest, next((m for m in self.bases if m.digest == base), None))

    def read_hello(self, reply: Message) -> Hello:
        """Read the reply to ``query.hello``.

        Raises:
            ProtocolError: If it is malformed, or the client refused.
        """
        counts = {m.digest: count_shards(self.part(m.digest), shard_bytes=self.shard_bytes) for m in self.bases}
        return parse_hello(reply, num_shards=self.num_shards, num_changed_shards=counts)

    def hello_content(self) -> RecordDict:
        """Return the content of ``query.hello``: which bundle, its manifest, and its earlier versions."""
        fields: dict[str, str | int | float | bytes | list[int]] = {
            "bundle-digest": self.digest,
            "shard-bytes": self.shard_bytes,
            "manifest": (self.directory / manifest_name).read_bytes(),
            "base-digests": " ".join(base.digest for base in self.bases),
        }
        return build_content(fields)

    def shard_content(self, index: int, *, base: str = "") -> RecordDict:
        """Return the content of ``query.shard`` for one shard of what changed since ``base``."""
        digest = hashlib.sha256()
        places = locate_pieces(self.part(base), index, shard_bytes=self.shard_bytes)
        pieces = [partial(read_stretches, self.directory, stretches) for stretches in places]
        for read in pieces:
            digest.update(read())
        fields: dict[str, str | int | float | bytes | list[int]] = {
            "bundle-digest": self.digest,
            "shard-bytes": self.shard_bytes,
            "shard-index": index,
            "base-digest": base,
            "shard-sha256": digest.hexdigest(),
        }
        return build_content(fields, pieces=encode_shard(pieces))


@dataclass
class Conversation:
    """What the server and one client say to each other in one round.

    Attributes:
        node_id: The client's node.
        hello: What it said of itself.
        source: The bundle.
        train: The message that it should answer in the end.
        only_deliver: Whether it is over once the client has the bundle, ``train`` being sent in another way.
        max_retries: How often it is asked again after its process or its connection broke.
        reply: Its answer to ``train``, once it came.
        failure: Why it takes no further part, once it does not.
        rejected: Whether that is a reply that no honest client gives.
        num_bundle_bytes: Bytes of shards sent to it.
        num_deliveries: How often it was asked what it lacks.
        num_retries: How often it was asked again.
        asked: Type of the message that it should answer next.
        missing: Shards that it still lacks.
    """

    node_id: int
    hello: Hello
    source: BundleSource
    train: Message
    only_deliver: bool = False
    max_retries: int = 0
    reply: Message | None = None
    failure: str = ""
    rejected: bool = False
    num_bundle_bytes: int = 0
    num_deliveries: int = 0
    num_retries: int = 0
    asked: str = ""
    missing: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = list(self.hello.missing_shards)

    @property
    def has_bundle(self) -> bool:
        """Whether the client is believed to have the whole bundle."""
        return not self.missing

    @property
    def done(self) -> bool:
        """Whether nothing more is expected of this client in this round."""
        return self.reply is not None or bool(self.failure) or (self.only_deliver and self.has_bundle)

    def speak(self) -> Message:
        """Return what to say next: the next missing shard, or ``train``."""
        if self.has_bundle:
            return self._message(self.train.content, train_type)
        index = self.missing[0]
        part = self.source.part(self.hello.base)
        self.num_bundle_bytes += shard_size(part, index, shard_bytes=self.source.shard_bytes)
        return self._message(self.source.shard_content(index, base=self.hello.base), shard_type)

    def ask(self) -> Message:
        """Return the question which shards the client lacks.

        Raises:
            RefusalError: If it has been given the bundle too often in this round.
        """
        self.num_deliveries += 1
        if self.num_deliveries >= max_deliveries:
            raise RefusalError(f"the client lacked the bundle {self.num_deliveries} times in one round")
        return self._message(self.source.hello_content(), hello_type)

    def listen(self, reply: Message) -> Message | Again | None:
        """Take in a reply and return what to say next, or None when the conversation is over."""
        try:
            if is_broken(reply) and self.num_retries < self.max_retries:
                return self.repeat()
            return self._listen(reply)
        except ProtocolError as error:
            self.failure, self.rejected = str(error), not isinstance(error, RefusalError)
            return None

    def lose(self, reason: str) -> Again | None:
        """Take in that nothing can be said at present; return what to say later, or None when it is over."""
        if self.num_retries < self.max_retries:
            return self.repeat()
        self.failure = reason
        return None

    def repeat(self) -> Again:
        """Say once more what was not answered; a bundle goes on at the shard that is missing."""
        self.num_retries += 1
        if self.asked == hello_type:
            return Again(self._message(self.source.hello_content(), hello_type))
        return Again(self.speak())

    def _listen(self, reply: Message) -> Message | None:
        raise_flower_error(reply)
        if reply.metadata.src_node_id != self.node_id:
            # Whatever it says, it came in answer to this node's message.
            raise ProtocolError(f"it claims to come from node {reply.metadata.src_node_id}")
        if reply.metadata.message_type != self.asked:
            raise ProtocolError(f"it answers {reply.metadata.message_type!r:.100} to {self.asked!r}")
        if reply.metadata.message_type == hello_type:
            # Its name stays: the model owner may know it by another than its own.
            self.hello = replace(self.source.read_hello(reply), name=self.hello.name)
            self.missing = list(self.hello.missing_shards)
            return None if self.done else self.speak()
        record = config_of(reply)
        status = text_field(record, "status")
        if status == "bundle-missing":
            return self.ask()
        if status != "ok":
            raise RefusalError(plain_text(text_field(record, "reason")))
        if reply.metadata.message_type == shard_type:
            self.missing.pop(0)
            return None if self.done else self.speak()
        self.reply = reply
        return None

    def _message(self, content: RecordDict, message_type: str) -> Message:
        self.asked = message_type
        return Message(content, self.node_id, message_type, ttl=self.train.metadata.ttl)


def is_broken(reply: Message) -> bool:
    """Say whether Flower reports that the client's process or its connection broke, so that asking again may help."""
    return reply.has_error() and reply.error.code not in lasting_errors


def raise_flower_error(reply: Message) -> None:
    """Raise what Flower reports in place of a client's reply.

    Raises:
        RefusalError: If the reply is an error reply.
    """
    if reply.has_error():
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(reply.error.reason))
        lines = [line.strip() for line in reason.splitlines() if line.strip()] or ["no reason given"]
        if "ActorDiedError" in reason:
            # Flower gives a dead Ray worker to the next client, which then fails too.
            lines = ["its Ray worker died, most likely for lack of memory: let fewer train at once (client-num-cpus)"]
        raise RefusalError(f"Flower reports error {reply.error.code}: {plain_text(lines[-1], max_length=500)}")


def hold_conversations(
    grid: Grid,
    conversations: Sequence[Conversation],
    *,
    timeout_seconds: float,
    on_change: Callable[[Conversation], None],
    num_enough: int = 0,
    straggler_seconds: float = 0.0,
) -> None:
    """Hold all conversations of a round until each is done.

    Args:
        grid: Flower's grid.
        conversations: One for each client.
        timeout_seconds: For the whole round; whoever is not done then has failed.
        on_change: Called when a conversation got its bundle, its reply, or failed.
        num_enough: Replies that would do.
        straggler_seconds: Longest wait for the others once these are there; 0 for no such limit.
    """
    table = {conversation.node_id: conversation for conversation in conversations}
    fillers: dict[str, Conversation] = {}
    waiting: list[Conversation] = []
    first: list[Message] = []
    for conversation in conversations:
        if not conversation.has_bundle and conversation.hello.cache_id in fillers:
            waiting.append(conversation)
            continue
        if not conversation.has_bundle:
            fillers[conversation.hello.cache_id] = conversation
        first.append(conversation.speak())

    def release(filler: Conversation) -> list[Message]:
        """Let those go on who wait for the cache that ``filler`` has filled, or failed to fill."""
        if fillers.get(filler.hello.cache_id) is not filler or not (filler.has_bundle or filler.done):
            return []
        del fillers[filler.hello.cache_id]
        messages = []
        for follower in [other for other in waiting if other.hello.cache_id == filler.hello.cache_id]:
            waiting.remove(follower)
            if filler.has_bundle and not follower.only_deliver:
                # Believed, not known: a follower that lacks it after all will say so and be served.
                follower.missing = []
                messages.append(follower.speak())
            elif filler.has_bundle:
                messages.append(follower.ask())
            else:
                fillers[follower.hello.cache_id] = follower
                messages.append(follower.ask())
                break
        return messages

    def on_reply(node_id: int, reply: Message) -> list[Message | Again]:
        conversation = table[node_id]
        answer = conversation.listen(reply)
        if answer is None:
            on_change(conversation)
        return [*([answer] if answer else []), *release(conversation)]

    def on_lost(node_id: int, reason: str) -> list[Message | Again]:
        conversation = table[node_id]
        later = conversation.lose(reason)
        if later:
            return [later]
        on_change(conversation)
        return [*release(conversation)]

    def on_late(node_id: int, reason: str) -> None:
        table[node_id].failure = reason
        on_change(table[node_id])

    exchange(
        grid,
        first,
        timeout_seconds=timeout_seconds,
        on_reply=on_reply,
        on_lost=on_lost,
        on_late=on_late,
        patience=Patience(
            lambda: sum(conversation.reply is not None for conversation in conversations) >= num_enough,
            straggler_seconds,
        ),
    )
    for conversation in conversations:
        if not conversation.done:
            conversation.failure = "the bundle could not be delivered to its cache in time"
            on_change(conversation)
