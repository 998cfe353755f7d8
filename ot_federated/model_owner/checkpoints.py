"""Checkpoints: one directory a round, written whole or not at all, bound to its run.

::

    checkpoints/round-0003/
        adapter.safetensors    the aggregated adapter, fp32, role names
        aggregator.safetensors what the aggregator remembers (momenta)
        state.json             round, bundle digest, digests of the two files
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from ot_federated.cache import atomic_directory, file_sha256
from ot_federated.errors import CheckpointError

format_version = 1
num_kept = 2
_files = ("adapter.safetensors", "aggregator.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round."""

    server_round: int
    bundle_digest: str
    adapter: dict[str, torch.Tensor]
    aggregator: dict[str, np.ndarray]


def save_checkpoint(
    directory: Path,
    *,
    server_round: int,
    bundle_digest: str,
    adapter: Mapping[str, torch.Tensor],
    aggregator: Mapping[str, np.ndarray],
) -> Path:
    """Write the checkpoint of a round into ``directory`` and drop all but the last two.

    Raises:
        OtFederatedError: If the disk is full; the earlier checkpoints stay.
    """
    target = directory / f"round-{server_round:04d}"
    shutil.rmtree(target, ignore_errors=True)
    with atomic_directory(target) as partial:
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, partial / _files[0])
        save_numpy({name: np.ascontiguousarray(array) for name, array in aggregator.items()}, partial / _files[1])
        state = {
            "format": format_version,
            "round": server_round,
            "bundle_digest": bundle_digest,
            "files": {name: file_sha256(partial / name) for name in _files},
        }
        (partial / "state.json").write_text(json.dumps(state, indent=2))
    for old in list_checkpoints(directory)[:-num_kept]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"round-\d{4,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def load_latest_checkpoint(directory: Path) -> Checkpoint | None:
    """Return the last checkpoint, or None where there is none.

    Raises:
        CheckpointError: If it is damaged or of another format; it is never skipped in silence, because the run
            would then go on from another state than its owner believes.
    """
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        return None
    path = checkpoints[-1]
    try:
        state = json.loads((path / "state.json").read_text())
        if state["format"] != format_version:
            raise CheckpointError(
                f"{path} has format {state['format']!r}; this version reads {format_version}. Go on with the release "
                "of ot-federated that began the run, or start a new run."
            )
        for name in _files:
            if file_sha256(path / name) != state["files"][name]:
                raise CheckpointError(
                    f"{path / name} does not have the digest that was saved with it. Delete {path} to continue from "
                    "the checkpoint before it."
                )
        return Checkpoint(
            server_round=int(state["round"]),
            bundle_digest=str(state["bundle_digest"]),
            adapter=load_file(path / _files[0]),
            aggregator=load_numpy(path / _files[1]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Delete it to continue from the one before it."
        ) from error
