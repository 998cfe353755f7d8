"""What stands beside every measured figure."""

from __future__ import annotations

import json
import math

import pytest

from simulations.benchmarks.environment import hardware, versions, write_results


def test_a_result_file_says_how_it_was_made(tmp_path):
    write_results(tmp_path / "results" / "speed.json", command="python -m speed", cells=[{"seconds": 1.5}])
    found = json.loads((tmp_path / "results" / "speed.json").read_text())
    assert list(found) == ["command", "versions", "hardware", "cells"]
    assert found["command"] == "python -m speed"
    assert found["versions"] == versions()
    assert found["versions"]["torch"][0].isdigit()
    assert found["hardware"] == hardware()
    assert found["hardware"]["cores"] >= 1
    assert found["cells"] == [{"seconds": 1.5}]


def test_a_number_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "speed.json"
    write_results(path, command="first")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(path, command="second", seconds=math.nan)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
