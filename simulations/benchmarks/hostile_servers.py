"""Hostile servers against the real client: messages that no honest server sends, to one client."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle  # to make what is never loaded
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from ot_federated.bundle import BundleFile, Manifest, manifest_name, max_manifest_bytes, read_manifest, read_tensors
from ot_federated.bundle_shards import count_shards
from ot_federated.data_owner.app_bundle import read_app_bundle
from ot_federated.data_owner.bundle_cache import cache_variable
from ot_federated.data_owner.client_app import app as client_app
from ot_federated.errors import OtFederatedError
from ot_federated.messages import build_content, encode_update
from ot_federated.settings import Scalar
from simulations.in_process import InProcessGrid

shard_bytes = 65536


class VictimError(Exception):
    """The client did what it should have refused."""


class Victim:
    """A client with a bundle cache of its own, and a hostile server that says to it what it likes."""

    def __init__(self, directory: Path, *, bundle: Path, config: Mapping[str, Scalar]) -> None:
        self.directory, self.bundle, self.config = directory, bundle, config
        self.manifest = read_manifest(bundle)
        self.cache = directory / "cache"

    def refuse(self, message_type: str, content: RecordDict, *, settings: Mapping[str, Scalar] | None = None) -> str:
        """Send a message and return why the client refuses; it must reply, and write nothing outside its cache.

        Raises:
            VictimError: If it does not refuse.
        """
        os.environ[cache_variable] = str(self.cache)
        grid = InProcessGrid(client_app, run_config={**self.config, **(settings or {})}, num_clients=1)
        (reply,) = grid.send_and_receive([Message(content, grid.get_node_ids()[0], message_type)])
        if reply.has_error():
            raise VictimError(f"the client broke: {reply.error.reason}")
        record = reply.content.config_records["config"]
        if record["status"] != "error":
            raise VictimError(f"the client answered {dict(record)!r:.200}")
        if {path.name for path in self.directory.iterdir()} - {"cache"}:
            raise VictimError("the client wrote outside its cache")
        return str(record["reason"])

    def hello(self, manifest: Manifest | bytes, **fields: Any) -> str:
        """Announce a bundle and return why it is refused."""
        text = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
        honest: dict[str, Any] = {
            "bundle-digest": hashlib.sha256(text).hexdigest(),
            "shard-bytes": shard_bytes,
            "manifest": text,
        }
        return self.refuse("query.hello", build_content(honest | fields))

    def with_file(self, name: str, num_bytes: int = 10) -> Manifest:
        """Return the honest manifest with one more file."""
        return replace(self.manifest, files=(*self.manifest.files, BundleFile(name, num_bytes, "ab" * 32)))

    def train(self, *, settings: Mapping[str, Scalar] | None = None, server_round: int = 1) -> str:
        """Ask for training with absurd settings and return why it is refused."""
        return self.train_on(self.bundle, self.manifest, settings=settings, server_round=server_round)

    def train_on(
        self,
        bundle: Path,
        manifest: Manifest,
        *,
        settings: Mapping[str, Scalar] | None = None,
        server_round: int = 1,
    ) -> str:
        """Ask for training on a bundle that lies in the client's cache and return why it is refused."""
        place = self.cache / manifest.digest
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(bundle, place)
        (place / manifest_name).write_bytes(manifest.to_bytes())
        base = read_tensors(self.bundle / "adapter.safetensors")
        fields: dict[str, str | int | float | bytes | list[int]] = {
            "bundle-digest": manifest.digest,
            "server-round": server_round,
            "update-dtype": "float16",
            "run": "hostile",
        }
        content = build_content(fields, arrays=encode_update(base, base, dtype="float16"))
        return self.refuse("train", content, settings=settings)

    def altered_bundle(self, name: str, data: bytes) -> str:
        """Ask for training on a bundle in which one file is something else; all digests agree."""
        altered = self.cache.parent.parent / "altered"
        shutil.rmtree(altered, ignore_errors=True)
        shutil.copytree(self.bundle, altered)
        (altered / name).write_bytes(data)
        files = tuple(
            BundleFile(name, len(data), hashlib.sha256(data).hexdigest()) if file.name == name else file
            for file in self.manifest.files
        )
        return self.train_on(altered, replace(self.manifest, files=files))

    def announce_config(self, **fields: Any) -> str:
        """Announce a bundle with a model of another config and return why it is refused."""
        return self.hello(replace(self.manifest, config={**self.manifest.config, **fields}))

    def with_config(self, **fields: Any) -> str:
        """Ask for training on a model of another config."""
        return self.train_on(self.bundle, replace(self.manifest, config={**self.manifest.config, **fields}))


def list_attacks(victim: Victim) -> dict[str, Callable[[], str]]:
    """Return every attack by its name; each returns the client's reason and raises if there is none."""
    stack = victim.manifest.stack
    tokenizer = next(file.name for file in victim.manifest.files if file.name == "tokenizer.json")
    return {
        "another bundle than the one named": lambda: victim.hello(victim.manifest, **{"bundle-digest": "00" * 32}),
        "path traversal in a file's name": lambda: victim.hello(victim.with_file("../outside.json")),
        "absolute path as a file's name": lambda: victim.hello(victim.with_file("/etc/cron.d/evil")),
        "path as the bundle's digest": lambda: victim.hello(victim.manifest, **{"bundle-digest": "../../outside"}),
        "a pickled file in the bundle": lambda: victim.hello(victim.with_file("pytorch_model.bin")),
        "code in the bundle": lambda: victim.hello(victim.with_file("tokenization_evil.py")),
        "manifest above 4 MiB on the wire": lambda: victim.hello(b" " * (max_manifest_bytes + 1)),
        "manifest of 10 GB on the disk": lambda: read_sparse_manifest(victim.directory.parent),
        "bundle of 8 TB": lambda: victim.hello(victim.with_file("more.safetensors", 2**43)),
        "tokenizer of 1 GB": lambda: victim.hello(victim.with_file("vocab.txt", 2**30)),
        "5,000 blocks": lambda: victim.hello(replace(victim.manifest, stack=stack * 1000)),
        "JSON nested 100,000 deep": lambda: victim.hello(b"[" * 100_000),
        "shards of one byte": lambda: victim.hello(victim.manifest, **{"shard-bytes": 1}),
        "shards of 2 GiB": lambda: victim.hello(victim.manifest, **{"shard-bytes": 2**31}),
        "shard that was never announced": lambda: victim.refuse(
            "query.shard",
            build_content(
                {"bundle-digest": "ab" * 32, "shard-bytes": shard_bytes, "shard-index": 0, "shard-sha256": "cd" * 32},
                arrays=ArrayRecord(),
            ),
        ),
        "model config with code from a hub": lambda: victim.announce_config(auto_map={"AutoModel": "evil/repo--m.M"}),
        "model config of 4,000 blocks": lambda: victim.with_config(num_hidden_layers=4000),
        "model config of width 2^40": lambda: victim.announce_config(hidden_size=2**40),
        "model config of width 2^20": lambda: victim.with_config(hidden_size=2**20),
        "model config of 2^30 labels": lambda: victim.announce_config(num_labels=2**30),
        "pickle under a safetensors name": lambda: victim.altered_bundle("adapter.safetensors", pickle.dumps({"a": 1})),
        "safetensors header of 1 TB": lambda: victim.altered_bundle(
            "adapter.safetensors", (2**40).to_bytes(8, "little") + b"{}"
        ),
        "tensor beyond the end of its file": lambda: victim.altered_bundle("adapter.safetensors", far_tensor()),
        "tokenizer that is none": lambda: victim.altered_bundle(tokenizer, b'{"version": "1.0"}'),
        "batches of 2^40 examples": lambda: victim.train(settings={"train.batch-size": 2**40}),
        "examples of 2^40 tokens": lambda: victim.train(settings={"data.max-length": 2**40}),
        "2^40 passes over the data": lambda: victim.train(settings={"train.local-epochs": 2**40, "train.max-steps": 0}),
        "2^40 steps in a round": lambda: victim.train(settings={"train.local-epochs": 2**40, "train.max-steps": 2**40}),
        "2^40 rounds": lambda: victim.train(settings={"num-server-rounds": 2**40}),
        "a round beyond the last": lambda: victim.train(server_round=10**9),
        "LoRA of rank 2^40": lambda: victim.train(settings={"tuning.method": "lora", "tuning.lora-r": 2**40}),
        "prompt of 10 MB": lambda: victim.train(settings={"task.prompt": "{text}" + "x" * 10**7}),
        "unknown setting": lambda: victim.train(settings={"train.run-this": "rm"}),
        "app bundle that unpacks to 200 MB": read_bomb,
    }


def read_sparse_manifest(directory: Path) -> str:
    """Return why a manifest of 10 GB, in a directory that was brought out of band, is not read."""
    place = directory / "ten-gigabytes"
    place.mkdir(exist_ok=True)
    with (place / manifest_name).open("wb") as stream:
        stream.truncate(10 * 10**9)
    try:
        read_manifest(place)
    except OtFederatedError as error:
        return str(error)
    finally:
        shutil.rmtree(place)
    raise VictimError("it was read")


def far_tensor() -> bytes:
    """Return a safetensors file whose tensor lies beyond its end."""
    header = json.dumps({"top.0.a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


def read_bomb() -> str:
    """Return why an app bundle of a few hundred kilobytes that unpacks to 200 MB is refused."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", bytes(200 * 10**6))
    try:
        read_app_bundle(stream.getvalue())
    except OtFederatedError as error:
        return str(error)
    raise VictimError("it was unpacked")


def run_hostile_servers(victim: Victim) -> list[dict[str, Any]]:
    """Try every attack and return a row for each."""
    assert count_shards(victim.manifest, shard_bytes=shard_bytes) > 1
    rows = []
    for name, attack in list_attacks(victim).items():
        victim.cache.mkdir(parents=True, exist_ok=True)
        try:
            outcome, refused, detail = "refused", True, attack()
        except VictimError as error:
            outcome, refused, detail = "taken", False, str(error)
        shown = detail.replace(str(victim.directory.parent), "DIRECTORY")[:300]
        rows.append({"peer": "server", "attack": name, "outcome": outcome, "refused": refused, "detail": shown})
    return rows
