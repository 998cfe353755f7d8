"""What one message may take of a data owner's memory.

Flower fetches a message whole, and puts it together, before any app sees it. A server that means harm could send one
of any size: in many objects, in one large or compressed response, as an array that names the same chunk a million
times, or as lists of numbers that take a byte each on the way. So everything is counted while the SuperNode fetches it,
by what it will take once it is put together; beyond the limit nothing more is fetched, and the server gets the reason.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
from flwr.proto.recorddict_pb2 import ConfigRecord, MetricRecord
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supernode.fleet_http_client import FleetHttpClient
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ot_federated.errors import OtFederatedError

# For the processes that answer messages. Flower fetches a message in threads, of which the C library would give each a
# heap of its own; what is free in one is no use to another, and a shard would be in memory three times (measured).
allocator_environment = {"MALLOC_ARENA_MAX": "1"}
# Flower's chunks have 5 MiB, the pieces of a shard 1 MiB, an app bundle 10 MB at most.
max_response_bytes = 16 * 2**20
# What an entry of a record, and an element of a list, take as Python objects, at most.
entry_bytes, element_bytes = 512, 64


class RefusedMessageError(OtFederatedError):
    """A message takes more than this data owner allows, or is none."""


class MessageMeter:
    """Adds up what the objects of one message take, in whatever order they come.

    Attributes:
        max_bytes: What they may take.
        num_bytes: What those seen so far take, once they are put together.
        error: Why the message is refused, once it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.error: RefusedMessageError | None = None
        self._lock = threading.Lock()
        self._chunks: dict[str, int] = {}
        self._wanted: Counter[str] = Counter()

    def add(self, object_id: str, content: bytes) -> None:
        """Take in an object.

        Raises:
            RefusedMessageError: If the message takes too much with it.
        """
        with self._lock:
            try:
                self._count(object_id, content)
            except (ValueError, LookupError, TypeError, DecodeError) as error:
                self.error = RefusedMessageError(f"the message has an object that is none: {type(error).__name__}")
            if self.num_bytes > self.max_bytes:
                self.error = RefusedMessageError(
                    f"the message takes more than the {self.max_bytes:,} bytes that this data owner allows; the data "
                    "owner can raise max-message-bytes in the node config"
                )
            if self.error:
                raise self.error

    def _count(self, object_id: str, content: bytes) -> None:
        kind = get_object_type_from_object_content(content)
        self.num_bytes += len(content)
        if kind == "ArrayChunk":
            self._chunks[object_id] = len(content)
            self.num_bytes -= self._wanted.pop(object_id, 0) * (max_response_bytes - len(content))
        elif kind == "Array":
            children = get_object_children_ids_from_object_content(content)
            for number, times in Counter[int](json.loads(body_of(content))["arraychunk_ids"]).items():
                chunk = children[number]
                # One that is not here yet, or in the SuperNode from another message, is as large as one can be.
                if chunk not in self._chunks:
                    self._wanted[chunk] += times
                self.num_bytes += times * self._chunks.get(chunk, max_response_bytes)
        elif kind in ("ConfigRecord", "MetricRecord"):
            self.num_bytes += count_entry_bytes(content, kind)


def body_of(content: bytes) -> bytes:
    """Return what follows the head of a serialised object."""
    return content[content.index(HEAD_BODY_DIVIDER) + 1 :]


def count_entry_bytes(content: bytes, kind: str) -> int:
    """Return what the entries of a serialised record take, beyond its own bytes."""
    record: Any = (ConfigRecord if kind == "ConfigRecord" else MetricRecord).FromString(body_of(content))
    total = 0
    for item in record.items:
        total += entry_bytes
        which = item.value.WhichOneof("value") or ""
        if which.endswith("_list"):
            total += element_bytes * len(getattr(item.value, which).vals)
    return total


class BoundedClient(FleetHttpClient):
    """Flower's client of a SuperLink, which reads no response of more than :data:`max_response_bytes`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Compressed, a response could be a thousand times what it says.
        self._client.headers["accept-encoding"] = "identity"
        self._client.event_hooks = {"response": [bound_response]}


def bound_response(response: httpx.Response) -> None:
    """Let no more be read of a response than is allowed.

    Raises:
        RefusedMessageError: If it is compressed.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RefusedMessageError(
            f"the server sends a response compressed by {encoding[:100]!r}, which was not asked for"
        )
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = BoundedStream(response.stream)


class BoundedStream(httpx.SyncByteStream):
    """A response that may not be longer than :data:`max_response_bytes`."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        """Yield the bytes as they come.

        Raises:
            RefusedMessageError: If they are too many.
        """
        num_bytes = 0
        for part in self._stream:
            num_bytes += len(part)
            if num_bytes > max_response_bytes:
                raise RefusedMessageError(f"the server sends a response of more than {max_response_bytes:,} bytes")
            yield part

    def close(self) -> None:
        """End the response."""
        self._stream.close()
