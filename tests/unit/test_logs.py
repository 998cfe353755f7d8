"""The two forms of log lines."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from flwr.supercore.logger import ConsoleHandler

from ot_federated.errors import ConfigError
from ot_federated.logs import log_fields, logger, show_lines


def flowers_logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Return Flower's logger with a handler of this test's own, so that the real one keeps its form."""
    own = logging.getLogger("flwr")
    monkeypatch.setattr(own, "handlers", [ConsoleHandler(colored=False, stream=sys.stderr)])
    return own


def test_text_lines_have_time_and_message_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OT_FEDERATED_LOG", raising=False)
    flower = flowers_logger(monkeypatch)
    show_lines()
    with log_fields(run="7", round=2):
        logger.info("round %d of %s", 2, "ward-7")
    flower.info("hello")
    ours, flowers = capsys.readouterr().err.splitlines()
    time, message = ours.split("  ")
    assert message == "round 2 of ward-7"
    assert len(time) == len("12:00:00")
    assert flowers.split() == ["INFO", ":", "hello"]


def test_json_lines_have_run_round_and_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "json")
    flower = flowers_logger(monkeypatch)
    show_lines()
    logger.info("before")
    with log_fields(run="7", node="ward-7"):
        with log_fields(round=1), log_fields(round=2):
            logger.warning('a "quoted" %s\nline', "näme")
        logger.info("after")
    # Flower's own lines too: who collects JSON can read every line.
    flower.info("hello")
    flower.info("")
    first, second, third, flowers = map(json.loads, capsys.readouterr().err.splitlines())
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
    assert flowers["message"] == "hello"


def test_json_lines_carry_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "json")
    flowers_logger(monkeypatch)
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
