"""What a client does with messages that no honest server sends: it refuses with a reason and stays as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from ot_federated.bundle import BundleFile, Manifest, manifest_name
from ot_federated.bundle_shards import count_shards, read_shard
from ot_federated.config import RunConfig, flatten
from ot_federated.data_owner.client_app import app as client_app
from ot_federated.messages import build_content, encode_shard
from simulations.in_process import InProcessGrid
from tests.bundles import build_manifest, write_random_bundle

shard_bytes = 65536


class Client:
    """One client with an empty bundle cache, and a server that says to it what it likes."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.grid = InProcessGrid(client_app, run_config=flatten(RunConfig()), num_clients=1)

    def tell(self, message_type: str, content: RecordDict) -> dict[str, Any]:
        """Send a message and return the reply's config; the client must always reply and never raise."""
        message = Message(content, self.grid.get_node_ids()[0], message_type)
        (reply,) = self.grid.send_and_receive([message])
        assert not reply.has_error()
        return dict(reply.content.config_records["config"])

    def reason(self, message_type: str, content: RecordDict) -> str:
        """Return why the client refuses."""
        reply = self.tell(message_type, content)
        assert reply["status"] == "error"
        return str(reply["reason"])

    def files(self) -> set[str]:
        """Return all files below the cache's parent, but for locks and the cache's name."""
        found = {str(path.relative_to(self.cache.parent)) for path in self.cache.parent.rglob("*") if path.is_file()}
        return {name for name in found if Path(name).name not in (".lock", ".receiving", "cache-id")}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("OT_FEDERATED_BUNDLE_CACHE", str(tmp_path / "client" / "cache"))
    return Client(tmp_path / "client" / "cache")


def hello(manifest: Manifest | bytes, **fields: Any) -> RecordDict:
    text = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
    honest = {"bundle-digest": hashlib.sha256(text).hexdigest(), "shard-bytes": shard_bytes, "manifest": text}
    return build_content(honest | fields)


def shard(digest: str, index: int, data: bytes, **fields: Any) -> RecordDict:
    honest = {
        "bundle-digest": digest,
        "shard-bytes": shard_bytes,
        "shard-index": index,
        "shard-sha256": hashlib.sha256(data).hexdigest(),
    }
    return build_content(honest | fields, pieces=encode_shard([lambda: data]))


def honest_files(**others: BundleFile) -> tuple[BundleFile, ...]:
    names = ("adapter.safetensors", "emulator.safetensors", "frozen.safetensors")
    return (*(BundleFile(name, 10, "ab" * 32) for name in names), *others.values())


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "..", "a/b", ".profile", "cache-id\n"])
def test_manifest_with_a_file_outside_the_cache(client: Client, name: str) -> None:
    manifest = build_manifest(files=honest_files(evil=BundleFile(name, 10, "ab" * 32)))
    assert "only plain file names are accepted" in client.reason("query.hello", hello(manifest))
    assert client.files() == set()


@pytest.mark.parametrize("digest", ["../../outside", "..", "", "/etc", "A" * 64])
@pytest.mark.parametrize("message_type", ["query.hello", "query.shard", "train"])
def test_digest_that_is_a_path(client: Client, message_type: str, digest: str) -> None:
    content = {
        "query.hello": hello(build_manifest(files=honest_files()), **{"bundle-digest": digest}),
        "query.shard": shard(digest, 0, b"x"),
        "train": build_content({"bundle-digest": digest, "server-round": 1, "update-dtype": "float32"}),
    }[message_type]
    assert "is not a bundle digest" in client.reason(message_type, content)
    assert client.files() == set()


def test_manifest_that_is_not_the_one_named(client: Client) -> None:
    assert "it was altered" in client.reason(
        "query.hello", hello(build_manifest(files=honest_files()), **{"bundle-digest": "00" * 32})
    )


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff" * 100, b'{"format": 1}'])
def test_manifest_of_garbage(client: Client, text: bytes) -> None:
    client.reason("query.hello", hello(text))
    assert client.files() == set()


def test_bundle_larger_than_the_disk(client: Client) -> None:
    files = (*honest_files()[1:], BundleFile("adapter.safetensors", 2**43, "ab" * 32))
    assert "Free some space" in client.reason("query.hello", hello(build_manifest(files=files)))
    assert client.files() == set()


@pytest.mark.parametrize("value", [0, -1, 1, 2**31, "65536", 1.5])
def test_shard_sizes(client: Client, value: Any) -> None:
    client.reason("query.hello", hello(build_manifest(files=honest_files()), **{"shard-bytes": value}))
    assert client.files() == set()


def test_message_without_a_manifest(client: Client) -> None:
    content = build_content({"bundle-digest": "ab" * 32, "shard-bytes": shard_bytes})
    assert "has no manifest" in client.reason("query.hello", content)


@pytest.mark.parametrize("message_type", ["query.hello", "query.shard", "train"])
def test_message_without_anything(client: Client, message_type: str) -> None:
    assert "no config record" in client.reason(message_type, RecordDict())
    other = RecordDict({"config": ConfigRecord({"wire-version": 99})})
    assert "install the same release" in client.reason(message_type, other)


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Manifest]:
    directory = tmp_path / "bundle"
    return directory, write_random_bundle(directory, sizes=(70_000, 50_000, 100))


def test_honest_bundle_arrives(client: Client, bundle: tuple[Path, Manifest]) -> None:
    """Guards the tests here: what is refused below is refused for what is wrong with it."""
    directory, manifest = bundle
    reply = client.tell("query.hello", hello((directory / manifest_name).read_bytes()))
    assert reply["status"] == "ok"
    assert reply["missing-shards"] == list(range(count_shards(manifest, shard_bytes=shard_bytes)))
    for index in reply["missing-shards"]:
        data = read_shard(directory, manifest, index, shard_bytes=shard_bytes)
        assert client.tell("query.shard", shard(manifest.digest, index, data))["status"] == "ok"
    assert client.files() == {f"cache/{manifest.digest}/{path.name}" for path in directory.iterdir()}
    assert client.tell("query.hello", hello(manifest))["missing-shards"] == []


def test_shard_before_it_was_announced(client: Client, bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    data = read_shard(directory, manifest, 0, shard_bytes=shard_bytes)
    client.reason("query.shard", shard(manifest.digest, 0, data))
    assert client.files() == set()


@pytest.mark.parametrize(
    ("index", "data", "fields"),
    [
        pytest.param(0, b"short", {}, id="too short"),
        pytest.param(0, b"x" * (shard_bytes + 1), {}, id="too long"),
        pytest.param(0, b"x" * shard_bytes, {"shard-sha256": "00" * 32}, id="wrong digest"),
        pytest.param(0, b"x" * shard_bytes, {"shard-sha256": 7}, id="digest of another type"),
        pytest.param(99, b"x" * shard_bytes, {}, id="beyond the end"),
        pytest.param(0, b"x" * shard_bytes, {"shard-index": -1}, id="negative"),
        pytest.param(0, b"x" * shard_bytes, {"shard-index": "0"}, id="index of another type"),
        pytest.param(0, b"x" * shard_bytes, {"shard-bytes": 70_000}, id="other shard size"),
    ],
)
def test_shards_that_are_wrong(
    client: Client, bundle: tuple[Path, Manifest], index: int, data: bytes, fields: dict[str, Any]
) -> None:
    directory, manifest = bundle
    client.tell("query.hello", hello((directory / manifest_name).read_bytes()))
    client.reason("query.shard", shard(manifest.digest, index, data, **fields))
    assert client.files() == {f"cache/incoming-{manifest.digest}-{shard_bytes}/bundle/manifest.json"}


def test_shard_that_comes_with_arrays_or_as_something_else(client: Client, bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    client.tell("query.hello", hello((directory / manifest_name).read_bytes()))
    content = shard(manifest.digest, 0, bytes(shard_bytes))
    content["arrays"] = ArrayRecord({"piece-0000": Array(np.zeros(shard_bytes // 4, np.float32))})
    assert "and that alone" in client.reason("query.shard", content)
    content = shard(manifest.digest, 0, bytes(shard_bytes))
    content["piece-0000"] = ConfigRecord({"bytes": "x" * shard_bytes})
    assert "piece-0000 is str" in client.reason("query.shard", content)


def test_shards_whose_lies_agree_never_become_a_bundle(client: Client, bundle: tuple[Path, Manifest]) -> None:
    directory, manifest = bundle
    client.tell("query.hello", hello((directory / manifest_name).read_bytes()))
    last = count_shards(manifest, shard_bytes=shard_bytes) - 1
    for index in range(last):
        data = read_shard(directory, manifest, index, shard_bytes=shard_bytes)
        client.tell("query.shard", shard(manifest.digest, index, data))
    size = len(read_shard(directory, manifest, last, shard_bytes=shard_bytes))
    assert "does not have the digest" in client.reason("query.shard", shard(manifest.digest, last, b"x" * size))
    assert client.files() == set()


def test_training_without_the_bundle_asks_for_it(client: Client) -> None:
    content = build_content({"bundle-digest": "ab" * 32, "server-round": 1, "update-dtype": "float32"})
    assert client.tell("train", content)["status"] == "bundle-missing"


def test_bundle_whose_weights_are_no_weights(client: Client, bundle: tuple[Path, Manifest]) -> None:
    """All digests agree, but the files are random bytes: the sender made them so."""
    directory, manifest = bundle
    for index in client.tell("query.hello", hello((directory / manifest_name).read_bytes()))["missing-shards"]:
        client.tell(
            "query.shard",
            shard(manifest.digest, index, read_shard(directory, manifest, index, shard_bytes=shard_bytes)),
        )
    fields = {"bundle-digest": manifest.digest, "server-round": 1, "update-dtype": "float32", "run": "r"}
    reason = client.reason("train", build_content(fields, arrays=ArrayRecord()))
    assert "is not a readable safetensors file" in reason
