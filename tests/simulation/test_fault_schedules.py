"""Schedules of faults with processes that are really killed end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.faults.schedules import draw_schedule, server_stages, stage_schedules
from simulations.faults.server import count_updates


def play(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Play in a process of its own: one that has trained cannot be forked any more."""
    output = tmp_path / "faults.json"
    command = [sys.executable, "-m", "simulations.faults", "--jobs", "2", "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(output.read_text())["stages" if "--stages" in arguments else "schedules"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="schedules fork processes")
def test_a_few_seeds(tmp_path: Path) -> None:
    outcomes = play(tmp_path, "--schedules", "3", "--first-seed", "16")
    assert [outcome["seed"] for outcome in outcomes] == [16, 17, 18]
    assert all(outcome["correct"] for outcome in outcomes)
    assert sum(len(outcome["events"]) for outcome in outcomes) > 3
    assert sum(outcome["server_killed"] for outcome in outcomes) > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="schedules fork processes")
def test_the_server_dies_at_every_stage(tmp_path: Path) -> None:
    outcomes = play(tmp_path, "--stages")
    assert len(outcomes) == 2 * len(server_stages)
    for outcome in outcomes:
        assert outcome["correct"], outcome
        assert outcome["server_killed"] == 1, outcome
        assert not outcome["not_reached"]


def test_a_seed_gives_the_same_faults_and_other_seeds_others() -> None:
    assert draw_schedule(7) == draw_schedule(7)
    assert len({draw_schedule(seed).faults for seed in range(50)}) == 50
    kinds = {fault.what for seed in range(50) for fault in draw_schedule(seed).faults}
    assert len(kinds) == 13  # all there are
    assert {str(schedule.faults[0]) for schedule in stage_schedules()} >= {
        "server killed before prepare",
        "server killed after checkpoint of round 2",
    }


def test_lost_and_doubled_updates_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "aggregated.jsonl"
    lines = [
        {"round": 1, "updates": [["a", "1"], ["b", "2"]]},
        {"round": 2, "updates": [["a", "3"], ["b", "4"]]},
        {"round": 2, "updates": [["a", "3"], ["a", "3"]]},  # done again: this one counts
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert count_updates(path, names=["a", "b"], num_rounds=2) == (1, 1)
    assert count_updates(path, names=["a", "b"], num_rounds=3) == (3, 1)
