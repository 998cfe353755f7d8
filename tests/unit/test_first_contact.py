from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ot_federated import health
from ot_federated.certificates import make_authority
from ot_federated.data_owner import doctor
from ot_federated.data_owner.approved_supernode import check_options
from ot_federated.data_owner.first_contact import look_at_connection


def test_without_tls_or_address_nothing_is_looked_at() -> None:
    assert look_at_connection("127.0.0.1:1", None) == []
    assert look_at_connection("", Path("ca.crt")) == []


def test_what_is_not_well_is_told_with_its_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_authority(tmp_path)
    with caplog.at_level(logging.WARNING, logger="ot_federated"):
        # Port 1 is nobody's.
        (finding,) = look_at_connection("127.0.0.1:1", tmp_path / "ca.crt")
    assert finding.level == "error"
    assert "Check that nginx runs there" in caplog.text


def test_an_address_that_is_none_keeps_nothing_from_starting(tmp_path: Path) -> None:
    make_authority(tmp_path)
    (finding,) = look_at_connection("fl.example.org", tmp_path / "ca.crt")
    assert "HOST:PORT" in finding.found
    (finding,) = look_at_connection("127.0.0.1:1", tmp_path / "missing.crt")
    assert finding.level == "error"


def test_a_clock_that_is_ahead_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "ask", lambda *_, **__: health.Answer(status=401, seconds_ahead=30.0))
    with caplog.at_level(logging.WARNING, logger="ot_federated"):
        assert [finding.check for finding in look_at_connection("x:1", tmp_path)] == ["clock"]
    assert "30 s ahead of the model owner's" in caplog.text


def test_the_connection_is_taken_from_flowers_options() -> None:
    assert check_options(["--superlink", "x:1", "--root-cert", "ca.crt"]) == ("x:1", Path("ca.crt"))
    assert check_options(["--superlink", "x:1", "--insecure"]) == ("x:1", None)
