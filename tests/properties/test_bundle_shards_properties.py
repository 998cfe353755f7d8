from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ot_federated.bundle import describe_files, manifest_name, verify_files, weight_files
from ot_federated.bundle_shards import count_shards, read_shard, shard_size, write_shard
from tests.bundles import build_manifest

# Empty files, files of exactly one shard and files longer than several shards are all likely here.
contents_strategy = st.lists(st.binary(max_size=40), min_size=3, max_size=6)


@given(contents=contents_strategy, shard_bytes=st.integers(1, 50), piece_bytes=st.integers(1, 60), order=st.integers(0))
def test_split_and_join_are_the_identity(contents: list[bytes], shard_bytes: int, piece_bytes: int, order: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, shards, joined = (Path(name) / part for part in ("source", "shards", "joined"))
        for directory in (source, shards, joined):
            directory.mkdir()
        for index, content in enumerate(contents):
            (source / (weight_files[index] if index < 3 else f"extra-{index}")).write_bytes(content)
        manifest = build_manifest(files=describe_files(source))
        paths = []
        for index in range(count_shards(manifest, shard_bytes=shard_bytes)):
            data = read_shard(source, manifest, index, shard_bytes=shard_bytes)
            assert len(data) == shard_size(manifest, index, shard_bytes=shard_bytes)
            paths.append(shards / str(index))
            paths[-1].write_bytes(data)
        assert b"".join(path.read_bytes() for path in paths) == b"".join(
            (source / file.name).read_bytes() for file in manifest.files
        )
        # Only the last shard is shorter, none is empty.
        assert all(path.stat().st_size == shard_bytes for path in paths[:-1])
        assert all(path.stat().st_size for path in paths)
        # In whatever order they come, and however they are cut.
        random.Random(order).shuffle(paths)
        for path in paths:
            data = path.read_bytes()
            pieces = [data[start : start + piece_bytes] for start in range(0, len(data), piece_bytes)]
            write_shard(joined, manifest, int(path.name), pieces, shard_bytes=shard_bytes)
        for file in manifest.files:
            (joined / file.name).touch()
        verify_files(joined, manifest)
        assert sorted(path.name for path in joined.iterdir()) == sorted(file.name for file in manifest.files)
        assert manifest_name not in {path.name for path in joined.iterdir()}
