"""kill -9 in the middle of a real run on Ray, then resume: the adapter must be the one of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.families import save_family_model
from tests.federations import build_questions, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
root = Path(__file__).parents[2]


def command(directory: Path, output: str, *settings: str) -> list[str]:
    return [sys.executable, str(root / "run_sim.py"), *settings, "--output", str(directory / output)]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    model = save_family_model(tmp_path / "model")
    data = write_rows(tmp_path / "questions.jsonl", build_questions(64))
    return [
        *(f"data.{part}={data}" for part in ("train", "validation", "test")),
        f"model.source={model}",
        "model.dtype=float32",
        "num-clients=3",
        "num-server-rounds=5",
        "strategy.name=fedadam",
        "offsite.bottom-blocks=1",
        "offsite.emulator-blocks=2",
        "offsite.top-blocks=1",
        "offsite.keep=uniform",
        "offsite.gaps=empty",
        "train.batch-size=2",
        "evaluation.max-examples=8",
        "evaluation.max-validation-examples=8",
    ]


def wait_for(path: Path, process: subprocess.Popen[bytes], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_killed_and_resumed_ends_in_the_same_adapter(tmp_path: Path, settings: list[str]) -> None:
    subprocess.run(command(tmp_path, "whole", *settings), check=True, timeout=240)
    with subprocess.Popen(command(tmp_path, "broken", *settings)) as process:
        wait_for(tmp_path / "broken/checkpoints/round-0002/state.json", process, seconds=200)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "broken/summary.json").exists()
    # The settings need not be typed again.
    subprocess.run(command(tmp_path, "broken", "resume=true"), check=True, timeout=240)
    whole, broken = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    assert broken["adapter_sha256"] == whole["adapter_sha256"]
    assert broken["rows"] == whole["rows"]
    assert broken["federation"]["num_rounds"] == whole["federation"]["num_rounds"] == 5
    assert broken["federation"]["engine"] == "ray"
