"""A bundle as a row of shards: its files one behind the other, cut at a fixed size.

The manifest travels first and gives every file's size and digest. From them both sides derive the same cuts; the
files' digests are checked when all shards are there. A shard is what one message brings: it is read, sent and
written in small pieces, so that neither side ever needs memory for more than what is on the way. Who has another
version of the bundle, its base, is sent the files that are not in it: then the row is made of those alone
(:func:`changed_part`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ot_federated.bundle import Manifest

# Flower copies an object half a dozen times on its way. With 4 MiB a client that received a shard of 64 MiB over HTTP
# needed 2.2 shards, so 1.5.
piece_bytes = 2**20


def changed_part(manifest: Manifest, base: Manifest | None) -> Manifest:
    """Return the manifest of the files that ``base`` does not have; of all files where there is no base."""
    if base is None:
        return manifest
    return replace(manifest, files=tuple(file for file in manifest.files if file not in base.files))


def count_shards(manifest: Manifest, *, shard_bytes: int) -> int:
    """Return the number of shards of the bundle."""
    return math.ceil(manifest.num_bytes / shard_bytes)


def shard_size(manifest: Manifest, index: int, *, shard_bytes: int) -> int:
    """Return the bytes of shard ``index``; only the last one is shorter than ``shard_bytes``."""
    return min(shard_bytes, manifest.num_bytes - index * shard_bytes)


def piece_sizes(num_bytes: int) -> list[int]:
    """Return the sizes of the pieces of a shard of ``num_bytes`` bytes; only the last one is shorter than the rest."""
    return [min(piece_bytes, num_bytes - start) for start in range(0, num_bytes, piece_bytes)]


def locate(manifest: Manifest, start: int, num_bytes: int) -> Iterator[tuple[str, int, int]]:
    """Yield the file, the offset in it and the length of each stretch of ``num_bytes`` bytes of the row of files."""
    for file in manifest.files:
        if num_bytes <= 0:
            return
        if start < file.num_bytes:
            length = min(num_bytes, file.num_bytes - start)
            yield file.name, start, length
            start, num_bytes = start + length, num_bytes - length
        start -= file.num_bytes


def locate_pieces(manifest: Manifest, index: int, *, shard_bytes: int) -> list[list[tuple[str, int, int]]]:
    """Return of each piece of shard ``index`` the stretches of files it is made of: file, offset, length."""
    start, places = index * shard_bytes, []
    for size in piece_sizes(shard_size(manifest, index, shard_bytes=shard_bytes)):
        places.append(list(locate(manifest, start, size)))
        start += size
    return places


def read_stretches(directory: Path, stretches: Iterable[tuple[str, int, int]]) -> bytes:
    """Read a piece from the files of the bundle in ``directory``."""
    parts = []
    for name, offset, length in stretches:
        with (directory / name).open("rb") as stream:
            stream.seek(offset)
            parts.append(stream.read(length))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_shard(directory: Path, manifest: Manifest, index: int, *, shard_bytes: int) -> bytes:
    """Read shard ``index`` of the bundle in ``directory`` as a whole."""
    places = locate_pieces(manifest, index, shard_bytes=shard_bytes)
    return b"".join(read_stretches(directory, stretches) for stretches in places)


def write_shard(
    directory: Path, manifest: Manifest, index: int, pieces: Iterable[bytes | memoryview], *, shard_bytes: int
) -> None:
    """Write shard ``index`` to its place in the bundle's files, created where missing, and flush it to the disk.

    What is written until the end of the call is no bundle yet: the files have holes where shards are missing.
    """
    start = index * shard_bytes
    touched: dict[str, int] = {}
    try:
        for piece in pieces:
            view = memoryview(piece)
            for name, offset, length in locate(manifest, start, len(view)):
                if name not in touched:
                    touched[name] = os.open(directory / name, os.O_WRONLY | os.O_CREAT, 0o666)
                _write_all(touched[name], view[:length], offset)
                view = view[length:]
            start += len(piece)
        for descriptor in touched.values():
            os.fsync(descriptor)
    finally:
        for descriptor in touched.values():
            os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    os.lseek(descriptor, offset, os.SEEK_SET)
    while view:
        # The system may write less than it is given; a full disk it tells at the next call.
        view = view[os.write(descriptor, view) :]
