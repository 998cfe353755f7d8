"""The cache directory, and writes that are whole or absent.

Whoever reads this project's files, be it another process or the next start after a crash, sees the old
content or the new one, never a part: everything is written under another name beside its target, flushed to
the disk, and renamed.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ot_federated.errors import OtFederatedError

if sys.platform != "win32":
    import fcntl

cache_variable = "OT_FEDERATED_CACHE"
state_variable = "XDG_STATE_HOME"
partial_suffix = ".partial"
# EFBIG: the file is larger than this user (ulimit -f) or the file system allows.
full_disk = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
refused = {errno.EACCES, errno.EPERM, errno.EROFS}
digest_chunk_bytes = 2**20


def cache_root() -> Path:
    """Return the cache: ``$OT_FEDERATED_CACHE``, else ``ot-federated`` in the user's cache directory."""
    if own := os.environ.get(cache_variable):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "ot-federated"
    return Path.home() / ".cache" / "ot-federated"


def state_root() -> Path:
    """Return where a data owner's records are: ``ot-federated`` in the user's state directory.

    Never in the cache: a cache may be deleted at any time, and with it would go all knowledge of what was done.
    """
    if shared := os.environ.get(state_variable):
        return Path(shared).expanduser().absolute() / "ot-federated"
    return Path.home() / ".local" / "state" / "ot-federated"


@contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write below ``path`` into an error that says what to do.

    Raises:
        OtFederatedError: If the disk or quota is full, or the directory may not be written.
    """
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code in full_disk:
            raise OtFederatedError(
                f"The disk is full or over quota while writing {path}. Free some space there, or use "
                f"another disk: output-dir for a run, {cache_variable} for the cache."
            ) from error
        if code in refused:
            raise OtFederatedError(
                f"Writing {path} is not allowed ({os.strerror(code)}). Give this user the right to, or use "
                f"another directory: output-dir for a run, {cache_variable} for the cache."
            ) from error
        raise


def _error_number(error: Exception) -> int:
    """Return the system's error number, or 0. safetensors and tokenizers tell theirs in the text alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def require_free_bytes(directory: Path, num_bytes: int) -> None:
    """Check that the disk of ``directory`` (created where missing) has ``num_bytes`` bytes to spare.

    Raises:
        OtFederatedError: If it has not; said before minutes of work end in a full disk.
    """
    with explain_disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise OtFederatedError(
            f"{directory} has {free / 1e6:.0f} MB free and {num_bytes / 1e6:.0f} MB are needed. Free some "
            f"space there, or move the cache: set {cache_variable} to a directory on another disk."
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot flush a directory (EINVAL): the rename stays atomic there, only less
        # durable.
        with suppress(OSError) if path.is_dir() else explain_disk_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write ``data`` to ``path`` (its directory is created): whole or, after any failure, not at all.

    The user's umask decides who may read it, unless ``mode`` is given.

    Raises:
        OtFederatedError: If the disk is full or the directory may not be written.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{partial_suffix}")
        try:
            # "x" and not a temporary file: the user's umask decides who may read the result.
            with partial.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if mode is not None:
                partial.chmod(mode)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _flush(path.parent)


def atomic_write_text(path: Path, data: str) -> None:
    """Write ``data`` as UTF-8 to ``path``: whole or, after any failure, not at all.

    Raises:
        OtFederatedError: If the disk is full or the directory may not be written.
    """
    atomic_write_bytes(path, data.encode())


def append_line(path: Path, line: str) -> None:
    """Append ``line`` to ``path`` (created with its directory where missing) and return when it is on the disk.

    Processes that append to one file take turns. A part of a line that a killed process left stays a line of its own.

    Raises:
        OtFederatedError: If the disk is full or the file may not be written.
    """
    with file_lock(path), explain_disk_errors(path), path.open("r+b") as stream:
        is_new = not stream.seek(0, os.SEEK_END)
        if not is_new:
            stream.seek(-1, os.SEEK_END)
        torn = not is_new and stream.read(1) != b"\n"
        stream.write(("\n" if torn else "").encode() + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
        if is_new:
            _flush(path.parent)


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that becomes ``target`` when the block ends well.

    If ``target`` exists by then, another process was first: its directory stays and this one is dropped, so
    two processes that build the same thing both succeed. With ``replace`` what was there goes instead, once the
    new directory is whole. After an exception nothing is left of the new one.

    Raises:
        OtFederatedError: If the disk is full or the directory may not be written.
    """
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{partial_suffix}")
    with explain_disk_errors(target):
        partial.mkdir(parents=True)
        try:
            yield partial
            _open_to_readers(partial)
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            if replace and target.is_dir():
                old = target.with_name(f".{target.name}.{secrets.token_hex(4)}{partial_suffix}")
                target.rename(old)
                _rename_directory(partial, target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                _rename_directory(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _open_to_readers(directory: Path) -> None:
    """Give every file the mode that the user's umask asks for; safetensors writes files that only their owner reads."""
    probe = directory / f".mode{partial_suffix}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _rename_directory(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        # The code differs by system (ENOTEMPTY, EEXIST, EACCES); that the target is there is what matters.
        if not target.is_dir():
            raise
    _flush(target.parent)


def remove_partial_directories(target: Path) -> None:
    """Remove what killed processes left of ``target``. Call it only while holding the target's lock."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*{partial_suffix}"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left in ``directory``. Call it only while nobody else writes there."""
    for leftover in directory.glob(f".*{partial_suffix}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextmanager
def file_lock(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Lock the file ``path`` (created where missing), waiting for whoever holds it; yield whether it worked.

    ``on_wait`` is called before a wait begins, so that a person who sees nothing happen can be told why.

    The system releases the lock of a process that dies. Where there are no such locks (Windows, some network
    disks) this yields False at once: two processes then do the same work and :func:`atomic_directory` keeps
    the first.
    """
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    with stream:
        locked = False
        if sys.platform != "win32":
            with suppress(OSError):
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if on_wait:
                        on_wait()
                    fcntl.flock(stream, fcntl.LOCK_EX)
                locked = True
        yield locked


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished file, which nobody changes any more, a second name; copy it where file systems cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, without reading it into memory at once."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(digest_chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()
