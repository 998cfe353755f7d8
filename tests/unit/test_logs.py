"""The two forms of log lines."""

from __future__ import annotations

import json
import logging

import pytest

from ot_federated.errors import ConfigError
from ot_federated.logs import log_fields, logger, show_lines


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Flower's logger with a handler of its own, so that the real one keeps its form."""
    own = logging.getLogger("flwr")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("flower says %(message)s"))
    monkeypatch.setattr(own, "handlers", [handler])
    return own


def test_text_lines_have_time_and_message_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flower: logging.Logger
) -> None:
    monkeypatch.delenv("OT_FEDERATED_LOG", raising=False)
    show_lines()
    with log_fields(run="7", round=2):
        logger.info("round %d of %s", 2, "ward-7")
    flower.info("hello")
    ours = capsys.readouterr().err.splitlines()[0]
    time, message = ours.split("  ")
    assert message == "round 2 of ward-7"
    assert len(time) == len("12:00:00")
    assert isinstance(flower.handlers[0].formatter, logging.Formatter)
    assert flower.handlers[0].format(logging.makeLogRecord({"msg": "hello"})) == "flower says hello"


def test_json_lines_have_run_round_and_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flower: logging.Logger
) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "json")
    show_lines()
    logger.info("before")
    with log_fields(run="7", node="ward-7"):
        with log_fields(round=2):
            logger.warning('a "quoted" %s\nline', "näme")
        logger.info("after")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.keys() == {"time", "level", "message"}
    assert {key: second[key] for key in second if key != "time"} == {
        "level": "warning",
        "message": 'a "quoted" näme\nline',
        "run": "7",
        "node": "ward-7",
        "round": 2,
    }
    assert second["time"].endswith("+00:00")
    assert third.keys() == {"time", "level", "message", "run", "node"}
    # Flower's own lines too: who collects JSON can read every line.
    shown = flower.handlers[0].format(logging.makeLogRecord({"msg": "hello", "levelname": "INFO"}))
    assert json.loads(shown)["message"] == "hello"


def test_json_lines_carry_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "json")
    show_lines()
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["message"] == "it failed"
    assert "ValueError: broken" in line["traceback"]


def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "jsonl")
    with pytest.raises(ConfigError, match=r"OT_FEDERATED_LOG='jsonl' is not one of text, json \(did you mean 'json'"):
        show_lines()
