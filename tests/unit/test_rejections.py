"""Counting rejections, putting clients aside, and knowing them again when the run goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ot_federated.errors import CheckpointError
from strategies.rejections import Rejections


def test_a_client_is_put_aside_at_the_limit() -> None:
    rejections = Rejections(limit=2)
    assert not rejections.add(7, name="a", reason="not finite", server_round=1)
    assert not rejections.is_aside(7)
    assert rejections.add(7, name="a", reason="not finite", server_round=1)
    assert rejections.is_aside(7)
    assert not rejections.is_aside(8)
    assert rejections.names_aside() == ["a"]


def test_without_a_limit_nobody_is() -> None:
    rejections = Rejections(limit=0)
    assert not any(rejections.add(7, name="a", reason="x", server_round=1) for _ in range(50))


def saved_run() -> dict[str, Any]:
    kept: list[dict[str, Any]] = []
    rejections = Rejections(limit=1, on_change=kept.append)
    rejections.add(7, name="a", reason="not finite", server_round=1)
    assert kept == [rejections.to_json()]
    return json.loads(json.dumps(kept[-1]))


def test_a_resumed_run_knows_the_node() -> None:
    rejections = Rejections(limit=1, saved=saved_run(), last_round=1)
    assert rejections.is_aside(7)
    # Another that has its name now is another.
    rejections.recognise({7: "", 9: "a"})
    assert not rejections.is_aside(9)


def test_a_resumed_simulation_knows_the_name() -> None:
    rejections = Rejections(limit=1, saved=saved_run(), last_round=1)
    rejections.recognise({9: "a", 10: "b"})
    assert rejections.is_aside(9)
    assert not rejections.is_aside(10)


@pytest.mark.parametrize("names", [{9: "a", 10: "a"}, {9: "b"}])
def test_a_name_that_two_have_or_nobody_stands_for_nothing(names: dict[int, str]) -> None:
    rejections = Rejections(limit=1, saved=saved_run(), last_round=1)
    rejections.recognise(names)
    assert not any(rejections.is_aside(node_id) for node_id in names)


def test_within_a_run_a_name_stands_for_nothing() -> None:
    """Else whoever takes an honest client's name, misbehaves and leaves would have that client put aside."""
    rejections = Rejections(limit=1)
    rejections.add(7, name="a", reason="not finite", server_round=1)
    rejections.recognise({9: "a"})
    assert not rejections.is_aside(9)


@pytest.mark.parametrize("saved", [{}, {"format": 1, "offenders": []}, {"format": 2, "offenders": [{"x": 1}]}])
def test_damaged_rejections(saved: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        Rejections(limit=1, saved=saved)


def test_rounds_that_are_done_again_are_not_counted_twice() -> None:
    kept: list[dict[str, Any]] = []
    rejections = Rejections(limit=3, on_change=kept.append)
    for server_round, node_id in ((1, 7), (2, 7), (3, 7), (3, 8)):
        rejections.add(node_id, name=f"client {node_id}", reason=f"bad {server_round}", server_round=server_round)
    assert rejections.is_aside(7)
    saved, kept[:] = json.loads(json.dumps(kept[-1])), []
    resumed = Rejections(limit=3, saved=saved, last_round=2, on_change=kept.append)
    assert resumed.offenders.keys() == {7}
    assert (resumed.offenders[7].rounds, resumed.offenders[7].reasons) == ([1, 2], ["bad 1", "bad 2"])
    assert not resumed.is_aside(7)
    # At once on the disk: a second crash, after the next checkpoint, must not bring them back.
    assert kept == [resumed.to_json()]
    assert Rejections(limit=3, saved=kept[0], last_round=3).to_json() == kept[0]


def test_a_round_that_failed_for_good_counts() -> None:
    """Else a client whose replies make every round fail would never be put aside."""
    kept: list[dict[str, Any]] = []
    for attempt in (1, 2):
        rejections = Rejections(limit=2, saved=kept[-1] if kept else None, last_round=4, on_change=kept.append)
        assert not rejections.is_aside(7)
        rejections.add(7, name="a", reason="not finite", server_round=5)
        rejections.keep(5)
        assert kept[-1] == rejections.to_json()
        assert rejections.offenders[7].num_rejections == attempt
    assert Rejections(limit=2, saved=kept[-1], last_round=4).is_aside(7)
