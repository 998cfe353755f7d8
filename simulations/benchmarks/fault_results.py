"""The file that keeps what faults, hostile peers, poisoning and fuzzing came to: ``simulations/results/faults.json``.

Several commands fill it, each its own part; the others' parts stay as they are, also when two commands end together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text, file_lock
from simulations.benchmarks.environment import hardware, versions

results = Path(__file__).parent.parent / "results" / "faults.json"
parts = ("schedules", "stages", "hostile", "poisoning", "fuzzing", "processes")


def read_part(part: str, *, path: Path = results) -> Any:
    """Return one part of the file; None where it is not there yet."""
    return json.loads(path.read_text()).get(part) if path.is_file() else None


def update_results(part: str, value: Any, *, command: str, path: Path = results) -> None:
    """Put one part into the file, whole or not at all; every other part stays.

    Args:
        part: One of ``parts``.
        value: Its content: anything JSON can hold, without infinite or undefined numbers.
        command: What to type to get it again.
        path: The file.

    Raises:
        ValueError: If there is no such part, or ``value`` holds an infinite or undefined number.
        OtFederatedError: If the disk is full or the directory may not be written.
    """
    if part not in parts:
        raise ValueError(f"faults.json has no part {part!r}, only {', '.join(parts)}.")
    with file_lock(path.with_name(f".{path.name}.lock")):
        before = json.loads(path.read_text()) if path.is_file() else {}
        found, machine = versions(), hardware()
        measured = before.get("measured", {}) | {part: {"command": command, "versions": found, "hardware": machine}}
        document = {
            "command": "; ".join(measured[name]["command"] for name in parts if name in measured),
            "versions": found,
            "hardware": machine,
            **{name: value if name == part else before[name] for name in parts if name == part or name in before},
            "measured": measured,
        }
        atomic_write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
