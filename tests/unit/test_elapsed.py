"""The seconds of a run that took more than one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ot_federated.errors import CheckpointError
from ot_federated.reporting import elapsed
from ot_federated.reporting.elapsed import Elapsed
from ot_federated.reporting.run_directory import RunDirectory, seconds_file


class Clock:
    """Stands in for ``time``."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(elapsed, "time", clock)
    return clock


def test_processes_add_up(tmp_path: Path, clock: Clock) -> None:
    run = RunDirectory(tmp_path)
    killed = Elapsed(run, resume=False)
    clock.now += 3
    killed.end_setup()
    clock.now += 10
    run.append_metrics({"round": 1})
    clock.now += 50  # done again by the next process
    again = RunDirectory(tmp_path)
    stopped = Elapsed(again, resume=True)
    clock.now += 2
    with pytest.raises(KeyboardInterrupt), stopped:
        raise KeyboardInterrupt
    clock.now += 1000  # nothing runs
    with Elapsed(RunDirectory(tmp_path), resume=True) as last:
        clock.now += 4
        last.end_setup()
        clock.now += 5
        assert (last.setup(), last.total()) == (3 + 2 + 4, 13 + 2 + 9)
    with Elapsed(RunDirectory(tmp_path), resume=True) as finished:
        assert finished.total() == 24


def test_another_run_begins_at_nothing(tmp_path: Path, clock: Clock) -> None:
    with Elapsed(RunDirectory(tmp_path), resume=False):
        clock.now += 7
    assert Elapsed(RunDirectory(tmp_path), resume=False).total() == 0


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZeroDivisionError), Elapsed(RunDirectory(tmp_path / "file"), resume=False):
        raise ZeroDivisionError


@pytest.mark.parametrize("text", ["{", "[7]", '[{"setup": 1}]', "7"])
def test_damaged_seconds(text: str, tmp_path: Path) -> None:
    (tmp_path / seconds_file).write_text(text)
    with pytest.raises(CheckpointError, match="Delete it to go on"):
        Elapsed(RunDirectory(tmp_path), resume=True)
