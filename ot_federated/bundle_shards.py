"""A bundle as a row of shards: its files one behind the other, cut at a fixed size.

The manifest travels first and gives every file's size and digest. From them both sides derive the same cuts; the
files' digests are checked when all shards are there.
"""

from __future__ import annotations

import math
from pathlib import Path

from ot_federated.bundle import Manifest


def count_shards(manifest: Manifest, *, shard_bytes: int) -> int:
    """Return the number of shards of the bundle."""
    return math.ceil(manifest.num_bytes / shard_bytes)


def shard_size(manifest: Manifest, index: int, *, shard_bytes: int) -> int:
    """Return the bytes of shard ``index``; only the last one is shorter than ``shard_bytes``."""
    return min(shard_bytes, manifest.num_bytes - index * shard_bytes)


def read_shard(directory: Path, manifest: Manifest, index: int, *, shard_bytes: int) -> bytes:
    """Read shard ``index`` of the bundle in ``directory``."""
    start, wanted = index * shard_bytes, shard_size(manifest, index, shard_bytes=shard_bytes)
    parts: list[bytes] = []
    for file in manifest.files:
        if start < file.num_bytes and wanted > 0:
            with (directory / file.name).open("rb") as stream:
                stream.seek(start)
                parts.append(stream.read(min(wanted, file.num_bytes - start)))
            wanted -= len(parts[-1])
            start += len(parts[-1])
        start -= file.num_bytes
        if start < 0 or wanted == 0:
            break
    return b"".join(parts)


def join_shards(shards: list[Path], manifest: Manifest, directory: Path) -> None:
    """Write the bundle's files into ``directory`` from shard files in order; one shard is in memory at a time."""
    pieces = iter(shards)
    left = b""
    for file in manifest.files:
        remaining = file.num_bytes
        with (directory / file.name).open("xb") as stream:
            while remaining:
                left = left or next(pieces).read_bytes()
                stream.write(left[:remaining])
                taken = min(remaining, len(left))
                left, remaining = left[taken:], remaining - taken
