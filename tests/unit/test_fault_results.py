"""The file of fault results: each command replaces its own part and nothing else."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simulations.benchmarks.fault_results import parts, update_results


def test_a_part_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    update_results("schedules", [{"seed": 0}], command="first", path=path)
    update_results("fuzzing", [{"target": "manifest"}], command="second", path=path)
    update_results("schedules", [{"seed": 1}], command="third", path=path)
    document = json.loads(path.read_text())
    assert document["schedules"] == [{"seed": 1}]
    assert document["fuzzing"] == [{"target": "manifest"}]
    assert document["command"] == "third; second"
    assert document["measured"]["fuzzing"]["command"] == "second"
    assert document["versions"]["flwr"]
    assert document["hardware"]["cores"] > 0


def test_commands_that_end_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: update_results(part, [part], command=part, path=path), parts))
    document = json.loads(path.read_text())
    assert {part: document[part] for part in parts} == {part: [part] for part in parts}


@pytest.mark.parametrize(("part", "value"), [("schedule", []), ("schedules", [math.nan])])
def test_what_does_not_belong_there_is_refused_and_the_file_stays(tmp_path: Path, part: str, value: object) -> None:
    path = tmp_path / "faults.json"
    update_results("schedules", [1], command="c", path=path)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"no part 'schedule'|not JSON compliant"):
        update_results(part, value, command="c", path=path)
    assert path.read_text() == before
