"""Out-of-band delivery: a bundle from a directory or a URL of the data owner's choosing, instead of over the wire.

The node config's ``bundle-path`` names it: a directory, a ``file://`` or an ``https://`` URL, under which the bundle
lies by itself or in a directory named by its digest (a model owner's is ``bundles/...`` in its cache). Wherever it
comes from, nothing is used before every file has the digest that the manifest gives it, and the manifest the one that
the server names. What cannot be had in this way, the server sends as ever.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit
from urllib.request import Request, url2pathname, urlopen

from ot_federated.bundle import BundleFile, manifest_name, max_manifest_bytes, parse_manifest
from ot_federated.cache import atomic_directory, file_lock, remove_partial_directories
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.errors import BundleError, OtFederatedError
from ot_federated.logs import logger

chunk_bytes = 2**20
max_attempts = 5
allowed_schemes = ("", "file", "https")
timeout_seconds = 60.0


def import_if_missing(cache: BundleCache, source: str, digest: str, manifest_text: bytes) -> bool:
    """Bring a bundle into the cache from ``source``; say whether it is there now, and log why if it is not."""
    if cache.find(digest):
        return True
    try:
        import_bundle(cache, source, digest, manifest_text)
    except (OtFederatedError, OSError) as error:
        logger.warning("bundle-path %s: %s The model owner sends the bundle instead.", source, error)
        return False
    logger.info("bundle %s comes from %s and has the digest that the server names", digest[:12], source)
    return True


def import_bundle(cache: BundleCache, source: str, digest: str, manifest_text: bytes) -> Path:
    """Copy a bundle from ``source`` into the cache, checking every byte, and return its directory.

    Raises:
        BundleError: If it is not there, or anything in it has another digest.
        OtFederatedError: If the disk is full.
        OSError: If it cannot be read.
    """
    manifest = parse_manifest(manifest_text, digest=digest)
    target = cache.root / digest
    with file_lock(cache.root / f".import-{digest}"):
        if cache.find(digest):
            return target
        remove_partial_directories(target)
        base = find_base(source, digest)
        cache.reserve(manifest, digest)
        with atomic_directory(target) as partial:
            for file in manifest.files:
                copy_file(base, file, partial / file.name)
            (partial / manifest_name).write_bytes(manifest_text)
    return target


def find_base(source: str, digest: str) -> str:
    """Return the place at or below ``source`` that holds the bundle.

    Raises:
        BundleError: If there is none, with what was found instead.
    """
    scheme = urlsplit(source).scheme
    if scheme not in allowed_schemes:
        raise BundleError(f"{source!r} is neither a directory nor a file:// or https:// URL.")
    if not scheme:
        source = Path(source).expanduser().absolute().as_uri()
    found = []
    for base in (f"{source.rstrip('/')}/{digest}", source.rstrip("/")):
        try:
            with open_file(base, manifest_name, offset=0) as (stream, _):
                text = stream.read(max_manifest_bytes + 1)
        except OSError as error:
            found.append(f"{base}: {error}")
            continue
        other = hashlib.sha256(text).hexdigest()
        if other == digest:
            return base
        found.append(f"{base} holds the bundle {other[:12]}")
    raise BundleError(f"There is no bundle {digest[:12]} ({'; '.join(found)}).")


def copy_file(base: str, file: BundleFile, target: Path) -> None:
    """Copy one file of a bundle.

    Raises:
        BundleError: If it has another size or digest.
        OSError: If it cannot be read, however often it is tried.
    """
    digest = hashlib.sha256()
    with target.open("xb") as out:
        for chunk in read_chunks(base, file):
            out.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        raise BundleError(f"{base}/{file.name} does not have the digest that the manifest gives it.")


def read_chunks(base: str, file: BundleFile) -> Iterator[bytes]:
    """Yield a file's bytes, no more than its manifest gives, going on where a connection broke.

    Raises:
        OSError: If it cannot be read, however often it is tried.
    """
    received = attempts = 0
    while received < file.num_bytes:
        before = received
        try:
            with open_file(base, file.name, offset=received) as (stream, start):
                to_skip = received - start  # where a server cannot begin in the middle
                while to_skip and (skipped := stream.read(min(chunk_bytes, to_skip))):
                    to_skip -= len(skipped)
                while chunk := stream.read(min(chunk_bytes, file.num_bytes - received)):
                    received += len(chunk)
                    yield chunk
            if received < file.num_bytes:
                raise ConnectionError(f"it ends after {received} of {file.num_bytes} bytes")
        except (OSError, HTTPException) as error:
            # Whoever makes headway may go on.
            attempts = 1 if received > before else attempts + 1
            if attempts >= max_attempts or base.startswith("file:"):
                raise OSError(f"{base}/{file.name} cannot be read: {error}.") from error
            logger.info("%s/%s broke after %d bytes (%s); going on there", base, file.name, received, error)
            time.sleep(min(2.0**attempts / 10, 10.0))


@contextmanager
def open_file(base: str, name: str, *, offset: int) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file below ``base`` and yield it, and the position at which it begins: ``offset`` or 0."""
    if base.startswith("file:"):
        with (Path(url2pathname(urlsplit(base).path)) / name).open("rb") as stream:
            stream.seek(offset)
            yield stream, offset
        return
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    request = Request(f"{base}/{quote(name)}", headers=headers)
    with urlopen(request, timeout=timeout_seconds) as response:
        yield response, offset if response.status == HTTPStatus.PARTIAL_CONTENT else 0
