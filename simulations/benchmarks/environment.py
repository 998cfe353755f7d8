"""What a figure was measured with, and the result file that keeps it beside the command."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ot_federated.cache import atomic_write_text

packages = (
    "ot-federated",
    "flwr",
    "ray",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results; ``absent`` for what is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def hardware() -> dict[str, str | int]:
    """Return processor, cores, threads, memory in GiB, and the GPU's name where there is one."""
    import psutil
    import torch

    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_results(path: Path | str, *, command: str, **content: Any) -> None:
    """Write a result file, whole or not at all: command, versions and hardware first, then ``content``.

    Args:
        path: The file, in ``simulations/results/`` by custom.
        command: What to type to get the figures again.
        content: The figures: anything JSON can hold. Infinite and undefined numbers it cannot: give None.

    Raises:
        ValueError: If ``content`` holds an infinite or undefined number.
        OtFederatedError: If the disk is full or the directory may not be written.
    """
    document = {"command": command, "versions": versions(), "hardware": hardware(), **content}
    atomic_write_text(Path(path), json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """Return the processor's name; ``platform`` does not know it on Linux."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
