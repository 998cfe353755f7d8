"""The wire: what passes between model owner and data owner, and how it is encoded.

Three exchanges, each a Flower message and its reply:

``query.hello``  digest and manifest of the bundle, digests of its earlier versions -> the client's name, its cache,
                 the earlier version that it has, the shards it lacks
``query.shard``  one shard of the bundle, in pieces -> stored, or why not
``train``        the adapter, the bundle's digest, the round -> the adapter's update and its metrics, or a status

Tensors travel as arrays, structure as scalars, the bundle as bytes; nothing is ever unpickled. An adapter travels as
its difference to something the receiver has (to a client: the bundle's adapter; from it: the adapter it was sent),
because a difference keeps its precision in 16 bits where the weights themselves would not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, ItemsView, Iterable, Mapping, ValuesView
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ot_federated.bundle_shards import piece_sizes
from ot_federated.errors import ProtocolError, RefusalError

if TYPE_CHECKING:
    import torch

wire_version = 2
hello_type, shard_type, train_type = "query.hello", "query.shard", "train"
arrays_key, config_key, metrics_key = "arrays", "config", "metrics"
piece_key = "bytes"

# numpy has no bfloat16: its bits travel as int16.
_wire_dtypes: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype("int16"),
}


def encode_update(
    weights: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], *, dtype: str
) -> ArrayRecord:
    """Return ``weights - reference`` as arrays of ``dtype``.

    Raises:
        ProtocolError: If a difference is not finite in ``dtype``: training diverged, or the type is too narrow.
    """
    import torch

    record = ArrayRecord()
    for name, tensor in weights.items():
        difference = (tensor.float() - reference[name].float()).to(getattr(torch, dtype)).contiguous()
        if not torch.isfinite(difference).all():
            raise ProtocolError(
                f"The update of {name} is not finite in {dtype}: training diverged, or the type is too narrow. Lower "
                "train.learning-rate, or set strategy.update-dtype=float32."
            )
        bits = difference.view(torch.int16) if dtype == "bfloat16" else difference
        record[name] = Array(bits.numpy())
    return record


def decode_update(record: ArrayRecord, reference: Mapping[str, torch.Tensor], *, dtype: str) -> dict[str, torch.Tensor]:
    """Return ``reference + update`` in fp32, after checking names, types, shapes and values.

    Raises:
        ProtocolError: Naming what is missing, unknown, of the wrong type or shape, or not finite.
    """
    import torch

    missing, unknown = sorted(reference.keys() - record.keys()), sorted(record.keys() - reference.keys())
    if missing or unknown:
        raise ProtocolError(f"arrays are missing {missing[:3]!s:.500} or unknown {unknown[:3]!s:.500}")
    weights = {}
    for name, base in reference.items():
        values = read_array(record[name], name=name, dtype=_wire_dtypes[dtype], shape=tuple(base.shape))
        difference = torch.from_numpy(values.copy())
        if dtype == "bfloat16":
            difference = difference.view(torch.bfloat16)
        if not torch.isfinite(difference).all():
            raise ProtocolError(f"{name} holds values that are not finite")
        weights[name] = base.float() + difference.float()
    return weights


def read_array(array: Array, *, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array from a peer, after checking that it is what it must be.

    Raises:
        ProtocolError: If type, shape or size are not the expected ones, or the bytes cannot be read.
    """
    if array.stype != "numpy.ndarray":
        raise ProtocolError(f"{name} is serialised as {array.stype!r:.100}, not as numpy.ndarray")
    if array.dtype != dtype.name or tuple(array.shape) != shape:
        raise ProtocolError(f"{name} is {array.dtype!s:.100} {tuple(array.shape)!s:.200}, not {dtype.name} {shape}")
    # The bytes must begin with the very header that numpy writes for this type and shape. So no parser ever reads a
    # stranger's header, which could name another size, a zip archive or a pickle.
    header = npy_header(dtype, shape)
    num_bytes = math.prod(shape) * dtype.itemsize
    if len(array.data) != len(header) + num_bytes or not array.data.startswith(header):
        raise ProtocolError(f"{name} carries {len(array.data)} bytes, more or other than {dtype.name} {shape} needs")
    return np.frombuffer(array.data, dtype=dtype, offset=len(header)).reshape(shape)


@lru_cache(maxsize=4096)
def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header that ``numpy.save`` writes before a C-ordered array of this type and shape."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


class StoredPiece(ConfigRecord):
    """A piece of a shard on its way to a client, read from the disk whenever it is asked for.

    Flower serialises all pieces of a message before the first one has left. That is one shard in memory; a second one
    would be the pieces themselves, and messages to other clients, which wait for their turn, would be one more each.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        super().__init__({piece_key: b""})
        self._read = read

    def __getitem__(self, item: str) -> Any:
        """Read the piece."""
        return self._read() if item == piece_key else super().__getitem__(item)

    def values(self) -> ValuesView[Any]:
        """Return a view that reads the piece."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Any]:
        """Return a view that reads the piece."""
        return ItemsView(self)

    def deflate(self) -> bytes:
        """Serialise the piece; its receiver sees a config record like any other."""
        return ConfigRecord(dict(self)).deflate()

    def __reduce__(self) -> tuple[Any, ...]:
        """Become a config record like any other where a simulation sends it to another process."""
        return ConfigRecord, (dict(self),)


def encode_shard(pieces: Iterable[Callable[[], bytes]]) -> dict[str, ConfigRecord]:
    """Return a shard as records of bytes, one for each piece, by name; each is read when it is sent.

    Not as arrays: until a message is put together Flower keeps both the chunks of all its arrays and the arrays, which
    would be the shard twice. A record goes over from its serialised form before the next one is looked at.
    """
    return {piece_name(number): StoredPiece(read) for number, read in enumerate(pieces)}


def decode_shard(message: Message, *, num_bytes: int) -> list[bytes]:
    """Take the pieces of the shard out of a ``query.shard`` message, which then has empty records in their place.

    The message itself lives on: Flower's views of its records refer to themselves, until Python looks for such.

    Raises:
        ProtocolError: If they are not ``num_bytes`` bytes in all, cut as they must be, or there is more than them.
    """
    sizes = {piece_name(number): size for number, size in enumerate(piece_sizes(num_bytes))}
    records = message.content.config_records
    if message.content.keys() != {config_key, *sizes} or records.keys() != message.content.keys():
        raise ProtocolError(f"the message carries no shard of {num_bytes} bytes in {len(sizes)} pieces, and that alone")
    pieces = []
    for name, size in sizes.items():
        piece = records[name].get(piece_key)
        if len(records[name]) != 1 or not isinstance(piece, bytes) or len(piece) != size:
            found = f"{len(piece)} bytes" if isinstance(piece, bytes) else type(piece).__name__
            raise ProtocolError(f"{name} is {found}, not {size} bytes and nothing else")
        pieces.append(piece)
    # Not before: equal pieces are one record under several names.
    for name in sizes:
        records[name].clear()
    return pieces


def piece_name(number: int) -> str:
    """Return the name under which a piece of a shard travels."""
    return f"piece-{number:04d}"


def num_array_bytes(record: ArrayRecord) -> int:
    """Return the bytes of the arrays in a record."""
    return sum(len(array.data) for array in record.values())


def config_of(message: Message) -> ConfigRecord:
    """Return the message's config record.

    Raises:
        ProtocolError: If there is none, or it is of another wire version.
    """
    record = message.content.config_records.get(config_key)
    if record is None:
        raise ProtocolError("the message has no config record")
    if record.get("wire-version") != wire_version:
        raise ProtocolError(
            f"the peer speaks wire version {record.get('wire-version')!r:.100}, this side {wire_version}: install "
            "the same release of ot-federated on both sides"
        )
    return record


def text_field(record: ConfigRecord, name: str) -> str:
    """Return a text field of a config record.

    Raises:
        ProtocolError: If it is missing or not text.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"the field {name!r} is {value!r:.200}, not text")
    return value


def plain_text(text: str, *, max_length: int = 2000) -> str:
    """Return what a peer wrote as one line that can be logged and shown in a terminal, cut at ``max_length``."""
    return "".join(character if character.isprintable() else "?" for character in text[:max_length])


def int_field(record: ConfigRecord, name: str) -> int:
    """Return an integer field of a config record, at least 0.

    Raises:
        ProtocolError: If it is missing, not an integer, or negative.
    """
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ProtocolError(f"the field {name!r} is {value!r:.200}, not a count")
    return value


def number_field(record: ConfigRecord, name: str, *, default: float) -> float:
    """Return a field of a config record that is a finite number, at least 0; ``default`` where it is missing.

    Raises:
        ProtocolError: If it is not a number, not finite, or negative.
    """
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ProtocolError(f"the field {name!r} is {value!r:.200}, not a finite number of at least 0")
    return float(value)


def build_content(
    config: Mapping[str, str | int | float | bytes | list[int]],
    *,
    arrays: ArrayRecord | None = None,
    metrics: Mapping[str, int | float] | None = None,
    pieces: Mapping[str, ConfigRecord] | None = None,
) -> RecordDict:
    """Build a message's content: config (with the wire version); arrays, metrics, a shard where there is one."""
    content = RecordDict({config_key: ConfigRecord({"wire-version": wire_version, **config})})
    if arrays is not None:
        content[arrays_key] = arrays
    if metrics is not None:
        content[metrics_key] = MetricRecord(dict(metrics))
    content.update(pieces or {})
    return content


@dataclass(frozen=True)
class Hello:
    """What a client says of itself.

    Attributes:
        name: Its name: node config ``name``, or ``client-<partition>`` in a simulation. Names order the replies,
            so that a resumed run adds them up in the same order; node ids change with every simulation.
        cache_id: Identifies its bundle cache; clients on one machine share one, and it is filled once.
        missing_shards: The shards that this cache lacks.
        base: Digest of an earlier version of the bundle that it has, to which the shards add what changed; empty where
            they are the whole bundle's.
    """

    name: str
    cache_id: str
    missing_shards: tuple[int, ...]
    base: str = ""


def parse_hello(message: Message, *, num_shards: int, num_changed_shards: Mapping[str, int] | None = None) -> Hello:
    """Read the reply to ``query.hello``.

    Args:
        message: The reply.
        num_shards: Shards of the whole bundle.
        num_changed_shards: Shards of what changed since each earlier version, by its digest.

    Raises:
        RefusalError: If the client refused: its reason.
        ProtocolError: If it is malformed.
    """
    record = config_of(message)
    if text_field(record, "status") != "ok":
        raise RefusalError(plain_text(text_field(record, "reason")))
    base = text_field(record, "base-digest") if record.get("base-digest") else ""
    if base:
        if base not in (num_changed_shards or {}):
            raise ProtocolError(f"the client has the bundle {base[:80]!r}, which it was not asked for")
        num_shards = (num_changed_shards or {})[base]
    missing: Any = record.get("missing-shards")
    if not isinstance(missing, list) or any(
        isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_shards for index in missing
    ):
        raise ProtocolError(f"the client lacks shards {missing!r:.200} of {num_shards}")
    name = plain_text(text_field(record, "name"), max_length=100)
    if not name.strip():
        raise ProtocolError("the client has no name")
    return Hello(name, text_field(record, "cache-id")[:100], tuple(sorted(set(missing))), base)
