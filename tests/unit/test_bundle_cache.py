"""The data owner's bundle cache: resuming, damage on the way and on disk, and names that would lead out of it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ot_federated.bundle import Manifest, describe_files, manifest_name
from ot_federated.bundle_shards import changed_part, count_shards, read_shard
from ot_federated.data_owner.bundle_cache import BundleCache, check_digest, max_shard_bytes
from ot_federated.errors import BundleError, OtFederatedError
from tests.bundles import write_random_bundle

shard_bytes = 1024


class Sender:
    """The owner's side: a bundle of four shards (1000 + 2500 + 0 + 300 bytes), the last one shorter."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = write_random_bundle(directory)
        self.digest = self.manifest.digest
        self.num_shards = count_shards(self.manifest, shard_bytes=shard_bytes)
        assert self.num_shards == 4

    def announce_to(self, cache: BundleCache) -> list[int]:
        text = (self.directory / manifest_name).read_bytes()
        return cache.announce(self.digest, text, shard_bytes=shard_bytes)

    def send(self, cache: BundleCache, index: int, *, data: bytes | None = None) -> list[int]:
        data = read_shard(self.directory, self.manifest, index, shard_bytes=shard_bytes) if data is None else data
        sha256 = hashlib.sha256(data).hexdigest()
        return cache.receive(self.digest, index, [data], shard_bytes=shard_bytes, sha256=sha256)


@pytest.fixture
def sender(tmp_path: Path) -> Sender:
    return Sender(tmp_path / "bundle")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_same_content(directory: Path, sender: Sender) -> None:
    names = {path.name for path in sender.directory.iterdir()}
    assert {path.name for path in directory.iterdir()} == names
    assert all((directory / name).read_bytes() == (sender.directory / name).read_bytes() for name in names)


def test_a_bundle_arrives_in_any_order(sender: Sender, root: Path) -> None:
    cache = BundleCache(root)
    assert cache.find(sender.digest) is None
    assert sender.announce_to(cache) == [0, 1, 2, 3]
    assert sender.send(cache, 2) == [0, 1, 3]
    assert sender.send(cache, 3) == [0, 1]
    assert sender.send(cache, 0) == [1]
    assert cache.find(sender.digest) is None
    assert sender.send(cache, 1) == []
    found = cache.find(sender.digest)
    assert found == root / sender.digest
    assert_same_content(found, sender)
    assert not list(root.glob("incoming-*"))  # the shards are not kept twice


def test_it_goes_on_after_half_the_shards_in_a_new_process(sender: Sender, root: Path) -> None:
    cache = BundleCache(root)
    sender.announce_to(cache)
    sender.send(cache, 0)
    sender.send(cache, 2)
    cache = BundleCache(root)
    assert sender.announce_to(cache) == [1, 3]
    sender.send(cache, 1)
    cache = BundleCache(root)
    assert sender.send(cache, 3) == []
    found = BundleCache(root).find(sender.digest)
    assert found is not None
    assert_same_content(found, sender)


def test_killed_between_the_last_shard_and_the_complete_bundle(
    sender: Sender, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BundleCache(root)
    sender.announce_to(cache)
    for index in range(3):
        sender.send(cache, index)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BundleCache, "_complete", die)
        with pytest.raises(KeyboardInterrupt):
            sender.send(cache, 3)
    # The next process must end up with the bundle, whether it completes it or asks for shards again.
    cache = BundleCache(root)
    for index in sender.announce_to(cache):
        sender.send(cache, index)
    found = cache.find(sender.digest)
    assert found is not None
    assert_same_content(found, sender)


def test_a_complete_bundle_lacks_nothing(sender: Sender, root: Path) -> None:
    cache = BundleCache(root)
    for index in sender.announce_to(cache):
        sender.send(cache, index)
    assert sender.announce_to(BundleCache(root)) == []
    assert sender.send(cache, 1, data=b"late and wrong") == []
    assert_same_content(root / sender.digest, sender)


def test_clients_of_one_cache_hear_of_a_bundle_at_once(sender: Sender, tmp_path: Path) -> None:
    """Catches one that clears away what another is writing: in a simulation a client then missed a round."""
    for attempt in range(30):
        cache, start = BundleCache(tmp_path / f"cache-{attempt}"), threading.Barrier(4)

        def announce(cache: BundleCache = cache, start: threading.Barrier = start) -> list[int]:
            start.wait()
            return sender.announce_to(cache)

        with ThreadPoolExecutor(max_workers=4) as pool:
            answers = [future.result() for future in [pool.submit(announce) for _ in range(4)]]
        assert answers == [[0, 1, 2, 3]] * 4


def test_shard_damaged_on_the_way(sender: Sender, root: Path) -> None:
    cache = BundleCache(root)
    sender.announce_to(cache)
    right = read_shard(sender.directory, sender.manifest, 0, shard_bytes=shard_bytes)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    with pytest.raises(BundleError, match="damaged on the way; send it again"):
        cache.receive(sender.digest, 0, [wrong], shard_bytes=shard_bytes, sha256=hashlib.sha256(right).hexdigest())
    assert sender.announce_to(cache) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [0, shard_bytes - 1, shard_bytes + 1])
def test_shard_of_another_size(sender: Sender, root: Path, size: int) -> None:
    cache = BundleCache(root)
    sender.announce_to(cache)
    with pytest.raises(BundleError, match=f"has {size} bytes, not what the manifest gives"):
        sender.send(cache, 0, data=b"x" * size)
    assert sender.announce_to(cache) == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [-1, 4, 10**9])
def test_shard_that_the_bundle_does_not_have(sender: Sender, root: Path, index: int) -> None:
    cache = BundleCache(root)
    sender.announce_to(cache)
    with pytest.raises(BundleError, match=f"Shard {index} is not one of the bundle"):
        sender.send(cache, index, data=b"x")


def test_shard_that_was_not_announced(sender: Sender, root: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        sender.send(BundleCache(root), 0)
    assert not list(root.glob("incoming-*"))


def test_consistent_shards_of_another_content_never_become_the_bundle(sender: Sender, root: Path) -> None:
    """A sender who lies in shard and shard digest alike is found out by the files' digests."""
    cache = BundleCache(root)
    sender.announce_to(cache)
    for index in range(3):
        sender.send(cache, index)
    size = len(read_shard(sender.directory, sender.manifest, 3, shard_bytes=shard_bytes))
    with pytest.raises(BundleError, match="does not have the digest"):
        sender.send(cache, 3, data=b"x" * size)
    assert cache.find(sender.digest) is None
    assert not (root / sender.digest).exists()
    # No shard can be trusted any more; the honest bundle arrives in a second attempt.
    assert sender.announce_to(cache) == [0, 1, 2, 3]
    for index in range(4):
        sender.send(cache, index)
    assert cache.find(sender.digest)


def test_manifest_of_another_digest(sender: Sender, root: Path) -> None:
    with pytest.raises(BundleError, match="it was altered"):
        BundleCache(root).announce("0" * 64, sender.manifest.to_bytes(), shard_bytes=shard_bytes)
    assert not list(root.glob("incoming-*"))


@pytest.mark.parametrize("size", [0, -1, 1023, max_shard_bytes + 1])
def test_shard_sizes_that_are_refused(sender: Sender, root: Path, size: int) -> None:
    with pytest.raises(BundleError, match="1 KiB to 1 GiB"):
        BundleCache(root).announce(sender.digest, sender.manifest.to_bytes(), shard_bytes=size)


@pytest.mark.parametrize(
    "digest", ["", "..", "../" * 10 + "etc", "/etc", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", "a" * 61 + "/.."]
)
def test_what_is_no_digest_never_becomes_a_path(sender: Sender, root: Path, digest: str) -> None:
    cache = BundleCache(root)
    for attempt in (
        lambda: check_digest(digest),
        lambda: cache.find(digest),
        lambda: cache.announce(digest, sender.manifest.to_bytes(), shard_bytes=shard_bytes),
        lambda: cache.receive(digest, 0, [b"x"], shard_bytes=shard_bytes, sha256="0" * 64),
    ):
        with pytest.raises(BundleError, match="is not a bundle digest"):
            attempt()
    assert not root.exists() or not list(root.iterdir())


def complete(sender: Sender, root: Path) -> Path:
    cache = BundleCache(root)
    for index in sender.announce_to(cache):
        sender.send(cache, index)
    return root / sender.digest


@pytest.mark.parametrize("name", ["adapter.safetensors", "tokenizer.json"])
def test_truncated_file_of_a_complete_bundle_is_noticed_and_removed(sender: Sender, root: Path, name: str) -> None:
    path = complete(sender, root) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert BundleCache(root).find(sender.digest) is None
    assert not (root / sender.digest).exists()
    complete(sender, root)
    assert BundleCache(root).find(sender.digest)


@pytest.mark.parametrize("name", [manifest_name, "frozen.safetensors"])
def test_bundle_that_the_disk_refuses_to_read_is_not_thrown_away(
    sender: Sender, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = complete(sender, root)
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(OtFederatedError, match=r"cannot be read .*Input/output error.* It is left as it is"):
            BundleCache(root).find(sender.digest)
    assert BundleCache(root).find(sender.digest) == directory


@pytest.mark.parametrize("damage", ["missing file", "other manifest", "no manifest"])
def test_incomplete_bundle_is_noticed_and_removed(sender: Sender, root: Path, damage: str) -> None:
    directory = complete(sender, root)
    if damage == "missing file":
        (directory / "frozen.safetensors").unlink()
    elif damage == "other manifest":
        text = (directory / manifest_name).read_bytes()
        (directory / manifest_name).write_bytes(text.replace(b"llama", b"gemma"))
    else:
        (directory / manifest_name).unlink()
    assert BundleCache(root).find(sender.digest) is None
    assert not directory.exists()


def test_manifest_text_is_kept_as_it_came(root: Path, tmp_path: Path) -> None:
    """Another release may render JSON otherwise: the digest is that of the text which travelled."""
    sender = Sender(tmp_path / "b")
    text = sender.manifest.to_bytes() + b"\n  \n"
    (sender.directory / manifest_name).write_bytes(text)
    sender.digest = hashlib.sha256(text).hexdigest()
    assert (complete(sender, root) / manifest_name).read_bytes() == text
    assert BundleCache(root).find(sender.digest)


def test_no_room_is_said_before_anything_is_written(
    sender: Sender, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(sender.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OtFederatedError, match="Free some space"):
        sender.announce_to(BundleCache(root))
    assert not list(root.glob("incoming-*"))


def test_identity_is_kept_and_differs_between_caches(tmp_path: Path) -> None:
    first = BundleCache(tmp_path / "a").identify()
    assert BundleCache(tmp_path / "a").identify() == first
    assert BundleCache(tmp_path / "b").identify() != first


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_BUNDLE_CACHE", str(tmp_path / "here"))
    assert BundleCache().root == tmp_path / "here"
    monkeypatch.delenv("OT_FEDERATED_BUNDLE_CACHE")
    monkeypatch.setenv("OT_FEDERATED_CACHE", str(tmp_path / "shared"))
    assert BundleCache().root == tmp_path / "shared" / "received-bundles"


class Change:
    """A later version of a bundle: all its files, and one more of 1500 bytes, in two shards."""

    def __init__(self, base: Sender, directory: Path) -> None:
        shutil.copytree(base.directory, directory)
        (directory / "realignment.safetensors").write_bytes(bytes(range(250)) * 6)
        self.directory, self.base = directory, base
        self.manifest = replace(base.manifest, files=describe_files(directory))
        (directory / manifest_name).write_bytes(self.manifest.to_bytes())
        self.digest = self.manifest.digest
        self.part = changed_part(self.manifest, base.manifest)

    def announce_to(self, cache: BundleCache) -> list[int]:
        base = cache.find_base(["0" * 64, self.base.digest])
        assert base == self.base.digest
        return cache.announce(self.digest, self.manifest.to_bytes(), shard_bytes=shard_bytes, base=base)

    def send(self, cache: BundleCache, index: int, *, data: bytes | None = None) -> list[int]:
        data = read_shard(self.directory, self.part, index, shard_bytes=shard_bytes) if data is None else data
        sha256 = hashlib.sha256(data).hexdigest()
        return cache.receive(self.digest, index, [data], shard_bytes=shard_bytes, sha256=sha256, base=self.base.digest)


def fill(cache: BundleCache, sender: Sender) -> None:
    for index in sender.announce_to(cache):
        sender.send(cache, index)


def test_of_a_later_version_only_the_change_is_received(sender: Sender, root: Path, tmp_path: Path) -> None:
    cache, change = BundleCache(root), Change(sender, tmp_path / "change")
    assert cache.find_base([sender.digest]) == ""
    fill(cache, sender)
    assert change.announce_to(cache) == [0, 1]
    assert change.send(cache, 1) == [0]
    assert change.announce_to(BundleCache(root)) == [0]  # a process later
    assert change.send(cache, 0) == []
    found = cache.find(change.digest)
    assert found is not None
    assert {path.name for path in found.iterdir()} == {path.name for path in change.directory.iterdir()}
    assert all(path.read_bytes() == (found / path.name).read_bytes() for path in change.directory.iterdir())
    assert_same_content(root / sender.digest, sender)


def test_a_change_that_was_altered_or_whose_base_is_gone_is_refused(sender: Sender, root: Path, tmp_path: Path) -> None:
    cache, change = BundleCache(root), Change(sender, tmp_path / "change")
    fill(cache, sender)
    change.announce_to(cache)
    change.send(cache, 0)
    with pytest.raises(BundleError, match="does not have the digest"):
        change.send(cache, 1, data=bytes(476))
    assert cache.find(change.digest) is None
    change.announce_to(cache)
    shutil.rmtree(root / sender.digest)
    with pytest.raises(BundleError, match="is gone: ask for all of it"):
        change.send(cache, 0)
    # Without its base all of it is received.
    for index in cache.announce(change.digest, change.manifest.to_bytes(), shard_bytes=shard_bytes):
        data = read_shard(change.directory, change.manifest, index, shard_bytes=shard_bytes)
        cache.receive(change.digest, index, [data], shard_bytes=shard_bytes, sha256=hashlib.sha256(data).hexdigest())
    assert cache.find(change.digest) is not None
