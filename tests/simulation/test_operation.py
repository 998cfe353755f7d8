"""Operating a run: its metrics for Prometheus, its log lines, and what is left when it is stopped."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from flwr.app import Message
from prometheus_client.parser import text_string_to_metric_families

from ot_federated.data_owner.replies import content_or_reason
from ot_federated.errors import ConfigError
from ot_federated.reporting.prometheus import parse_address
from tests.federations import is_train_reply, prepare_federation, run_federation, start

# ---- Metrics ------------------------------------------------------------------------------------------------------


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_served_while_the_run_lasts_and_agree_with_its_files(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = find_free_port()
    monkeypatch.setenv("OT_FEDERATED_METRICS", f"127.0.0.1:{port}")
    scraped: list[dict[str, float]] = []

    def look(reply: Message) -> list[Message]:
        if is_train_reply(reply):
            scraped.append(scrape(port))
            # In round 2 the second client answers the wrong round.
            if is_train_reply(reply, server_round=2, partition=1):
                reply.content.config_records["config"]["server-round"] = 9
        return [reply]

    settings = {"num-server-rounds": 3}
    federation = run_federation(tmp_path, llama_directory, settings=settings, num_rows=8, on_reply=look)
    first, last = scraped[0], scraped[-1]
    assert first["ot_federated_round"] == 0
    assert "ot_federated_train_loss" not in first
    lines = [line for line in federation.rounds.values() if line["round"] in (1, 2)]
    assert last["ot_federated_round"] == 2
    assert last["ot_federated_replies_total[valid]"] == 3
    assert last["ot_federated_replies_total[rejected]"] == 1
    assert last["ot_federated_replies_total[failed]"] == 0
    for what in ("bundle_bytes", "bytes_to_clients", "bytes_to_server"):
        assert last[f"ot_federated_bytes_total[{what}]"] == sum(line[what] for line in lines) > 0
    assert last["ot_federated_round_seconds_count"] == 2
    assert last["ot_federated_round_seconds_sum"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert last["ot_federated_train_loss"] == lines[-1]["train_loss"]
    assert last["ot_federated_plug_in_loss"] == lines[-1]["plug_in"]["loss"]
    assert "ot_federated_epsilon" not in last
    with pytest.raises(urllib.error.URLError):
        scrape(port)


def test_a_taken_port_is_told_and_fails_nothing(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("OT_FEDERATED_METRICS", f"127.0.0.1:{taken.getsockname()[1]}")
        federation = run_federation(tmp_path, llama_directory, num_rows=8)
    assert federation.summary
    assert "no metrics are served" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["9464", "localhost", "localhost:0", "localhost:70000", "http://x:1", ":9464", "a b:1"]
)
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert parse_address("[::1]:9464") == ("::1", 9464)


def test_without_the_extra_the_remedy_is_named(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OT_FEDERATED_METRICS", "127.0.0.1:9464")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'ot-federated\[metrics\]'"):
        run_federation(tmp_path, llama_directory, num_rows=8)


# ---- Log lines ----------------------------------------------------------------------------------------------------


def test_lines_of_both_sides_tell_run_round_and_node(
    tmp_path: Path, llama_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OT_FEDERATED_LOG", "json")
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])  # they would keep the form
    monkeypatch.setattr("ot_federated.data_owner.client_app.seconds_between_lines", 0.0)
    run_federation(tmp_path, llama_directory, settings={"num-server-rounds": 2}, num_rows=8)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith('{"time"')]
    assert len({line["run"] for line in lines}) == 1
    steps = [line for line in lines if "  step " in line["message"]]
    replies = [line for line in lines if line["message"].endswith(" s") and "/2  client-" in line["message"]]
    for told in (steps, replies):
        found = {(line["round"], line["node"]) for line in told}
        assert found == {(number, f"client-000{node}") for number in (1, 2) for node in (0, 1)}
    scores = [line for line in lines if "plug-in on" in line["message"]]
    assert [line.get("round") for line in scores] == [None, 1, 2]
    assert all("node" not in line for line in scores)


# ---- Stopping -----------------------------------------------------------------------------------------------------

# Flower ends a ServerApp that gets SIGTERM by SystemExit out of its signal handler, in whatever line was being run.
stopped_run = """
import json, os, signal, sys
from pathlib import Path
from flwr.supercore.exit import register_signal_handlers
from flwr.supercore.telemetry import EventType
import ot_federated.model_owner.checkpoints as checkpoints
from tests.federations import is_train_reply, prepare_federation, start

stage, directory, model, settings = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
register_signal_handlers(event_type=EventType.PING)

def stop():
    os.kill(os.getpid(), signal.SIGTERM)

def on_reply(reply):
    if stage == "training" and is_train_reply(reply, server_round=2, partition=0):
        stop()
    return [reply]

if stage == "checkpoint":
    real = os.fsync
    def fsync(descriptor):
        real(descriptor)
        if (directory / "run" / "checkpoints" / "round-0001").is_dir() and "safetensors" in os.readlink(
            f"/proc/self/fd/{descriptor}"
        ):
            stop()
    os.fsync = fsync
start(prepare_federation(directory, model, settings=settings, num_rows=8, on_reply=on_reply))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="POSIX signals, and open files by /proc")
@pytest.mark.parametrize("stage", ["training", "checkpoint"])
def test_a_run_that_is_stopped_says_so_and_goes_on_to_the_same_end(
    tmp_path: Path, llama_directory: Path, stage: str
) -> None:
    settings = {"num-server-rounds": 3}
    directory = tmp_path / "stopped"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", stopped_run, stage, str(directory), str(llama_directory), json.dumps(settings)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # as Flower ends after SIGTERM
    run = directory / "run"
    assert "resume=true" in (run / "failure.txt").read_text()
    assert "stopped; resume=true goes on" in done.stderr
    assert not (run / "summary.json").exists()
    assert not list(run.rglob("*.partial"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["round-0001"]
    resumed = start(prepare_federation(directory, llama_directory, settings={**settings, "resume": True}, num_rows=8))
    whole = run_federation(tmp_path / "whole", llama_directory, settings=settings, num_rows=8)
    assert resumed.digest == whole.digest
    assert not (run / "failure.txt").exists()


def test_a_client_that_is_stopped_replies_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit), caplog.at_level("WARNING", logger="ot_federated"):
        content_or_reason(lambda: sys.exit(0))
