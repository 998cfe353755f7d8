"""The settings and the data of runs in which only the machinery matters; their model is :mod:`.small_model`'s."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ot_federated.config import RunConfig, flatten
from ot_federated.settings import Scalar


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as lines of JSON and return the file; directories that are missing are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_questions(num: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return questions of different lengths with three choices each."""
    return [
        {"question": f"What is {i}?" + " Say." * (i % 4), "choices": ["one", "two", "three"], "answer": i % 3}
        for i in range(start, start + num)
    ]


def small_settings(model: Path, *, data: Path, output: Path) -> dict[str, Scalar]:
    """Return a whole run config for a small model: one round, a 1-2-1 split, gaps empty, fp32, four test rows."""
    return flatten(RunConfig()) | {
        "num-server-rounds": 1,
        "output-dir": str(output),
        "model.source": str(model),
        "model.dtype": "float32",
        "data.train": str(data),
        "data.validation": str(data),
        "data.test": str(data),
        "offsite.bottom-blocks": 1,
        "offsite.emulator-blocks": 2,
        "offsite.top-blocks": 1,
        "offsite.keep": "uniform",
        "offsite.gaps": "empty",
        "train.batch-size": 4,
        "train.learning-rate": 1e-3,
        "strategy.min-nodes": 2,
        "strategy.node-timeout-seconds": 5.0,
        "strategy.round-timeout-seconds": 60.0,
        "strategy.shard-bytes": 65536,
        "evaluation.max-examples": 4,
        "evaluation.max-validation-examples": 4,
    }
