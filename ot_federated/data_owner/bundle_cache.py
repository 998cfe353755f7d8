"""The data owner's bundle cache: content-addressed, on disk, filled shard by shard, limited in size.

::

    <root>/cache-id                  names this cache
    <root>/<digest>/                 a complete, verified bundle; its time of change is that of its last use
    <root>/incoming-<digest>-<size>[-<base>]/ a bundle that is on its way
        bundle/                          manifest.json, and the files with holes where shards are missing
        have-000003                      shard 3 is in its place

A later version of a bundle is a bundle, too: only what its base lacks is received, and the rest are links to the base's
files.

Each message of a deployment runs in a new process, so all state is in these files. A shard counts once it is on the
disk as a whole; the bundle is verified against its digest, then renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ot_federated.bundle import Manifest, manifest_name, parse_manifest, read_manifest, verify_files
from ot_federated.bundle_shards import changed_part, count_shards, shard_size, write_shard
from ot_federated.cache import (
    atomic_write_bytes,
    atomic_write_text,
    cache_root,
    explain_disk_errors,
    file_lock,
    link_or_copy,
    require_free_bytes,
)
from ot_federated.data_owner.cache_eviction import hold, make_room, touch
from ot_federated.errors import BundleError, OtFederatedError

cache_variable = "OT_FEDERATED_BUNDLE_CACHE"
max_shard_bytes = 2**30
# More earlier versions than this are not looked for: a server may name any number.
max_bases = 1000


class BundleCache:
    """Bundles on this data owner's disk.

    Args:
        root: The directory; ``None`` for ``$OT_FEDERATED_BUNDLE_CACHE``, else ``received-bundles`` in the cache.
        max_bytes: What all bundles together may take; 0 for no limit. To make room, the one that was not used for
            the longest time goes, but never one that is in use.
    """

    def __init__(self, root: Path | None = None, *, max_bytes: int = 0) -> None:
        self.root = root or Path(os.environ.get(cache_variable) or cache_root() / "received-bundles")
        self.max_bytes = max_bytes

    def identify(self) -> str:
        """Return this cache's id, made at the first call."""
        path = self.root / "cache-id"
        with file_lock(self.root / ".lock"):
            if not path.is_file():
                atomic_write_text(path, uuid.uuid4().hex)
            return path.read_text()

    def find(self, digest: str) -> Path | None:
        """Return the directory of a complete bundle, or None.

        The files were verified when the bundle was completed; here the manifest and the sizes are checked, which
        is cheap enough for every message.

        Raises:
            OtFederatedError: If the bundle is there and the disk refuses to read it; it stays, for it may be whole.
        """
        directory = self.root / check_digest(digest)
        if not directory.is_dir():
            return None
        try:
            manifest = read_manifest(directory, digest=digest)
            whole = all((directory / file.name).stat().st_size == file.num_bytes for file in manifest.files)
        except (BundleError, FileNotFoundError):
            whole = False
        except OSError as error:
            raise OtFederatedError(
                f"The bundle in {directory} cannot be read ({error}). It is left as it is; mend its permissions or "
                "the disk, or delete the directory to have it sent again."
            ) from error
        if not whole:
            shutil.rmtree(directory, ignore_errors=True)
            return None
        touch(directory)
        return directory

    @contextmanager
    def use(self, digest: str) -> Iterator[Path | None]:
        """Yield the directory of a complete bundle, or None; within the block nobody removes it to make room."""
        with hold(self.root, check_digest(digest)):
            yield self.find(digest)

    def find_base(self, digests: Sequence[str]) -> str:
        """Return the last of these bundles that is here whole, or an empty text."""
        return next((digest for digest in reversed(digests[-max_bases:]) if self.find(digest)), "")

    def announce(self, digest: str, manifest_text: bytes, *, shard_bytes: int, base: str = "") -> list[int]:
        """Note that a bundle is coming and return the shards that are still missing.

        Args:
            digest: Its digest.
            manifest_text: Its manifest.
            shard_bytes: Size of a shard.
            base: A bundle that is here: the shards are then of the files that it does not have.

        Raises:
            BundleError: If the manifest is not the one that ``digest`` names, the shard size is out of range, or the
                bundle is larger than this cache may become.
            OtFederatedError: If the disk has no room for it.
        """
        if self.find(digest):
            return []
        if not 2**10 <= shard_bytes <= max_shard_bytes:
            raise BundleError(f"Shards of {shard_bytes} bytes are refused: 1 KiB to 1 GiB is accepted.")
        manifest = parse_manifest(manifest_text, digest=digest)
        part = changed_part(manifest, self._base_manifest(base))
        incoming = self._incoming(digest, shard_bytes, base)
        noted = incoming / "bundle" / manifest_name
        if not noted.is_file():
            self.reserve(part, digest)
            # Clients of one simulation share this cache, and hear of the bundle in the same moment.
            with file_lock(self.root / ".lock"):
                if self.find(digest):
                    return []
                if not noted.is_file():
                    shutil.rmtree(incoming, ignore_errors=True)
                    atomic_write_bytes(noted, manifest_text)
        missing = self._missing(incoming, part, shard_bytes)
        # All shards and no bundle: the process that had the last one was killed before it could complete them.
        return missing or self._finish(incoming, part, digest, shard_bytes, base)

    def reserve(self, manifest: Manifest, digest: str) -> None:
        """Make room for a bundle.

        Raises:
            BundleError: If it is larger than the cache may become.
            OtFederatedError: If the disk has no room for it.
        """
        with file_lock(self.root / ".lock"):
            make_room(self.root, manifest.num_bytes, max_bytes=self.max_bytes, keep=digest)
        require_free_bytes(self.root, manifest.num_bytes)

    def announced(self, digest: str, *, shard_bytes: int, base: str = "") -> Manifest:
        """Return the manifest of the part of a bundle that is coming: all of it, or what ``base`` does not have.

        Raises:
            BundleError: If it was not announced, or the base is gone.
        """
        manifest = read_manifest(self._incoming(digest, shard_bytes, base) / "bundle", digest=digest)
        return changed_part(manifest, self._base_manifest(base))

    def _base_manifest(self, base: str) -> Manifest | None:
        if not base:
            return None
        directory = self.find(base)
        if directory is None:
            raise BundleError(f"The bundle {base[:12]}, to which a change was to be added, is gone: ask for all of it.")
        return read_manifest(directory, digest=base)

    def receive(
        self,
        digest: str,
        index: int,
        pieces: Sequence[bytes | memoryview],
        *,
        shard_bytes: int,
        sha256: str,
        base: str = "",
    ) -> list[int]:
        """Store one shard and return those still missing; the last one completes the bundle.

        Raises:
            BundleError: If no such bundle was announced, the shard is out of range or damaged, or the complete
                bundle does not have the digests of its manifest (all shards are then dropped).
            OtFederatedError: If the disk is full; the shard then counts as missing.
        """
        incoming = self._incoming(digest, shard_bytes, base)
        # One at a time: the last shard of one process takes away the place where another would write.
        with file_lock(self.root / ".receiving"):
            if self.find(digest):
                return []
            manifest = self.announced(digest, shard_bytes=shard_bytes, base=base)
            if not 0 <= index < count_shards(manifest, shard_bytes=shard_bytes):
                raise BundleError(f"Shard {index} is not one of the bundle {digest[:12]}.")
            num_bytes = sum(map(len, pieces))
            if num_bytes != shard_size(manifest, index, shard_bytes=shard_bytes):
                raise BundleError(f"Shard {index} of {digest[:12]} has {num_bytes} bytes, not what the manifest gives.")
            found = hashlib.sha256()
            for piece in pieces:
                found.update(piece)
            if found.hexdigest() != sha256:
                raise BundleError(f"Shard {index} of {digest[:12]} was damaged on the way; send it again.")
            with explain_disk_errors(incoming):
                write_shard(incoming / "bundle", manifest, index, pieces, shard_bytes=shard_bytes)
            atomic_write_bytes(incoming / f"have-{index:06d}", b"")
            return self._finish(incoming, manifest, digest, shard_bytes, base)

    def _finish(self, incoming: Path, part: Manifest, digest: str, shard_bytes: int, base: str) -> list[int]:
        """Complete the bundle if all shards are there; return those that are not."""
        with file_lock(self.root / ".lock"):
            if self.find(digest):
                return []
            missing = self._missing(incoming, part, shard_bytes)
            if not missing:
                self._complete(incoming, part, digest, base)
        return missing

    def _complete(self, incoming: Path, part: Manifest, digest: str, base: str) -> None:
        directory = incoming / "bundle"
        try:
            manifest = read_manifest(directory, digest=digest)
            for file in manifest.files:
                if file in part.files:
                    # An empty file is in no shard.
                    (directory / file.name).touch()
                elif not (directory / file.name).exists():
                    link_or_copy(self.root / base / file.name, directory / file.name)
            verify_files(directory, manifest)
            try:
                directory.rename(self.root / digest)
            except OSError:
                # Its owner imported the same bundle in the meantime.
                if not self.find(digest):
                    raise
        finally:
            # Complete, or wrong as a whole: in both cases what came is of no more use.
            shutil.rmtree(incoming, ignore_errors=True)

    def _incoming(self, digest: str, shard_bytes: int, base: str = "") -> Path:
        onto = f"-{check_digest(base)}" if base else ""
        return self.root / f"incoming-{check_digest(digest)}-{shard_bytes}{onto}"

    @staticmethod
    def _missing(incoming: Path, manifest: Manifest, shard_bytes: int) -> list[int]:
        num_shards = count_shards(manifest, shard_bytes=shard_bytes)
        return [index for index in range(num_shards) if not (incoming / f"have-{index:06d}").is_file()]


def check_digest(digest: str) -> str:
    """Return ``digest`` if it is a SHA-256 in hexadecimal; it becomes a directory name.

    Raises:
        BundleError: If it is anything else.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise BundleError(f"{digest!r} is not a bundle digest.")
    return digest
