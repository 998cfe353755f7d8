"""What is fuzzed: each parser of bytes that another party wrote, and inputs to begin with.

A target takes bytes and returns, or raises an error of this project: that is a refusal. Anything else that it raises
is a crash. Heavy imports stay inside the builders, so that one target pays for nothing that it does not use.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzzing import message_targets, model_targets
from tests.fuzzing.mutators import Mutator, mutate_json, mutate_records, mutate_safetensors, mutate_toml

Parser = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        build: Returns the parser; what it imports is instrumented.
        seeds: Returns valid inputs to begin with.
        share: Its part of all executions, relative to the other targets.
        max_bytes: Longest input that is tried.
        mutate: How inputs are altered; None for libFuzzer's own way.
    """

    build: Callable[[], Parser]
    seeds: Callable[[], Sequence[bytes]]
    share: float = 1.0
    max_bytes: int = 4096
    mutate: Mutator | None = None


def scratch_file(name: str) -> Path:
    """Return a path in a directory of this process's own, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="ot-fuzzing-", dir=memory if memory.is_dir() else None)) / name


def build_manifest_parser() -> Parser:
    from ot_federated.bundle import parse_manifest
    from ot_federated.bundle_shards import count_shards, shard_size

    def parse(data: bytes) -> None:
        manifest = parse_manifest(data)
        num_shards = count_shards(manifest, shard_bytes=65536)
        if num_shards:
            assert 0 < shard_size(manifest, num_shards - 1, shard_bytes=65536) <= 65536
        assert len(manifest.digest) == 64
        assert manifest.kept_blocks is not None

    return parse


def manifest_seeds() -> list[bytes]:
    from ot_federated.bundle import BundleFile
    from tests.bundles import build_manifest

    names = ("adapter.safetensors", "emulator.safetensors", "frozen.safetensors", "tokenizer.json")
    manifest = build_manifest(files=tuple(BundleFile(name, 10, "ab" * 32) for name in names))
    return [manifest.to_bytes(), json.dumps(json.loads(manifest.to_bytes())).encode()]


def build_config_parser() -> Parser:
    from ot_federated.config import flatten, parse_run_config

    def parse(data: bytes) -> None:
        try:
            flat = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(flat, dict):
            config = parse_run_config(flat)
            assert parse_run_config(flatten(config)) == config

    return parse


def config_seeds() -> list[bytes]:
    from ot_federated.config import RunConfig, flatten

    flat = flatten(RunConfig())
    label = {"task.name": "classification", "task.label-words": "a=terrible,b=great", "data.partitioner": "dirichlet"}
    private = {"privacy.mode": "client", "privacy.clients-per-round": 4, "privacy.target-delta": 0.01}
    small = [{key: flat[key]} for key in flat]
    return [json.dumps(item).encode() for item in (label, private, {"strategy.secure-aggregation": True}, *small)]


def build_policy_parser() -> Parser:
    from ot_federated.data_owner.policy import parse_policy

    return lambda data: parse_policy(data, place="policy.toml")


def policy_seeds() -> list[bytes]:
    return [
        b'format = 1\nmax-epsilon = 8.0\ndelta = 1e-5\nallowed-tasks = ["classification"]\nrequire-privacy = true\n',
        b'reply-fields = ["loss", "num-steps"]\nmax-rounds = 10\nmin-examples = 5\nmax-sample-rate = 0.1\n',
    ]


def _release(server_round: int):
    from ot_federated.data_owner.ledger_entries import Release

    return Release(
        run="r",
        server_round=server_round,
        client="c",
        noise_multiplier=1.0,
        sample_rate=0.1,
        num_steps=10,
        max_grad_norm=1.0,
        num_examples=100,
    )


def ledger_seeds() -> list[bytes]:
    from ot_federated.data_owner.ledger_entries import empty_head, encode_entry, parse_entries

    text, previous = b"", empty_head("data").sha256
    for number in (1, 2):
        text += encode_entry(
            _release(number), dataset_id="data", delta=1e-5, time="2030-01-01T00:00:00+00:00", previous=previous
        )
        previous = parse_entries(text, dataset_id="data", name="seed")[-1].sha256
    return [text, text.splitlines(keepends=True)[0]]


def build_ledger_parser() -> Parser:
    from ot_federated.data_owner.ledger_entries import empty_head, parse_entries
    from ot_federated.errors import OtFederatedError

    def parse(data: bytes) -> None:
        for lines in (data, _mend(data, empty_head("data").sha256)):
            try:
                entries = parse_entries(lines, dataset_id="data", name="ledger")
            except OtFederatedError:
                continue
            assert sum(entry.release.num_steps for entry in entries) >= 0

    return parse


def _mend(data: bytes, previous: str) -> bytes:
    """Give every line that is a JSON object the digests that it should carry: no fuzzer finds a SHA-256."""
    from ot_federated.data_owner.ledger_entries import _canonical, _hash

    mended = b""
    for line in data.splitlines():
        try:
            fields = json.loads(line)
            fields["previous"] = previous
            fields.pop("sha256", None)
            previous = _hash(fields)
            mended += _canonical({**fields, "sha256": previous}) + b"\n"
        except (ValueError, TypeError, AttributeError, RecursionError, IndexError):
            mended += line + b"\n"
    return mended


def build_anchor_parser() -> Parser:
    from ot_federated.data_owner.ledger_entries import parse_anchor

    return lambda data: parse_anchor(data, name="anchor")


def anchor_seeds() -> list[bytes]:
    from ot_federated.data_owner.ledger_entries import Head, encode_anchor

    return [encode_anchor(Head(3, "ab" * 32), dataset_id="data")]


def build_approved_parser() -> Parser:
    from ot_federated.data_owner.approved_code import parse_approvals

    def parse(data: bytes) -> None:
        for approval in parse_approvals(data, place="approved.json"):
            assert len(approval.sha256) == 64

    return parse


def approved_seeds() -> list[bytes]:
    entry = {"sha256": "ab" * 32, "name": "p/n", "version": "1", "num_differences": 0, "time": "2030-01-01"}
    return [json.dumps({"format": 1, "approved": [entry]}).encode(), b'{"format": 1, "approved": []}']


def build_trail_parser() -> Parser:
    from io import StringIO

    from ot_federated.data_owner.audit_trail import parse_trail

    return lambda data: list(parse_trail(StringIO(data.decode(errors="replace"), newline=None), place="trail.jsonl"))


def trail_seeds() -> list[bytes]:
    from dataclasses import asdict

    from ot_federated.data_owner.audit_trail import Entry, describe_content

    entry = Entry(
        message="train",
        client="c",
        flower_run="1",
        run="r",
        server_round=1,
        status="ok",
        reason="",
        content=describe_content({"config": {"status": "ok", "n": 3}}),
        guarantee=None,
    )
    return [json.dumps({"format": 1, **asdict(entry)}).encode() + b"\n"]


def build_app_bundle_parser() -> Parser:
    from ot_federated.data_owner.app_bundle import read_app_bundle

    return read_app_bundle


def app_bundle_seeds() -> list[bytes]:
    import zipfile

    from tests.app_bundles import pack, pyproject

    files: dict[str, bytes | str] = {"pyproject.toml": pyproject, "ot_federated/a.py": "x = 1\n"}
    return [pack(files), pack(files, compression=zipfile.ZIP_DEFLATED)]


def build_app_project_parser() -> Parser:
    """The ``pyproject.toml`` in an app bundle: behind the zip reader, past whose checksums no altered one comes."""
    from ot_federated.data_owner.app_bundle import parse_project

    return parse_project


def app_project_seeds() -> list[bytes]:
    from tests.app_bundles import pyproject

    return [pyproject.encode()]


# Shares are thousands of a run with 10 million executions in all. What comes over the network, before anyone trusts its
# sender, has most. Slow by nature: a whole conversation with its aggregation (train-reply), a file that is mapped
# (safetensors), and a hundred times slower, as transformers builds something from every input, the last two.
targets: dict[str, Target] = {
    "manifest": Target(build_manifest_parser, manifest_seeds, share=1000, mutate=mutate_json),
    "config": Target(build_config_parser, config_seeds, share=300, mutate=mutate_json),
    "policy": Target(build_policy_parser, policy_seeds, share=600, mutate=mutate_toml),
    "ledger": Target(build_ledger_parser, ledger_seeds, share=250, max_bytes=2048, mutate=mutate_json),
    "anchor": Target(build_anchor_parser, anchor_seeds, share=1000, max_bytes=512, mutate=mutate_json),
    "approved-list": Target(build_approved_parser, approved_seeds, share=600, mutate=mutate_json),
    "audit-trail": Target(build_trail_parser, trail_seeds, share=250, max_bytes=2048, mutate=mutate_json),
    "app-bundle": Target(build_app_bundle_parser, app_bundle_seeds, share=700),
    "app-project": Target(build_app_project_parser, app_project_seeds, share=600, mutate=mutate_toml),
    "hello-reply": Target(
        message_targets.build_hello_reply_parser, message_targets.hello_reply_seeds, share=2200, mutate=mutate_records
    ),
    "train-reply": Target(
        message_targets.build_train_reply_parser, message_targets.train_reply_seeds, share=200, mutate=mutate_records
    ),
    "train-request": Target(
        message_targets.build_train_request_parser,
        message_targets.train_reply_seeds,
        share=900,
        mutate=mutate_records,
    ),
    "shard": Target(message_targets.build_shard_parser, message_targets.shard_seeds, share=1200, mutate=mutate_records),
    "safetensors": Target(
        model_targets.build_safetensors_parser, model_targets.safetensors_seeds, share=200, mutate=mutate_safetensors
    ),
    "model-config": Target(model_targets.build_model_parser, model_targets.model_seeds, share=1, mutate=mutate_json),
    "tokenizer": Target(
        model_targets.build_tokenizer_parser, model_targets.tokenizer_seeds, share=0.3, mutate=mutate_json
    ),
}
