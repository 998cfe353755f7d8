from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ot_federated import cache
from ot_federated.errors import OtFederatedError


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_cache_root_prefers_own_variable_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("OT_FEDERATED_CACHE", raising=False)
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "ot-federated"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "ot-federated"
    monkeypatch.setenv("OT_FEDERATED_CACHE", "~/own")
    assert cache.cache_root() == tmp_path / "home" / "own"


def test_atomic_write_creates_directories_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    cache.atomic_write_text(path, "eins ä")
    cache.atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert entries(path.parent) == ["b.txt"]


def test_atomic_write_follows_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        cache.atomic_write_text(tmp_path / "shared", "x")
    finally:
        os.umask(previous)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_failed_write_keeps_the_old_content_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    path = tmp_path / "state.json"
    cache.atomic_write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache.os, "fsync", fail)
    with pytest.raises(OtFederatedError) as caught:
        cache.atomic_write_text(path, "new")
    assert str(path) in str(caught.value)
    assert "OT_FEDERATED_CACHE" in str(caught.value)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["state.json"]


def test_full_disk_that_a_rust_library_met_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(OtFederatedError, match="disk is full"), cache.explain_disk_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_disk_errors_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        cache.atomic_write_text(tmp_path / "file" / "below", "x")


def test_require_free_bytes_names_both_amounts(tmp_path: Path) -> None:
    cache.require_free_bytes(tmp_path / "new", 1)
    assert (tmp_path / "new").is_dir()
    with pytest.raises(OtFederatedError, match=r"MB free and 1000000000000 MB are needed"):
        cache.require_free_bytes(tmp_path, 10**18)


def test_atomic_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"
    with cache.atomic_directory(target) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "file").write_text("x")
        assert not target.exists()
    assert (target / "deep" / "file").read_text() == "x"
    assert entries(target.parent) == ["target"]


def test_atomic_directory_leaves_nothing_after_an_exception(tmp_path: Path) -> None:
    def fail_within() -> None:
        with cache.atomic_directory(tmp_path / "target") as directory:
            (directory / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert entries(tmp_path) == []


def test_atomic_directory_keeps_the_first(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with cache.atomic_directory(target) as directory:
        (directory / "who").write_text("second")
        with cache.atomic_directory(target) as other:
            (other / "who").write_text("first")
    assert (target / "who").read_text() == "first"
    assert entries(tmp_path) == ["target"]


def test_remove_partial_directories_takes_only_this_targets(tmp_path: Path) -> None:
    for name in (".target.aa.partial", ".target-2.bb.partial", "target", ".[x].cc.partial"):
        (tmp_path / name).mkdir()
    cache.remove_partial_directories(tmp_path / "target")
    assert entries(tmp_path) == [".[x].cc.partial", ".target-2.bb.partial", "target"]
    cache.remove_partial_directories(tmp_path / "[x]")
    assert entries(tmp_path) == [".target-2.bb.partial", "target"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_file_lock_keeps_another_process_out(tmp_path: Path) -> None:
    path = tmp_path / "below" / "lock"
    attempt = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1], 'ab'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('held')\n"
        "else: print('free')"
    )

    def state() -> str:
        command = [sys.executable, "-c", attempt, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with cache.file_lock(path) as locked:
        assert locked
        assert state() == "held"
    assert state() == "free"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_who_must_wait_for_a_lock_is_told_before(tmp_path: Path) -> None:
    told = threading.Event()
    with ThreadPoolExecutor(1) as pool, cache.file_lock(tmp_path / "lock", on_wait=told.set):
        assert not told.is_set()  # nobody else had it

        def wait() -> bool:
            with cache.file_lock(tmp_path / "lock", on_wait=told.set) as locked:
                return locked

        waiting = pool.submit(wait)
        assert told.wait(10)
        assert not waiting.done()
    assert waiting.result(10)


def test_file_sha256_of_more_than_one_chunk(tmp_path: Path) -> None:
    data = os.urandom(cache.digest_chunk_bytes + 17)
    (tmp_path / "file").write_bytes(data)
    assert cache.file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
