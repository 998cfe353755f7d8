"""A disk that is really full, wherever something is written: said, nothing half-written, and afterwards it goes on."""

from __future__ import annotations

import hashlib
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from ot_federated.bundle import manifest_name
from ot_federated.bundle_shards import read_shard
from ot_federated.cache import append_line, atomic_write_bytes
from ot_federated.data_owner.bundle_cache import BundleCache
from ot_federated.data_owner.bundle_import import import_bundle
from ot_federated.data_owner.privacy_ledger import PrivacyLedger
from ot_federated.errors import OtFederatedError
from ot_federated.logs import logger
from ot_federated.model_owner import results
from ot_federated.model_owner.checkpoints import load_latest_checkpoint, save_checkpoint
from ot_federated.model_owner.delivery import deliver_model
from ot_federated.model_owner.splitting import plan_stack, write_bundle
from ot_federated.reporting.run_directory import RunDirectory
from tests.bundles import write_random_bundle
from tests.families import build_family_model, byte_tokenizer
from tests.federations import is_train_reply, prepare_federation, run_federation, start
from tests.ledgers import delta, release
from tests.small_disks import SmallDisk, small_disk

Step = Callable[[], object]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=6) as mounted:
        yield mounted


def checkpoint_steps(root: Path, _tmp: Path) -> list[Step]:
    def save(number: int) -> None:
        adapter = {"top.0.weight": torch.full((200, 200), float(number))}
        memory = {"momentum": np.full(50_000, number, np.float32)}
        save_checkpoint(
            root / "checkpoints", server_round=number, bundle_digest="d", adapter=adapter, aggregator=memory
        )
        assert load_latest_checkpoint(root / "checkpoints").server_round == number

    return [lambda: save(1), lambda: save(2)]


def ledger_steps(root: Path, _tmp: Path) -> list[Step]:
    ledger = PrivacyLedger.open(root, dataset_id="ward-7")

    def spend(number: int) -> None:
        ledger.spend(release(number), budget_epsilon=math.inf, delta=delta)
        ledger.verify()

    return [lambda: spend(1), lambda: spend(2)]


def bundle_steps(root: Path, _tmp: Path) -> list[Step]:
    model = build_family_model("llama")
    stack = plan_stack(num_blocks=8, bottom=1, top=1, kept=[2, 3], bridged=False)

    def write() -> None:
        tokenizer = byte_tokenizer()
        write_bundle(root / "b", model=model, tokenizer=tokenizer, stack=stack, bridges={}, compression="uniform+empty")
        assert (root / "b" / manifest_name).exists()

    return [lambda: None, write]


def shard_steps(root: Path, tmp: Path) -> list[Step]:
    """The announcement fits; the disk fills before the second shard."""
    manifest = write_random_bundle(tmp / "source", sizes=(100_000, 250_000, 0))
    cache, size = BundleCache(root / "cache"), 2**17

    def store(index: int) -> None:
        data = read_shard(tmp / "source", manifest, index, shard_bytes=size)
        sha256 = hashlib.sha256(data).hexdigest()
        missing = cache.receive(manifest.digest, index, [data], shard_bytes=size, sha256=sha256)
        assert missing == list(range(index + 1, 3))

    def begin() -> None:
        assert cache.announce(manifest.digest, manifest.to_bytes(), shard_bytes=size) == [0, 1, 2]
        store(0)

    def go_on() -> None:
        for index in cache.announce(manifest.digest, manifest.to_bytes(), shard_bytes=size):
            store(index)
        assert cache.find(manifest.digest)

    return [begin, go_on]


def import_steps(root: Path, tmp: Path) -> list[Step]:
    manifest = write_random_bundle(tmp / "source", sizes=(100_000, 250_000, 0))
    cache = BundleCache(root / "cache")
    cache.reserve = lambda *_: None  # type: ignore[method-assign]  # which would see it coming

    def bring() -> None:
        import_bundle(cache, str(tmp / "source"), manifest.digest, manifest.to_bytes())
        assert cache.find(manifest.digest)

    return [cache.identify, bring]


def model_steps(root: Path, _tmp: Path) -> list[Step]:
    model = build_family_model("llama")

    def deliver() -> None:
        deliver_model(root / "m", model=model, tokenizer=byte_tokenizer(), adapter={}, stack=(), placement="both")
        assert (root / "m" / "model.safetensors").stat().st_size > 10_000

    return [deliver, deliver]


def metrics_steps(root: Path, _tmp: Path) -> list[Step]:
    run = RunDirectory(root)

    def note(number: int) -> None:
        run.append_metrics({"round": number, "text": "x" * 20_000})
        assert [line["round"] for line in run.read_metrics()] == list(range(1, number + 1))

    return [lambda: note(1), lambda: note(2)]


def trail_steps(root: Path, _tmp: Path) -> list[Step]:
    def add(number: int) -> None:
        append_line(root / "trail.jsonl", f"{number} " + "x" * 20_000)
        assert [line[0] for line in (root / "trail.jsonl").read_text().splitlines() if line[1:2] == " "][-1] == str(
            number
        )

    return [lambda: add(1), lambda: add(2)]


writers = [
    bundle_steps,
    shard_steps,
    import_steps,
    checkpoint_steps,
    ledger_steps,
    model_steps,
    metrics_steps,
    trail_steps,
]


@pytest.mark.parametrize(
    ("build", "left_bytes"),
    # With some space left, it is full in the middle of a file; an entry of the ledger still fits then.
    [*((build, 0) for build in writers), *((build, 8192) for build in writers if build is not ledger_steps)],
)
def test_said_and_nothing_half_written_and_it_goes_on(
    build: Callable[[Path, Path], list[Step]], left_bytes: int, disk: SmallDisk, tmp_path: Path
) -> None:
    first, second = build(disk.path, tmp_path)
    first()
    before = disk.files()
    disk.fill(left_bytes=left_bytes)
    with pytest.raises(OtFederatedError, match="(?s)disk is full|MB free"):
        second()
    after = disk.files()
    # What was whole is as it was, and nothing new is there that looks whole. A shard without its mark counts as
    # missing, and a torn line of the trail stays a line of its own.
    growing = {name for name in before if "/bundle/" in name or name == "trail.jsonl"}
    assert {name: after[name] for name in before if name not in growing} == {
        name: before[name] for name in before if name not in growing
    }
    assert all(after[name].startswith(before[name][:1000]) for name in growing)
    assert {name for name in after.keys() - before.keys() if "/bundle/" not in name and after[name]} == set()
    assert not [path for path in disk.path.rglob("*.partial") if path.is_dir()]
    disk.free()
    second()


def test_a_run_whose_disk_fills_goes_on_to_the_same_end(
    disk: SmallDisk, llama_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It fills while round 2 trains, so that neither its metrics nor its checkpoint nor the reason can be written."""
    settings = {"num-server-rounds": 2, "evaluation.max-examples": 1, "evaluation.max-validation-examples": 1}
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings)
    settings["output-dir"] = str(disk.path / "run")

    def fill(reply: Message) -> list[Message]:
        if is_train_reply(reply, server_round=2):
            disk.fill()
        return [reply]

    with caplog.at_level(logging.ERROR, logger=logger.name), pytest.raises(OtFederatedError, match="disk is full"):
        start(prepare_federation(tmp_path / "cut", llama_directory, settings=settings, on_reply=fill))
    assert not list((disk.path / "run").rglob("*.partial"))
    disk.free()
    settings["resume"] = True
    resumed = run_federation(tmp_path / "cut", llama_directory, settings=settings)
    assert resumed.grid.num_messages["train"] == 2  # of round 2 alone
    assert resumed.digest == whole.digest
    assert sorted(resumed.rounds) == [0, 1, 2]


def test_a_disk_that_fills_at_delivery(
    disk: SmallDisk, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"evaluation.max-examples": 1, "evaluation.max-validation-examples": 1}
    settings["output-dir"] = str(disk.path / "run")
    deliver = results.deliver_model

    def fill(*args: Any, **kwargs: Any) -> None:
        disk.fill(left_bytes=16384)
        deliver(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(results, "deliver_model", fill)
        with pytest.raises(OtFederatedError, match="disk is full"):
            run_federation(tmp_path / "cut", llama_directory, settings=settings)
    assert not (disk.path / "run" / "model").exists()
    assert not (disk.path / "run" / "summary.json").exists()
    disk.free()
    resumed = run_federation(tmp_path / "cut", llama_directory, settings=settings | {"resume": True})
    assert resumed.grid.num_messages["train"] == 0
    assert (disk.path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ulimit")
def test_a_limit_on_the_size_of_files_is_said_too(tmp_path: Path) -> None:
    """Needs no root: what ``ulimit -f`` does to a process."""
    code = (
        "import resource, sys, pathlib\nfrom ot_federated.cache import atomic_write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from ot_federated.errors import OtFederatedError\n"
        "try:\n    atomic_write_bytes(pathlib.Path(sys.argv[1]), b'x' * 10000)\n"
        "except OtFederatedError as error:\n    print(error)\n"
    )
    target = tmp_path / "file"
    atomic_write_bytes(target, b"before")
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert "disk is full or over quota" in done.stdout
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]
