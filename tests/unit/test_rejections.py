"""Counting rejections, putting clients aside, and knowing them again when the run goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ot_federated.errors import CheckpointError
from strategies.rejections import Rejections


def test_a_client_is_put_aside_at_the_limit() -> None:
    rejections = Rejections(limit=2)
    assert not rejections.add(7, name="a", reason="not finite")
    assert not rejections.is_aside(7)
    assert rejections.add(7, name="a", reason="not finite")
    assert rejections.is_aside(7)
    assert not rejections.is_aside(8)
    assert rejections.names_aside() == ["a"]


def test_without_a_limit_nobody_is() -> None:
    rejections = Rejections(limit=0)
    assert not any(rejections.add(7, name="a", reason="x") for _ in range(50))


def saved_run() -> dict[str, Any]:
    kept: list[dict[str, Any]] = []
    rejections = Rejections(limit=1, on_change=kept.append)
    rejections.add(7, name="a", reason="not finite")
    assert kept == [rejections.to_json()]
    return json.loads(json.dumps(kept[-1]))


def test_a_resumed_run_knows_the_node() -> None:
    rejections = Rejections(limit=1, saved=saved_run())
    assert rejections.is_aside(7)
    # Another that has its name now is another.
    rejections.recognise({7: "", 9: "a"})
    assert not rejections.is_aside(9)


def test_a_resumed_simulation_knows_the_name() -> None:
    rejections = Rejections(limit=1, saved=saved_run())
    rejections.recognise({9: "a", 10: "b"})
    assert rejections.is_aside(9)
    assert not rejections.is_aside(10)


@pytest.mark.parametrize("names", [{9: "a", 10: "a"}, {9: "b"}])
def test_a_name_that_two_have_or_nobody_stands_for_nothing(names: dict[int, str]) -> None:
    rejections = Rejections(limit=1, saved=saved_run())
    rejections.recognise(names)
    assert not any(rejections.is_aside(node_id) for node_id in names)


def test_within_a_run_a_name_stands_for_nothing() -> None:
    """Else whoever takes an honest client's name, misbehaves and leaves would have that client put aside."""
    rejections = Rejections(limit=1)
    rejections.add(7, name="a", reason="not finite")
    rejections.recognise({9: "a"})
    assert not rejections.is_aside(9)


@pytest.mark.parametrize("saved", [{}, {"format": 2, "offenders": []}, {"format": 1, "offenders": [{"x": 1}]}])
def test_damaged_rejections(saved: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        Rejections(limit=1, saved=saved)
