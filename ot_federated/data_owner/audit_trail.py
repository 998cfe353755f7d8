"""The audit trail: what left this data owner, for its owner to read.

One file of JSON lines on the data owner's disk, one line for each message that was answered, appended and flushed
to the disk before the reply leaves: what has left is in the trail. A line never holds data. It tells who asked for
what, the names of the fields and arrays that left, their bytes, and the SHA-256 of it all, with which a captured
reply can be compared (:func:`describe_content` says of what).

After a crash between the line and the reply the trail tells of a reply that did not leave, never the other way round.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ot_federated.cache import append_line, state_root
from ot_federated.errors import ConfigError, OtFederatedError
from ot_federated.privacy_guarantee import Guarantee

trail_variable = "OT_FEDERATED_TRAIL"
trail_key = "trail"
format_version = 1


class TrailError(OtFederatedError):
    """The audit trail is of another format, or is not one."""

    may_leave = False


@dataclass
class Notes:
    """What the trail tells beside the reply itself.

    Attributes:
        guarantee: For everything that ever left the data set, this reply included; None where there is none.
    """

    guarantee: Guarantee | None = None


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a reply carries, without its values.

    Attributes:
        fields: Names of scalars: ``record.name``.
        num_arrays: Number of arrays.
        layout_sha256: Of the arrays' names, types and shapes; equal in every round of a run. Empty without arrays.
        num_bytes: Bytes of arrays and scalars.
        sha256: Of everything.
    """

    fields: tuple[str, ...] = ()
    num_arrays: int = 0
    layout_sha256: str = ""
    num_bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One answered message.

    Attributes:
        message: Its type: ``train``, ``query.hello``, ...
        client: This client's name.
        flower_run: Flower's id of the run.
        run: The model owner's id of the run, the same after it was resumed; empty where the message has none.
        server_round: The round, or None where the message belongs to none.
        status: ``ok``, ``error`` or another status of the reply; ``refused`` where no code of the run was run.
        reason: The reason that left with a refusal or an error.
        content: What left.
        guarantee: See :class:`Notes`.
        time: When, in UTC.
    """

    message: str
    client: str
    flower_run: str
    run: str = ""
    server_round: int | None = None
    status: str
    reason: str = ""
    content: Content = field(default_factory=Content)
    guarantee: Guarantee | None = None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


def describe_content(records: Mapping[str, Mapping[str, Any]]) -> Content:
    """Describe a reply's records: scalars by name, and arrays, which have ``dtype``, ``shape`` and ``data``.

    ``sha256`` is that of ``{record: {name: value}}`` as JSON with sorted keys and without spaces, where an array
    stands as ``[dtype, shape, SHA-256 of its data]`` and bytes as their SHA-256, also those in a list.
    """
    names: list[str] = []
    layout: dict[str, list[Any]] = {}
    everything: dict[str, dict[str, Any]] = {}
    num_bytes = 0
    for record_name, record in records.items():
        plain = everything[record_name] = {}
        for name, value in record.items():
            if hasattr(value, "dtype"):
                layout[f"{record_name}.{name}"] = [value.dtype, list(value.shape)]
                plain[name] = [value.dtype, list(value.shape), hashlib.sha256(value.data).hexdigest()]
                num_bytes += len(value.data)
            else:
                names.append(f"{record_name}.{name}")
                # Secure aggregation's replies have lists of bytes.
                items = value if isinstance(value, list) else [value]
                shown = [hashlib.sha256(item).hexdigest() if isinstance(item, bytes) else item for item in items]
                plain[name] = shown if isinstance(value, list) else shown[0]
                num_bytes += sum(len(item) if isinstance(item, bytes) else len(json.dumps(item)) for item in items)
    return Content(
        fields=tuple(sorted(names)),
        num_arrays=len(layout),
        layout_sha256=_digest(layout) if layout else "",
        num_bytes=num_bytes,
        sha256=_digest(everything),
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def default_trail() -> Path:
    """Return where the trail is: ``$OT_FEDERATED_TRAIL``, else ``trail.jsonl`` in the user's state directory."""
    own = os.environ.get(trail_variable)
    return Path(own).expanduser().absolute() if own else state_root() / "trail.jsonl"


def choose_trail(node_config: Mapping[str, object]) -> Path | None:
    """Return the trail of a node: node config ``trail``, else the default one; None where none is kept.

    A simulated client has no owner who would read it, and keeps one only where ``$OT_FEDERATED_TRAIL`` is set.
    """
    if own := node_config.get(trail_key):
        return Path(str(own)).expanduser().absolute()
    if "partition-id" in node_config and not os.environ.get(trail_variable):
        return None
    return default_trail()


def append_entry(path: Path, entry: Entry) -> None:
    """Append an entry and return when it is on the disk.

    Raises:
        OtFederatedError: If it cannot be written; then nothing may leave.
    """
    append_line(path, json.dumps({"format": format_version, **asdict(entry)}))


def read_trail(path: Path) -> Iterator[Entry | str]:
    """Yield the entries in order; in place of a line that is none, what is wrong with it.

    Raises:
        TrailError: If there is no such file, or a line is of another format.
    """
    if not path.is_file():
        raise TrailError(
            f"There is no audit trail at {path}: no message was answered yet, or the trail is elsewhere (node config "
            f"{trail_key}, {trail_variable})."
        )
    with path.open(encoding="utf-8", errors="replace") as stream:
        yield from parse_trail(stream, place=str(path))


def parse_trail(lines: Iterable[str], *, place: str) -> Iterator[Entry | str]:
    """Yield the entries of a trail's lines as :func:`read_trail` does; errors call the file ``place``.

    Raises:
        TrailError: If a line is of another format.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse(place, number, line)


def _parse(place: str, number: int, line: str) -> Entry | str:
    damaged = f"line {number} is cut short or damaged; where its process was killed, that reply did not leave"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return damaged
    if not isinstance(values, dict) or "format" not in values:
        return damaged
    if (version := values.pop("format")) != format_version:
        raise TrailError(
            f"{place}, line {number}: format {version!r}; this release reads {format_version}. Read it with the "
            "release of ot-federated that wrote it, and begin a new trail for this one."
        )
    try:
        content, guarantee = Content(**values.pop("content")), values.pop("guarantee")
        return Entry(
            **values,
            content=replace(content, fields=tuple(content.fields)),
            guarantee=Guarantee(**guarantee) if guarantee else None,
        )
    except (KeyError, TypeError, ValueError, ConfigError):
        return damaged
