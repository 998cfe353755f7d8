"""What a message may take: whatever it looks like on the way, it is counted by what it becomes."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from ot_federated.data_owner import message_limits
from ot_federated.data_owner.message_limits import BoundedClient, MessageMeter, RefusedMessageError
from ot_federated.data_owner.node_config import message_limit
from ot_federated.errors import ConfigError


def count(content: RecordDict, *, turned: bool = False, max_bytes: int = 2**40) -> int:
    objects = [(name, item.deflate()) for name, item in get_all_nested_objects(content).items()]
    meter = MessageMeter(max_bytes)
    for name, data in reversed(objects) if turned else objects:
        meter.add(name, data)
    return meter.num_bytes


@pytest.mark.parametrize("turned", [False, True])
def test_arrays_count_as_they_travel_and_as_they_become(turned: bool) -> None:
    values = np.random.default_rng(0).integers(0, 255, 12 * 2**20, np.uint8)
    content = RecordDict({"arrays": ArrayRecord({"a": Array(values), "b": Array(values[:1000])})})
    assert 2 * values.nbytes < count(content, turned=turned) < 2 * values.nbytes + 10_000


@pytest.mark.parametrize("turned", [False, True])
def test_an_array_that_names_one_chunk_often(turned: bool) -> None:
    """4 MiB on the way, 100 GiB in memory."""

    def content(times: int) -> RecordDict:
        record = ArrayRecord()
        record["a"] = Array(np.zeros(2**22 - 128, np.uint8))
        record["a"].__dict__["_chunks"] = record["a"].slice_array() * times
        return RecordDict({"arrays": record})

    assert 11 * 2**22 < count(content(10), turned=turned) < 11 * 2**22 + 10_000
    with pytest.raises(RefusedMessageError, match="takes more than the 2,147,483,648 bytes"):
        count(content(25_600), turned=turned, max_bytes=2**31)


@pytest.mark.parametrize(
    ("record", "least"),
    [
        (ConfigRecord({"numbers": [1] * 100_000}), 40 * 100_000),
        (MetricRecord({"numbers": [1] * 100_000}), 40 * 100_000),
        (ConfigRecord({"texts": ["ab"] * 100_000}), 55 * 100_000),
        (ConfigRecord({f"{number:x}": True for number in range(10_000)}), 200 * 10_000),
    ],
)
def test_lists_and_entries_count_as_python_objects(record: Any, least: int) -> None:
    assert len(record.deflate()) < least / 5 * 2
    assert count(RecordDict({"config": record})) > least


def test_bytes_count_once() -> None:
    assert count(RecordDict({"config": ConfigRecord({"bytes": bytes(10**6)})})) < 1_002_000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"Array  2\0{}",
        b'Array  24\0{"arraychunk_ids": [0]}',
        b"Array  2\0[]",
        b"ConfigRecord  3\0\xff\xff\xff",
        b"\xff\xfe",
    ],
)
def test_what_is_no_object_is_refused(content: bytes) -> None:
    meter = MessageMeter(1000)
    with pytest.raises(RefusedMessageError, match="object that is none"):
        meter.add("a" * 64, content)
    assert meter.error is not None


@pytest.mark.parametrize("limit", [0, -1, True, "2 GB", 1.5])
def test_a_limit_that_is_none(limit: object) -> None:
    with pytest.raises(ConfigError, match="max-message-bytes"):
        message_limit({"max-message-bytes": limit})
    assert message_limit({}) == 2 * 2**30


# ---- Responses ------------------------------------------------------------------------------------------------


@contextmanager
def server(body: bytes, **headers: str) -> Iterator[BoundedClient]:
    """A server that answers everything with these bytes, and a client of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["accept-encoding"] == "identity"
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{httpd.server_port}"
    with BoundedClient.from_server_address(address, insecure=True, root_certificates=None, interceptors=[]) as client:
        yield client
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def ask(client: BoundedClient) -> PullMessagesResponse:
    return client.PullMessages(PullMessagesRequest())


def test_responses_within_the_limit_are_read_and_larger_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    response = PullMessagesResponse(message_object_trees=[ObjectTree(object_id="x" * 100_000)])
    with server(response.SerializeToString()) as client:
        assert ask(client) == response
        monkeypatch.setattr(message_limits, "max_response_bytes", 50_000)
        with pytest.raises(RefusedMessageError, match="a response of more than 50,000 bytes"):
            ask(client)


def test_a_compressed_response_is_refused() -> None:
    body = gzip.compress(PullMessagesResponse(message_object_trees=[ObjectTree(object_id="x")]).SerializeToString())
    with server(body, content_encoding="gzip") as client, pytest.raises(RefusedMessageError, match="compressed by"):
        ask(client)
