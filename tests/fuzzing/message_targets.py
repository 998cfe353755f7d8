"""Messages: the bytes are Flower's records as they travel; what Flower cannot read never reaches this project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

run_round = 1


def _read_records() -> Callable[[bytes], Any]:
    """Return a reader of Flower's record dictionary; it returns None for what Flower refuses."""
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
    from google.protobuf.message import DecodeError

    def read(data: bytes) -> Any:
        try:
            return recorddict_from_proto(ProtoRecordDict.FromString(data))
        except (DecodeError, ValueError, TypeError, KeyError, AttributeError):
            return None

    return read


def _encode(content: Any) -> bytes:
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(content).SerializeToString()


def _build_message(message_type: str) -> Any:
    from flwr.app import Message, RecordDict

    from ot_federated.data_owner.client_app import app
    from simulations.in_process import InProcessGrid

    InProcessGrid(app, run_config={}, num_clients=1)  # a message needs the identity that a grid gives
    return Message(RecordDict(), 7, message_type)


def build_hello_reply_parser() -> Callable[[bytes], object]:
    from ot_federated.messages import parse_hello

    read, message = _read_records(), _build_message("query.hello")

    def parse(data: bytes) -> None:
        if (content := read(data)) is not None:
            message.content = content
            hello = parse_hello(message, num_shards=10)
            assert all(0 <= index < 10 for index in hello.missing_shards)
            assert hello.name.isprintable()

    return parse


def hello_reply_seeds() -> list[bytes]:
    from ot_federated.messages import build_content

    whole = {"status": "ok", "name": "hospital", "cache-id": "c", "missing-shards": [0, 1, 2]}
    return [_encode(build_content(whole)), _encode(build_content({"status": "error", "reason": "no data"}))]


def _reference() -> dict[str, Any]:
    import torch

    return {"top.0.a": torch.zeros(2, 3), "top.0.b": torch.zeros(3)}


def build_train_reply_parser() -> Callable[[bytes], object]:
    """The whole way of a reply: conversation, validation, aggregation."""
    from dataclasses import replace

    from flwr.app import Message

    from ot_federated.bundle import BundleFile
    from ot_federated.messages import Hello
    from strategies.aggregators import build_aggregator
    from strategies.conversation import BundleSource, Conversation
    from strategies.offsite_tuning import OffsiteTuning
    from strategies.replies import RoundRecord
    from tests.bundles import build_manifest
    from tests.fuzzing.targets import scratch_file

    read, question = _read_records(), _build_message("train")
    manifest = replace(build_manifest(), files=(BundleFile("adapter.safetensors", 10, "ab" * 32),))
    path = scratch_file("manifest.json")
    path.write_bytes(manifest.to_bytes())
    source = BundleSource(path.parent, manifest, 65536)
    hello = Hello("hospital", "cache", ())
    strategy = OffsiteTuning(
        aggregator=build_aggregator("fedavg"), source=source, reference=_reference(), on_progress=lambda _line: None
    )
    strategy._sent = dict(strategy.reference)
    strategy.participants.hellos[question.metadata.dst_node_id] = hello

    def parse(data: bytes) -> None:
        if (content := read(data)) is None:
            return
        for record in content.config_records.values():
            if "bundle-digest" in record and record["bundle-digest"] == "D":
                record["bundle-digest"] = source.digest
        reply = Message(content, reply_to=question)
        reply.metadata.__dict__["_src_node_id"] = question.metadata.dst_node_id
        conversation = Conversation(question.metadata.dst_node_id, hello, source, question)
        conversation.asked = "train"
        conversation.listen(reply)
        assert len(conversation.failure) < 5000
        if conversation.reply is not None:
            strategy.record = RoundRecord(run_round)
            arrays, _ = strategy.aggregate_train(run_round, [conversation.reply])
            assert all(np.isfinite(array.numpy()).all() for array in arrays.values())

    return parse


def train_reply_seeds() -> list[bytes]:
    from flwr.app import Array, ArrayRecord

    from ot_federated.messages import build_content

    arrays = ArrayRecord(
        {"top.0.a": Array(np.ones((2, 3), np.float16)), "top.0.b": Array(np.zeros(3, dtype=np.float16))}
    )
    config = {"status": "ok", "server-round": run_round, "bundle-digest": "D", "update-dtype": "float16", "run": "r"}
    metrics: dict[str, int | float] = {"num-examples": 3, "num-steps": 2, "num-tokens": 5, "loss": 1.5}
    plain = _encode(build_content(config, arrays=arrays, metrics=metrics))
    private = _encode(build_content(config, arrays=arrays, metrics={"num-examples": 1, "epsilon": 1.0, "delta": 1e-5}))
    refused = _encode(build_content({"status": "error", "reason": "no such column"}))
    return [plain, private, refused, _encode(build_content({"status": "bundle-missing", "bundle-digest": "D"}))]


def build_train_request_parser() -> Callable[[bytes], object]:
    """What a client reads of ``train`` before it trains."""
    from ot_federated.messages import arrays_key, config_of, decode_update, int_field, number_field, text_field

    read, message, reference = _read_records(), _build_message("train"), _reference()

    def parse(data: bytes) -> None:
        if (content := read(data)) is None:
            return
        message.content = content
        record = config_of(message)
        text_field(record, "bundle-digest"), text_field(record, "run"), int_field(record, "server-round")
        number_field(record, "proximal-mu", default=0.0)
        arrays, dtype = content.array_records.get(arrays_key), text_field(record, "update-dtype")
        if arrays is not None and dtype in ("float32", "float16", "bfloat16"):
            decode_update(arrays, reference, dtype=dtype)

    return parse


def build_shard_parser() -> Callable[[bytes], object]:
    from ot_federated.messages import config_of, decode_shard, int_field, text_field

    read, message = _read_records(), _build_message("query.shard")

    def parse(data: bytes) -> None:
        if (content := read(data)) is None:
            return
        message.content = content
        record = config_of(message)
        int_field(record, "shard-index"), int_field(record, "shard-bytes"), text_field(record, "shard-sha256")
        assert sum(len(piece) for piece in decode_shard(message, num_bytes=32)) == 32

    return parse


def shard_seeds() -> list[bytes]:
    from ot_federated.messages import build_content, encode_shard

    fields = {"bundle-digest": "ab" * 32, "shard-bytes": 32, "shard-index": 0, "shard-sha256": "cd" * 32}
    return [_encode(build_content(fields, pieces=encode_shard([lambda: bytes(32)])))]
