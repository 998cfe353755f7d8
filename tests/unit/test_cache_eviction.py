"""A cache that is full: who goes, who stays, and what is said when nobody may go."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ot_federated.bundle import Manifest, manifest_name
from ot_federated.bundle_shards import count_shards, read_shard
from ot_federated.data_owner import cache_eviction
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.errors import BundleError
from tests.bundles import write_random_bundle

shard_bytes = 1024


@pytest.fixture(autouse=True)
def nothing_is_recent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_eviction, "moment_seconds", 0.0)


def build(directory: Path, size: int) -> Manifest:
    return write_random_bundle(directory, sizes=(size, 0, 0), others={"tokenizer.json": 1})


def fill(cache: BundleCache, source: Path, manifest: Manifest, *, used: float, num_shards: int = 99) -> Path:
    """Bring a bundle, or its first shards, into the cache, last used at a time."""
    import hashlib

    for index in cache.announce(manifest.digest, (source / manifest_name).read_bytes(), shard_bytes=shard_bytes):
        if index < num_shards:
            data = read_shard(source, manifest, index, shard_bytes=shard_bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            cache.receive(manifest.digest, index, [data], shard_bytes=shard_bytes, sha256=sha256)
    complete = cache.root / manifest.digest
    place = complete if complete.exists() else cache.root / f"incoming-{manifest.digest}-{shard_bytes}"
    for path in [*place.rglob("*"), place]:
        os.utime(path, (used, used))
    return place


@pytest.fixture
def bundles(tmp_path: Path) -> list[tuple[Path, Manifest]]:
    return [(tmp_path / str(number), build(tmp_path / str(number), 3000 + number)) for number in range(4)]


@pytest.fixture
def cache(tmp_path: Path) -> BundleCache:
    return BundleCache(tmp_path / "cache", max_bytes=12_000)  # three bundles with their manifests


def test_the_least_recently_used_goes(cache: BundleCache, bundles: list[tuple[Path, Manifest]]) -> None:
    first, second, third = (fill(cache, *bundles[number], used=1000.0 + number) for number in range(3))
    assert cache.find(first.name)  # used again: now it is the most recent one
    fill(cache, *bundles[3], used=2000.0)
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
    assert cache.find(bundles[3][1].digest)
    assert not list(cache.root.glob(".going-*"))


def test_half_a_bundle_that_never_came_whole_goes_too(cache: BundleCache, bundles: list[tuple[Path, Manifest]]) -> None:
    half = fill(cache, *bundles[0], used=500.0, num_shards=2)
    others = [fill(cache, *bundles[number], used=1000.0 + number) for number in (1, 2)]
    fill(cache, *bundles[3], used=2000.0)
    assert not half.exists()
    assert all(path.exists() for path in others)


def test_no_limit_keeps_everything(tmp_path: Path, bundles: list[tuple[Path, Manifest]]) -> None:
    cache = BundleCache(tmp_path / "cache")
    places = [fill(cache, *bundle, used=1.0) for bundle in bundles]
    assert all(place.exists() for place in places)


def test_a_bundle_in_use_stays(cache: BundleCache, bundles: list[tuple[Path, Manifest]]) -> None:
    """Another process trains on the oldest one: the next in age goes instead; with the process its right ends."""
    oldest, second, third = (fill(cache, *bundles[number], used=1000.0 + number) for number in range(3))
    code = (
        "import sys, pathlib\nfrom ot_federated.data_owner.bundle_cache import BundleCache\n"
        "with BundleCache(pathlib.Path(sys.argv[1])).use(sys.argv[2]) as directory:\n"
        "    print(directory.name, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(cache.root), oldest.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline().strip() == oldest.name
        for path in [*oldest.rglob("*"), oldest]:
            os.utime(path, (900.0, 900.0))
        fill(cache, *bundles[3], used=2000.0)
        assert (oldest.exists(), second.exists(), third.exists()) == (True, False, True)
        trainer.kill()
    os.utime(oldest, (900.0, 900.0))
    fill(cache, *bundles[1], used=3000.0)
    assert not oldest.exists()


def test_nobody_begins_to_use_a_bundle_that_is_going(
    cache: BundleCache, bundles: list[tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that asks for a bundle in the moment in which it goes finds it whole, or not at all."""
    oldest = fill(cache, *bundles[0], used=1000.0)
    fill(cache, *bundles[1], used=1001.0)
    fill(cache, *bundles[2], used=1002.0)
    with cache.use(oldest.name) as directory:
        assert directory is not None
    os.utime(oldest, (1000.0, 1000.0))
    found: list[Path | None] = []

    def use() -> None:
        with cache.use(oldest.name) as directory:
            found.append(directory)

    trainer = threading.Thread(target=use)
    rename = Path.rename

    def rename_late(path: Path, target: Path) -> Path:
        if path == oldest:
            trainer.start()
            trainer.join(0.3)
            assert not found
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    fill(cache, *bundles[3], used=2000.0)
    trainer.join(10)
    assert found == [None]


def test_when_all_are_in_use_it_is_said_and_nothing_goes(
    cache: BundleCache, bundles: list[tuple[Path, Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [fill(cache, *bundles[number], used=1000.0 + number) for number in range(3)]
    monkeypatch.setattr(cache_eviction, "moment_seconds", 1e12)  # everything was used a moment ago
    with pytest.raises(BundleError, match="in use at present"):
        fill(cache, *bundles[3], used=2000.0)
    assert all(place.exists() for place in places)


def test_a_bundle_that_can_never_fit_is_refused_before_anything_goes(
    cache: BundleCache, bundles: list[tuple[Path, Manifest]], tmp_path: Path
) -> None:
    place = fill(cache, *bundles[0], used=1.0)
    huge = build(tmp_path / "huge", 20_000)
    with pytest.raises(BundleError, match="raise cache-max-bytes"):
        fill(cache, tmp_path / "huge", huge, used=2.0)
    assert place.exists()
    assert not list(cache.root.glob("incoming-*"))
    assert count_shards(huge, shard_bytes=shard_bytes) == 20
