"""Bundles of random bytes: for what moves, keeps and checks files without looking into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ot_federated.bundle import Manifest, StackEntry, describe_files, manifest_name, weight_files

stack = (
    StackEntry("bottom", 0, 0, 0),
    StackEntry("bridge", 0, 1, 1),
    StackEntry("emulator", 0, 2, 2),
    StackEntry("top", 0, 3, 3),
)


def build_manifest(**fields: Any) -> Manifest:
    """Return a manifest that is valid except for what ``fields`` say."""
    valid: dict[str, Any] = {
        "model_type": "llama",
        "config": {"num_hidden_layers": 4},
        "dtype": "float32",
        "num_blocks": 4,
        "stack": stack,
        "compression": "uniform+bridge",
        "exact_weight_fraction": 0.5,
        "middle_bytes": 10,
        "files": (),
        "versions": {"torch": "1"},
    }
    return Manifest(**(valid | fields))


def write_random_bundle(
    directory: Path, *, sizes: tuple[int, int, int] = (1000, 2500, 0), others: Mapping[str, int] | None = None
) -> Manifest:
    """Write files of random bytes and their manifest; ``sizes`` are those of the weight files."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(sum(sizes))
    for name, size in [*zip(weight_files, sizes, strict=True), *(others or {"tokenizer.json": 300}).items()]:
        (directory / name).write_bytes(rng.bytes(size))
    manifest = build_manifest(files=describe_files(directory))
    (directory / manifest_name).write_bytes(manifest.to_bytes())
    return manifest
