"""Which bundles go when a data owner's cache is full: the one that was not used for the longest time first.

A bundle in use is never among them. In use is what a process holds a lock on, which the system releases when the
process dies, and what was touched a moment ago: a shard of it arrived, or its round has just ended and the next one
may begin.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ot_federated.errors import BundleError
from ot_federated.logs import logger

if sys.platform != "win32":
    import fcntl

# Within this time of its last use a bundle counts as in use.
moment_seconds = 60.0
kept_here = re.compile(r"(?:incoming-)?([0-9a-f]{64})(?:-\d+)?(?:-[0-9a-f]{64})?")


def touch(directory: Path) -> None:
    """Note that a bundle is used now; where that is not allowed, the cache forgets a little."""
    with suppress(OSError):
        os.utime(directory)


@contextmanager
def hold(root: Path, digest: str) -> Iterator[None]:
    """Mark a bundle as in use by this process."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".in-use-{digest}").open("ab") as stream:
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def make_room(root: Path, num_bytes: int, *, max_bytes: int, keep: str) -> None:
    """Remove bundles, complete or on their way, until ``num_bytes`` more stay within ``max_bytes``.

    Args:
        root: The cache; its lock is held by the caller.
        num_bytes: Size of what is coming.
        max_bytes: What all bundles together may take; 0 for no limit.
        keep: Digest of what is coming: what is there of it is overwritten, and neither counts nor goes.

    Raises:
        BundleError: If it cannot be: the message says what is in the way.
    """
    if not max_bytes:
        return
    if num_bytes > max_bytes:
        raise BundleError(
            f"The bundle has {num_bytes / 1e6:.1f} MB, and this client's cache may take {max_bytes / 1e6:.1f} MB: its "
            "owner can raise cache-max-bytes in the node config."
        )
    for leftover in root.glob(".going-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stored = {
        path: size_of(path) for path in root.iterdir() if (found := kept_here.fullmatch(path.name)) and found[1] != keep
    }
    for directory in sorted(stored, key=lambda path: path.stat().st_mtime):
        if sum(stored.values()) + num_bytes <= max_bytes:
            return
        with unless_in_use(root, directory) as free:
            if not free:
                continue
            logger.info("the cache makes room: %s goes, %.1f MB", directory.name, stored[directory] / 1e6)
            # Under a name that is no bundle's first, so that a killed process leaves nothing that looks like one.
            going = directory.rename(root / f".going-{directory.name}")
        shutil.rmtree(going, ignore_errors=True)
        del stored[directory]
    if sum(stored.values()) + num_bytes > max_bytes:
        raise BundleError(
            f"The bundle has {num_bytes / 1e6:.1f} MB, and this client's cache may take {max_bytes / 1e6:.1f} MB, of "
            f"which {sum(stored.values()) / 1e6:.1f} MB are in use at present. Try again later, or its owner raises "
            "cache-max-bytes in the node config."
        )


def size_of(directory: Path) -> int:
    """Return the bytes of the files below a directory; what versions of a bundle share counts once in all."""
    found = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum(stat.st_size // stat.st_nlink for stat in found)


@contextmanager
def unless_in_use(root: Path, directory: Path) -> Iterator[bool]:
    """Yield whether no process uses a bundle, or did a moment ago; if so, none begins to before the block ends."""
    newest = max(path.stat().st_mtime for path in [directory, *directory.rglob("*")])
    if abs(time.time() - newest) < moment_seconds:
        yield False
        return
    digest = kept_here.fullmatch(directory.name)
    path = root / f".in-use-{digest[1] if digest else ''}"
    if sys.platform == "win32" or not path.exists():
        yield True
        return
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
