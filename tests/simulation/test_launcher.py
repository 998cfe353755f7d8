"""The Ray engine on a small app: output, settings, failures, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from simulations.launcher import SimulationError, run_on_ray
from simulations.processes import find_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

pyproject = """
[project]
name = "tiny-app"
version = "0.1.0"
description = "Echoes what it sees."
license = "Apache-2.0"
dependencies = ["flwr[simulation]"]

[tool.flwr.app]
publisher = "test"

[tool.flwr.app.components]
serverapp = "tiny_app.apps:server_app"
clientapp = "tiny_app.apps:client_app"

[tool.flwr.app.config]
mode = "pass"
output-dir = ""
[tool.flwr.app.config.group]
text = ""
number = 0.5
"""

apps = """
import json, logging, os, pathlib, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()
wanted = ("OT_FEDERATED_RUN_TOKEN", "OT_FEDERATED_BUNDLE_CACHE", "OT_FEDERATED_SCENARIO", "FLWR_HOME")


def environment():
    return {name: os.environ.get(name, "") for name in wanted}


@client_app.query("look")
def look(message, context):
    cache = pathlib.Path(os.environ["OT_FEDERATED_BUNDLE_CACHE"])
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "bundle").touch()
    print("a client's line")
    seen = {**environment(), "pid": os.getpid(), "text": context.run_config["group.text"]}
    return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)


@server_app.main()
def main(grid, context):
    config = context.run_config
    output_dir = pathlib.Path(config["output-dir"])
    (output_dir / "server.json").write_text(json.dumps({**environment(), "config": dict(config), "cwd": os.getcwd()}))
    print("server line", flush=True)
    logging.getLogger("flwr").info("a record of Flower")
    if config["mode"] == "reason":
        (output_dir / "failure.txt").write_text("data.train='x' does not exist.\\n")
        raise RuntimeError("not shown")
    if config["mode"] == "raise":
        raise RuntimeError("out of luck")
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.1)
    messages = [Message(RecordDict(), node, "query.look") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    (output_dir / "clients.json").write_text(json.dumps([dict(reply.content["seen"]) for reply in replies]))
    sys.stderr.write("\\rprogress 50%")
    if config["mode"] == "hang":
        (output_dir / "hanging").touch()
        time.sleep(600)
    sys.stderr.write("\\rprogress 100%\\n")
"""

awkward = "a 'b' \"c\" = # \\ \n é {x}"


@pytest.fixture(scope="module")
def app_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkout")
    (directory / "pyproject.toml").write_text(pyproject)
    (directory / "tiny_app").mkdir()
    (directory / "tiny_app" / "__init__.py").touch()
    (directory / "tiny_app" / "apps.py").write_text(apps)
    return directory


def run(app_dir: Path, output_dir: Path, *, mode: str = "pass") -> None:
    run_on_ray(
        app_dir=app_dir,
        run_config={"mode": mode, "output-dir": str(output_dir), "group.text": awkward},
        num_clients=3,
        client_num_cpus=1,
        client_num_gpus=0.0,
        output_dir=output_dir,
        environment={"OT_FEDERATED_SCENARIO": "tiny"},
    )


def assert_nothing_is_left(output_dir: Path) -> None:
    server = json.loads((output_dir / "server.json").read_text())
    assert find_processes(server["OT_FEDERATED_RUN_TOKEN"]) == []
    assert not Path(server["FLWR_HOME"]).exists()
    assert not list(output_dir.glob("client-cache-*"))


def test_run_succeeds(app_dir, tmp_path, capfd):
    run(app_dir, tmp_path)
    assert capfd.readouterr().out == "server line\n\rprogress 50%\rprogress 100%\n"
    assert "a client's line" in (tmp_path / "simulation.log").read_text()

    server = json.loads((tmp_path / "server.json").read_text())
    assert server["config"]["group.text"] == awkward
    assert server["config"]["group.number"] == 0.5
    assert server["OT_FEDERATED_SCENARIO"] == "tiny"
    assert Path(server["cwd"]).is_relative_to(server["FLWR_HOME"])

    clients = json.loads((tmp_path / "clients.json").read_text())
    assert len(clients) == 3
    for client in clients:
        assert client["text"] == awkward
        # Its own, for a second start on the same directory removes what is its own.
        assert client["OT_FEDERATED_BUNDLE_CACHE"] == str(
            tmp_path / f"client-cache-{server['OT_FEDERATED_RUN_TOKEN'][:8]}"
        )
        assert client["OT_FEDERATED_RUN_TOKEN"] == server["OT_FEDERATED_RUN_TOKEN"]
    assert_nothing_is_left(tmp_path)


def test_failure_file_is_the_reason(app_dir, tmp_path, capfd):
    with pytest.raises(SimulationError, match=r"^data\.train='x' does not exist\.$"):
        run(app_dir, tmp_path, mode="reason")
    assert capfd.readouterr().out == "server line\n"
    assert_nothing_is_left(tmp_path)


def test_exception_of_the_server_app_is_the_reason(app_dir, tmp_path):
    (tmp_path / "failure.txt").write_text("of an earlier run")
    with pytest.raises(SimulationError, match="out of luck") as caught:
        run(app_dir, tmp_path, mode="raise")
    assert str(tmp_path / "simulation.log") in str(caught.value)
    assert "Traceback" in (tmp_path / "simulation.log").read_text()
    assert_nothing_is_left(tmp_path)


def test_app_that_cannot_be_bundled(tmp_path):
    with pytest.raises(SimulationError, match="Failed to load Flower App"):
        run(tmp_path / "nothing", tmp_path)


def test_client_that_fits_nowhere(app_dir, tmp_path):
    with pytest.raises(SimulationError, match="client-num-cpus=4096 but this machine offers"):
        run_on_ray(
            app_dir=app_dir,
            run_config={},
            num_clients=1,
            client_num_cpus=4096,
            client_num_gpus=0.0,
            output_dir=tmp_path,
            environment={},
        )


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(app_dir, tmp_path, number):
    code = f"""
        import signal
        from pathlib import Path
        from simulations import command_line, launcher
        command_line._run_on_ray = lambda request: launcher.run_on_ray(
            app_dir=Path({str(app_dir)!r}),
            run_config={{"mode": "hang", "output-dir": {str(tmp_path)!r}}},
            num_clients=3,
            client_num_cpus=1,
            client_num_gpus=0.0,
            output_dir=Path({str(tmp_path)!r}),
            environment={{}},
        )
        # A test run in the background hands down that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise SystemExit(command_line.main(["--output", {str(tmp_path)!r}]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "hanging").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    token = json.loads((tmp_path / "server.json").read_text())["OT_FEDERATED_RUN_TOKEN"]
    members = find_processes(token)
    assert len(members) > 5
    process.send_signal(number)
    _, error_text = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        deadline = time.monotonic() + 15
        while (find_processes(token) or list(tmp_path.glob("client-cache-*"))) and time.monotonic() < deadline:
            time.sleep(0.5)
    else:
        assert process.returncode == 130
        assert error_text == "interrupted\n"
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    assert_nothing_is_left(tmp_path)
