"""Checkpoints: what was saved comes back, what was damaged is never used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ot_federated.errors import CheckpointError, OtFederatedError
from ot_federated.model_owner.checkpoints import (
    format_version,
    list_checkpoints,
    load_latest_checkpoint,
    save_checkpoint,
)

digest = "ab" * 32
adapter = {"top.0.w": torch.tensor([[1.0, -2.5], [float(np.float32(1e-30)), 3.0]]), "bottom.0.b": torch.arange(3.0)}
aggregator = {"m_t/top.0.w": np.array([[0.5, 1e-300], [2.0, 3.0]]), "v_t/x": np.zeros((0, 2), np.float32)}


def save(directory: Path, server_round: int, *, scale: float = 1.0) -> Path:
    return save_checkpoint(
        directory,
        server_round=server_round,
        bundle_digest=digest,
        adapter={name: tensor * scale for name, tensor in adapter.items()},
        aggregator=aggregator,
    )


def test_restored_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.server_round == 3
    assert checkpoint.bundle_digest == digest
    assert checkpoint.adapter.keys() == adapter.keys()
    assert all(torch.equal(checkpoint.adapter[name], tensor) for name, tensor in adapter.items())
    assert checkpoint.aggregator.keys() == aggregator.keys()
    for name, array in aggregator.items():
        assert checkpoint.aggregator[name].dtype == array.dtype
        np.testing.assert_array_equal(checkpoint.aggregator[name], array)


def test_an_aggregator_without_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, server_round=1, bundle_digest=digest, adapter=adapter, aggregator={})
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.aggregator == {}


def test_views_are_saved_as_what_they_show(tmp_path: Path) -> None:
    transposed = torch.arange(6.0).view(2, 3).T
    state = {"m": np.arange(6.0).reshape(2, 3).T}
    save_checkpoint(tmp_path, server_round=1, bundle_digest=digest, adapter={"w": transposed}, aggregator=state)
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert torch.equal(checkpoint.adapter["w"], transposed)
    np.testing.assert_array_equal(checkpoint.aggregator["m"], state["m"])


def test_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest_checkpoint(tmp_path) is None
    assert load_latest_checkpoint(tmp_path / "nowhere") is None


def test_the_last_two_are_kept_and_the_last_is_loaded(tmp_path: Path) -> None:
    for server_round in range(1, 6):
        save(tmp_path, server_round, scale=server_round)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-0004", "round-0005"]
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.server_round == 5
    assert torch.equal(checkpoint.adapter["top.0.w"], adapter["top.0.w"] * 5)


def test_order_is_that_of_the_rounds_whatever_their_digits(tmp_path: Path) -> None:
    for server_round in (9998, 9999, 10000):
        save(tmp_path, server_round)
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.server_round == 10000


def test_a_round_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, scale=2.0)
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert torch.equal(checkpoint.adapter["bottom.0.b"], adapter["bottom.0.b"] * 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_state(path: Path, **fields: object) -> None:
    state = path / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | fields))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: flip_a_bit(path / "adapter.safetensors"), id="adapter altered"),
        pytest.param(lambda path: flip_a_bit(path / "aggregator.safetensors"), id="aggregator altered"),
        pytest.param(lambda path: (path / "adapter.safetensors").unlink(), id="adapter missing"),
        pytest.param(lambda path: (path / "adapter.safetensors").write_bytes(b""), id="adapter empty"),
        pytest.param(lambda path: (path / "state.json").unlink(), id="state missing"),
        pytest.param(lambda path: (path / "state.json").write_text('{"format": 1'), id="state cut off"),
        pytest.param(lambda path: (path / "state.json").write_bytes(b"\xff\x00"), id="state is no text"),
        pytest.param(lambda path: (path / "state.json").write_text("{}"), id="state empty"),
        pytest.param(lambda path: (path / "state.json").write_text("[]"), id="state is a list"),
        pytest.param(lambda path: change_state(path, files=[]), id="files are a list"),
        pytest.param(lambda path: change_state(path, files={}), id="no digests"),
        pytest.param(lambda path: change_state(path, round="three"), id="round is a word"),
    ],
)
def test_damage_is_an_error_that_names_the_checkpoint(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path)
    # Never skipped in silence: the run would go on from another state than its owner believes.
    with pytest.raises(CheckpointError, match="round-0002"):
        load_latest_checkpoint(tmp_path)


def test_the_remedy_works(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    flip_a_bit(path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"Delete .* to continue from the checkpoint before it"):
        load_latest_checkpoint(tmp_path)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.server_round == 1


def test_other_format_names_both(tmp_path: Path) -> None:
    change_state(save(tmp_path, 1), format=format_version + 1)
    with pytest.raises(
        CheckpointError, match=rf"format {format_version + 1}; this version reads {format_version}\..*start a new run"
    ):
        load_latest_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("round-1", "round-0001x", "notes", ".round-0009.abcd.partial"):
        (tmp_path / name).mkdir()
    for server_round in (1, 2, 3):
        save(tmp_path, server_round)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round-0002", "round-0003"]
    assert (tmp_path / "notes").is_dir()


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OtFederatedError, match=r"disk is full.*Free some space"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["round-0001"]
    checkpoint = load_latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.server_round == 1
