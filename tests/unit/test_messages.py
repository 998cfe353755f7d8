"""The wire: what a peer may send, and what is refused before it does harm."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from ot_federated.errors import ProtocolError
from ot_federated.messages import (
    arrays_key,
    build_content,
    config_key,
    config_of,
    decode_shard,
    decode_update,
    encode_shard,
    encode_update,
    int_field,
    num_array_bytes,
    number_field,
    parse_hello,
    read_array,
    text_field,
    wire_version,
)
from simulations.in_process import InProcessGrid

reference = {"top.0.w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "top.0.b": torch.tensor([0.25, -0.125])}
weights = {"top.0.w": torch.tensor([[1.5, -2.0], [0.5, 2.0]]), "top.0.b": torch.tensor([0.25, 0.875])}


@pytest.fixture(autouse=True)
def identity() -> None:
    """Let messages be created: Flower wants to know who creates them, and a grid tells it."""
    InProcessGrid(ClientApp(), run_config={}, num_clients=1)


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def with_header(header: str, data: bytes = b"") -> bytes:
    """Return a npy file with a header of one's own making."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def payload(data: bytes, *, dtype: str = "float32", shape: tuple[int, ...] = (4,), stype: str = "numpy.ndarray") -> Any:
    """Read what claims to be an array of four float32."""
    array = Array(dtype=dtype, shape=shape, stype=stype, data=data)
    return read_array(array, name="top.0.w", dtype=np.dtype("float32"), shape=(4,))


def encoded(dtype: str = "float32") -> ArrayRecord:
    return encode_update(weights, reference, dtype=dtype)


def hello_reply(**fields: Any) -> Message:
    values = {"status": "ok", "name": "client-0001", "cache-id": "c", "missing-shards": [0, 2]} | fields
    return Message(build_content(values), dst_node_id=1, message_type="query.hello")


@pytest.mark.parametrize(("dtype", "wire"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "int16")])
def test_difference_travels_in_its_type(dtype: str, wire: str) -> None:
    record = encoded(dtype)
    assert {array.dtype for array in record.values()} == {wire}
    decoded = decode_update(record, reference, dtype=dtype)
    # All differences here are exact in 8 bits of mantissa.
    for name, tensor in weights.items():
        assert decoded[name].dtype == torch.float32
        assert torch.equal(decoded[name], tensor)


def test_float32_array_holds_the_difference_by_hand() -> None:
    np.testing.assert_array_equal(encoded()["top.0.w"].numpy(), np.array([[0.5, 0.0], [0.0, -1.0]], np.float32))
    np.testing.assert_array_equal(encoded()["top.0.b"].numpy(), np.array([0.0, 1.0], np.float32))


def test_decoded_weights_share_no_memory_with_the_reference() -> None:
    decoded = decode_update(encoded(), reference, dtype="float32")
    decoded["top.0.b"].zero_()
    assert reference["top.0.b"].tolist() == [0.25, -0.125]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_neither_sent_nor_taken(bad: float, dtype: str) -> None:
    broken = {**weights, "top.0.b": torch.tensor([0.0, bad])}
    with pytest.raises(ProtocolError, match=r"update of top\.0\.b is not finite.*Lower train\.learning-rate"):
        encode_update(broken, reference, dtype=dtype)
    record = encoded(dtype)
    bits = torch.tensor([0.0, bad], dtype=getattr(torch, dtype))
    record["top.0.b"] = Array((bits.view(torch.int16) if dtype == "bfloat16" else bits).numpy())
    with pytest.raises(ProtocolError, match=r"top\.0\.b holds values that are not finite"):
        decode_update(record, reference, dtype=dtype)


def test_type_that_is_too_narrow_names_the_remedy() -> None:
    large = {**weights, "top.0.b": torch.tensor([0.0, 1e6])}
    with pytest.raises(ProtocolError, match=r"set strategy\.update-dtype=float32"):
        encode_update(large, reference, dtype="float16")
    encode_update(large, reference, dtype="bfloat16")


def test_missing_and_extra_arrays_are_named() -> None:
    record = encoded()
    del record["top.0.b"]
    with pytest.raises(ProtocolError, match=r"missing \['top\.0\.b'\] or unknown \[\]"):
        decode_update(record, reference, dtype="float32")
    record = encoded()
    record["emulator.0.w"] = Array(np.zeros(1, np.float32))
    with pytest.raises(ProtocolError, match=r"missing \[\] or unknown \['emulator\.0\.w'\]"):
        decode_update(record, reference, dtype="float32")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.float32),
        np.zeros(4, np.float32),
        np.zeros((1, 2, 2), np.float32),
        np.zeros((2, 2), np.float16),
        np.zeros((2, 2), np.float64),
        np.zeros((2, 2), np.int16),
    ],
)
def test_wrong_shape_or_type(array: np.ndarray) -> None:
    record = encoded()
    record["top.0.w"] = Array(array)
    with pytest.raises(ProtocolError, match=r"top\.0\.w is .*, not float32 \(2, 2\)"):
        decode_update(record, reference, dtype="float32")


def test_type_of_the_update_is_the_one_that_was_agreed() -> None:
    with pytest.raises(ProtocolError, match=r"is float16 .*, not float32"):
        decode_update(encoded("float16"), reference, dtype="float32")
    with pytest.raises(ProtocolError, match=r"is float16 .*, not int16"):
        decode_update(encoded("float16"), reference, dtype="bfloat16")


def test_honest_array_is_read() -> None:
    assert payload(as_npy(np.arange(4, dtype=np.float32))).tolist() == [0, 1, 2, 3]


header = "{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x93NUMPY", id="magic alone"),
        pytest.param(b"not an array at all", id="text"),
        pytest.param(as_npy(np.arange(4, dtype=np.float32))[:-1], id="one byte short"),
        pytest.param(as_npy(np.arange(5, dtype=np.float32)), id="one value more"),
        pytest.param(as_npy(np.zeros((2, 2), np.float32)), id="other shape"),
        pytest.param(as_npy(np.zeros(4, np.float16)), id="other type"),
        pytest.param(as_npy(np.zeros(4, ">f4")), id="other byte order"),
        pytest.param(with_header(header.format(descr="<f4", shape="(-4,)"), b"\0" * 16), id="negative shape"),
        pytest.param(with_header(header.format(descr="<f4", shape="(10**15,)"), b"\0" * 16), id="expression"),
        pytest.param(with_header(header.format(descr="<f4", shape=f"({10**15},)"), b"\0" * 16), id="petabytes"),
        pytest.param(with_header(header.format(descr="<f4", shape=f"({10**22},)"), b"\0" * 16), id="more than 64 bits"),
        pytest.param(with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, }"), id="open bracket"),
        pytest.param(with_header("(" * 300), id="many brackets"),
        pytest.param(with_header("[]"), id="no dictionary"),
        pytest.param(with_header("{[1]: 2}"), id="unhashable"),
        pytest.param(b"PK\x03\x04 looks like a zip file", id="zip magic"),
    ],
)
def test_lies_within_the_payload_are_protocol_errors(data: bytes) -> None:
    """The outer header is right each time. Whatever numpy makes of the rest, a server must survive it."""
    with pytest.raises(ProtocolError):
        payload(data)


def test_a_zip_archive_in_place_of_an_array() -> None:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(4, np.float32))  # np.load opens these too, as something that is no array
    with pytest.raises(ProtocolError):
        payload(stream.getvalue())


class Explosive:
    """Unpickling this records that it happened."""

    exploded: list[int] = []  # noqa: RUF012 - shared on purpose

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return Explosive.exploded.append, (1,)


def test_pickled_objects_are_refused_without_being_unpickled() -> None:
    objects = np.empty(4, dtype=object)
    objects[:] = [Explosive()] * 4
    with pytest.raises(ProtocolError):
        payload(as_npy(objects))
    with pytest.raises(ProtocolError):
        payload(pickle.dumps(Explosive()))
    assert Explosive.exploded == []


def test_more_bytes_than_the_shape_needs() -> None:
    with pytest.raises(ProtocolError, match=r"carries .* bytes, more or other than"):
        payload(as_npy(np.arange(4, dtype=np.float32)) + b"\0" * 5000)


def test_other_serialisation_is_refused() -> None:
    with pytest.raises(ProtocolError):
        payload(as_npy(np.arange(4, dtype=np.float32)), stype="torch.tensor")


def shard_message(*pieces: bytes, **records: Any) -> Message:
    content = build_content({}, pieces=encode_shard([lambda piece=piece: piece for piece in pieces]))
    for name, record in records.items():
        content[name] = record
    return Message(content, dst_node_id=1, message_type="query.shard")


def over_the_wire(message: Message) -> Message:
    contents = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
    return cast(Message, inflate_object_from_contents(message.object_id, contents))


def test_shard_round_trip_and_its_size() -> None:
    data = bytes(range(256)) * 3
    message = over_the_wire(shard_message(data))
    kept = {name: record for name, record in message.content.config_records.items() if name != config_key}
    assert {type(record) for record in kept.values()} == {ConfigRecord}
    assert b"".join(decode_shard(message, num_bytes=768)) == data
    # Who keeps the message, or has looked at its records, does not keep the shard.
    assert not any(kept.values())
    for num_bytes in (767, 769):
        with pytest.raises(ProtocolError, match=f"piece-0000 is 768 bytes, not {num_bytes} bytes"):
            decode_shard(shard_message(data), num_bytes=num_bytes)


def test_shard_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ot_federated.bundle_shards.piece_bytes", 4)
    message = over_the_wire(shard_message(b"abcd", b"abcd", b"ef"))
    assert decode_shard(message, num_bytes=10) == [b"abcd", b"abcd", b"ef"]
    for wrong in ([b"abcd", b"abcdef"], [b"abcd", b"ab", b"cdef"], [b"abcd", b"abcd", b"ef", b""], [b"abcdabcdef"]):
        with pytest.raises(ProtocolError):
            decode_shard(over_the_wire(shard_message(*wrong)), num_bytes=10)


@pytest.mark.parametrize(
    "records",
    [
        {"arrays": ArrayRecord({"other": Array(np.zeros(3, np.uint8))})},
        {"other": ConfigRecord({"bytes": b"abc"})},
        {"metrics": MetricRecord({"a": 1})},
        {"piece-0000": ConfigRecord({"bytes": b"abc", "more": b"x"})},
        {"piece-0000": ConfigRecord({"other": b"abc"})},
        {"piece-0000": ConfigRecord({"bytes": [1, 2, 3]})},
        {"piece-0000": ConfigRecord({"bytes": "abc"})},
        {"piece-0000": ConfigRecord()},
    ],
)
def test_a_shard_with_more_or_other_than_its_bytes(records: dict[str, Any]) -> None:
    assert decode_shard(shard_message(b"abc"), num_bytes=3) == [b"abc"]
    with pytest.raises(ProtocolError):
        decode_shard(shard_message(b"abc", **records), num_bytes=3)


@pytest.mark.parametrize("arrays", [None, ArrayRecord(), ArrayRecord({"other": Array(np.zeros(3, np.uint8))})])
def test_message_without_a_shard(arrays: ArrayRecord | None) -> None:
    message = Message(build_content({}, arrays=arrays), dst_node_id=1, message_type="query.shard")
    with pytest.raises(ProtocolError, match="carries no shard"):
        decode_shard(message, num_bytes=3)


def test_a_piece_is_on_the_disk_until_it_is_sent() -> None:
    """What waits for its turn takes no memory; in a simulation it arrives in the other process as bytes."""
    num_reads: list[int] = []

    def read() -> bytes:
        num_reads.append(1)
        return b"abc"

    message = Message(build_content({}, pieces=encode_shard([read])), dst_node_id=1, message_type="query.shard")
    assert num_reads == []
    assert decode_shard(over_the_wire(message), num_bytes=3) == [b"abc"]
    num_reads.clear()
    record = message.content.config_records["piece-0000"]
    assert (record["bytes"], list(record.values()), dict(record.items())) == (b"abc", [b"abc"], {"bytes": b"abc"})
    assert len(num_reads) == 3
    sent = pickle.loads(pickle.dumps(record))
    assert type(sent) is ConfigRecord
    assert dict(sent) == {"bytes": b"abc"}


def test_bytes_of_arrays_are_counted() -> None:
    record = ArrayRecord({"a": Array(np.zeros(100, np.float32)), "b": Array(np.zeros(50, np.float16))})
    # Values and a npy header of 128 bytes each.
    assert num_array_bytes(record) == 400 + 128 + 100 + 128


def test_other_wire_version_names_the_remedy() -> None:
    content = RecordDict({config_key: ConfigRecord({"wire-version": wire_version + 1})})
    with pytest.raises(ProtocolError, match=rf"wire version {wire_version + 1}, this side {wire_version}: install"):
        config_of(Message(content, dst_node_id=1, message_type="train"))


def test_message_without_config() -> None:
    with pytest.raises(ProtocolError, match="no config record"):
        config_of(Message(RecordDict(), dst_node_id=1, message_type="train"))


@pytest.mark.parametrize("value", [3, 1.5, b"x", [1], None])
def test_text_field_is_text(value: Any) -> None:
    record = ConfigRecord({} if value is None else {"f": value})
    with pytest.raises(ProtocolError, match=r"field 'f' is .*, not text"):
        text_field(record, "f")


@pytest.mark.parametrize("value", [True, -1, 1.0, "1", None])
def test_int_field_is_a_count(value: Any) -> None:
    record = ConfigRecord({} if value is None else {"f": value})
    with pytest.raises(ProtocolError, match=r"field 'f' is .*, not a count"):
        int_field(record, "f")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, "0.1", True, b"0"])
def test_number_field_is_finite_and_not_negative(value: Any) -> None:
    record = ConfigRecord({"f": value})
    with pytest.raises(ProtocolError, match="'f' is .*, not a finite number of at least 0"):
        number_field(record, "f", default=0.0)


def test_number_field_may_be_missing() -> None:
    assert number_field(ConfigRecord({"f": 2}), "f", default=0.5) == 2.0
    assert number_field(ConfigRecord({}), "f", default=0.5) == 0.5


def test_hello_is_parsed() -> None:
    hello = parse_hello(hello_reply(**{"missing-shards": [2, 0, 2]}), num_shards=3)
    assert (hello.name, hello.cache_id, hello.missing_shards) == ("client-0001", "c", (0, 2))


@pytest.mark.parametrize("missing", [[3], [-1], [0, 99], "0", [0.5], [True]])
def test_hello_with_shards_that_do_not_exist(missing: Any) -> None:
    with pytest.raises(ProtocolError, match="lacks shards"):
        parse_hello(hello_reply(**{"missing-shards": missing}), num_shards=3)


def test_hello_of_a_client_that_refuses_gives_its_reason() -> None:
    with pytest.raises(ProtocolError, match="disk full"):
        parse_hello(hello_reply(status="error", reason="disk full"), num_shards=3)


def test_very_long_names_are_cut() -> None:
    assert len(parse_hello(hello_reply(name="x" * 10**6), num_shards=3).name) == 100


def test_content_carries_version_arrays_and_metrics() -> None:
    content = build_content({"a": 1}, arrays=encoded(), metrics={"loss": 0.5})
    assert dict(content.config_records[config_key]) == {"wire-version": wire_version, "a": 1}
    assert content.array_records[arrays_key].keys() == weights.keys()
    assert dict(content.metric_records["metrics"]) == {"loss": 0.5}


def test_a_client_has_only_the_bases_it_was_asked_for() -> None:
    base = "ab" * 32
    reply = hello_reply(**{"missing-shards": [0], "base-digest": base})
    assert parse_hello(reply, num_shards=9, num_changed_shards={base: 1}).base == base
    with pytest.raises(ProtocolError, match="not asked for"):
        parse_hello(reply, num_shards=9)
    # The shards are those of the change, of which there are fewer.
    with pytest.raises(ProtocolError, match=r"lacks shards \[1\] of 1"):
        parse_hello(
            hello_reply(**{"missing-shards": [1], "base-digest": base}), num_shards=9, num_changed_shards={base: 1}
        )
